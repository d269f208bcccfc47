"""How long a kernel takes compared with MLX's own way, its reference, both in turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.kernel import Arrays, Kernel, Operation, Timing

#: Calls in a row, each fed by the one before where the kernel can be: what a call costs in a model, not what it costs
#: to wait for one.
CHAIN = 24


@dataclass(frozen=True)
class Measured:
    """Medians in microseconds. `floor`: the bytes that must be moved at the bandwidth of a plain copy of the device."""

    kernel: str
    dtype: str
    shape: str
    #: One call, waited for.
    alone: float
    builtin_alone: float
    #: One of `CHAIN` calls in a compiled function.
    chained: float
    builtin_chained: float
    bytes: int
    #: Achieved in the chain, GB/s.
    bandwidth: float
    floor: float | None = None

    @property
    def line(self) -> str:
        alone, chained = self.alone / self.builtin_alone, self.chained / self.builtin_chained
        floor = f", floor {self.floor:.1f} µs" if self.floor else ""
        return (
            f"{self.kernel:15} {self.dtype:9} {self.shape:48} "
            f"alone {self.alone:8.1f} µs, MLX {self.builtin_alone:8.1f} ({alone:.2f} ×)  "
            f"chained {self.chained:8.1f} µs, MLX {self.builtin_chained:8.1f} ({chained:.2f} ×)  "
            f"{self.bandwidth:7.1f} GB/s{floor}"
        )


def measure(kernel: Kernel, timing: Timing, dtype: str, *, times: int = 50, copy: float | None = None) -> Measured:
    """Time `kernel` against its reference. `copy`: bytes a second of a plain copy, for the floor."""
    mx.eval([argument for argument in timing.arguments if isinstance(argument, mx.array)])
    alone = _interleaved(_single(kernel, timing), _single(kernel.reference, timing), times)
    chained = _interleaved(_chain(kernel, timing), _chain(kernel.reference, timing), max(5, times // 2))
    per_call = [value / CHAIN for value in chained]
    return Measured(
        kernel=kernel.name,
        dtype=dtype,
        shape=timing.label,
        alone=alone[0],
        builtin_alone=alone[1],
        chained=per_call[0],
        builtin_chained=per_call[1],
        bytes=timing.bytes,
        bandwidth=timing.bytes / per_call[0] / 1e3,
        floor=timing.bytes / copy * 1e6 if copy else None,
    )


def copy_bandwidth(size: int = 1 << 28, times: int = 20) -> float:
    """Bytes read and written a second by a plain copy of `size` bytes."""
    source = mx.random.normal((size // 4,))
    mx.eval(source)
    samples = _samples([lambda: [source + 1.0]], times)[0]
    return 2 * size / (float(np.median(samples)) * 1e-6)


def _single(operation: Operation | Kernel, timing: Timing) -> Callable[[], Arrays]:
    """One call in a compiled function, as the engine makes it."""
    arrays, rebuild = _split(timing.arguments)
    compiled = mx.compile(lambda given: operation(*rebuild(given)))
    return lambda: compiled(arrays)


def _chain(operation: Operation | Kernel, timing: Timing) -> Callable[[], Arrays]:
    """`CHAIN` calls, one after the other."""
    arrays, rebuild = _split(timing.arguments)
    feed = timing.chain or _after

    def run(given: list[mx.array]) -> Arrays:
        arguments = rebuild(given)
        made: Arrays = []
        for _ in range(CHAIN):
            made = operation(*arguments)
            arguments = feed(arguments, made)
        return made

    compiled = mx.compile(run)
    return lambda: compiled(arrays)


def _after(arguments: tuple[Any, ...], made: Arrays) -> tuple[Any, ...]:
    """The same arguments, once `made` is there: the first one depends on it."""
    return (mx.depends([arguments[0]], made)[0], *arguments[1:])


def _split(arguments: tuple[Any, ...]) -> tuple[list[mx.array], Callable[[list[mx.array]], tuple[Any, ...]]]:
    """The arrays among the arguments, and the way back: a compiled function takes arrays alone."""
    positions = [i for i, argument in enumerate(arguments) if isinstance(argument, mx.array)]

    def rebuild(arrays: list[mx.array]) -> tuple[Any, ...]:
        filled = list(arguments)
        for position, array in zip(positions, arrays, strict=True):
            filled[position] = array
        return tuple(filled)

    return [arguments[position] for position in positions], rebuild


def _interleaved(one: Callable[[], Arrays], other: Callable[[], Arrays], times: int) -> list[float]:
    return [float(np.median(samples)) for samples in _samples([one, other], times)]


def _samples(actions: list[Callable[[], Arrays]], times: int) -> list[list[float]]:
    """Microseconds of each action, taken in turn, after three runs that do not count."""
    samples: list[list[float]] = [[] for _ in actions]
    for turn in range(times + 3):
        for action, kept in zip(actions, samples, strict=True):
            start = time.perf_counter()
            mx.eval(action())
            if turn >= 3:
                kept.append((time.perf_counter() - start) * 1e6)
    return samples

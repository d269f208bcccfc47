"""What a fused kernel is: a public function that dispatches, with everything that checks and measures it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.backend import Backend, backend_for
from kernels.body import Body

Arrays = list[mx.array]
Operation = Callable[..., Arrays]

#: What a body computes in is float32, so a result differs from the reference's by the last rounding to its dtype.
TOLERANCES: dict[mx.Dtype, float] = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCES)


@dataclass(frozen=True)
class Case:
    """One shape to check: what the operation is called with."""

    label: str
    arguments: tuple[Any, ...]
    #: Too much for the emulator's shadow memory: it runs there without.
    large: bool = False


@dataclass(frozen=True)
class Timing:
    """One shape to measure."""

    label: str
    arguments: tuple[Any, ...]
    #: The fewest bytes that any way of computing it must read and write.
    bytes: int
    #: What feeds a result back as arguments, for kernels that are measured in a chain of calls.
    chain: Callable[[tuple[Any, ...], Arrays], tuple[Any, ...]] | None = None


@dataclass(frozen=True)
class Kernel:
    """A fused operation on lists of arrays; the module that makes it wraps it in a function with a plain signature."""

    name: str
    #: Why it exists: what it saves.
    reason: str
    bodies: tuple[Body, ...]
    #: The operation by its bodies, and by MLX's own operations.
    launch: Operation
    reference: Operation
    #: Why the bodies cannot take these arguments, or None.
    refuse: Callable[..., str | None]
    #: Shapes to check for a dtype, drawn from a random generator; awkward ones among them.
    cases: Callable[[mx.Dtype, np.random.Generator], Iterable[Case]]
    #: Shapes to measure.
    timings: Callable[[mx.Dtype], Iterable[Timing]]
    dtypes: tuple[mx.Dtype, ...] = DTYPES
    #: How wrong results are, where a comparison with the reference's would not say: of arguments and results.
    error: Callable[[tuple[Any, ...], Arrays], float] | None = None
    tolerances: dict[mx.Dtype, float] = field(default_factory=lambda: TOLERANCES)
    #: Whether training goes through it: then its gradient is checked against the reference's.
    differentiable: bool = False
    #: Inputs at which a mistake would be expected, many rows a case: for slow tests and `stoker kernels check --hard`.
    hard: Callable[[mx.Dtype, np.random.Generator], Iterable[Case]] | None = None
    #: How often it fell back to the reference on a GPU, by reason.
    fallbacks: Counter[str] = field(default_factory=Counter)

    def __call__(self, *arguments: Any) -> Arrays:
        if self.backend == "reference":
            return self.reference(*arguments)
        if reason := self.refuse(*arguments):
            self.fallbacks[reason] += 1
            return self.reference(*arguments)
        return self.launch(*arguments)

    def error_of(self, arguments: tuple[Any, ...], results: Arrays) -> float:
        """How wrong `results` are: the largest difference from the reference in float32, over its largest number."""
        if self.error is not None:
            return self.error(arguments, results)
        return difference(results, exactly(self.reference, arguments))

    @property
    def backend(self) -> Backend:
        """On what it runs now."""
        return backend_for(self.name)

    @property
    def active(self) -> bool:
        """Whether its bodies run, not the reference."""
        return self.backend != "reference"


def exactly(reference: Operation, arguments: tuple[Any, ...]) -> Arrays:
    """What it gives in float32. It runs on the CPU: CUDA multiplies float32 in TF32, and its `gather_mm` faults on odd
    widths."""
    with mx.stream(mx.cpu):
        expected = reference(*[_upcast(argument) for argument in arguments])
        mx.eval(expected)
    return expected


def difference(results: Arrays, expected: Arrays) -> float:
    """The largest of any result, relative to the largest number that was expected of it."""
    return max(_difference(*pair) for pair in zip(results, expected, strict=True))


def _upcast(argument: Any) -> Any:
    """MLX's CPU back-end lacks some operations in 16 bits, and a reference should be the closer of the two."""
    half = isinstance(argument, mx.array) and argument.dtype in (mx.float16, mx.bfloat16)
    return argument.astype(mx.float32) if half else argument


def _difference(result: mx.array, expected: mx.array) -> float:
    """Relative to the largest of `expected`; infinite for a NaN or a wrong shape."""
    if result.shape != expected.shape:
        return float("inf")
    got, wanted = (np.array(array.astype(mx.float32), np.float64) for array in (result, expected))
    difference = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6))
    return difference if np.isfinite(difference) else float("inf")


def with_gradient_of(reference: Operation, launch: Operation) -> Operation:
    """`launch`, differentiated as `reference`: the backward pass recomputes the forward in MLX's own operations.

    The wrapper costs microseconds a call even where nothing is differentiated (4 on an H100): decoding goes without.
    """
    function = mx.custom_function(launch)

    @function.vjp
    def gradient(primals: Any, cotangents: Any, _outputs: Any) -> Any:
        return mx.vjp(reference, list(primals), list(cotangents))[1]

    result: Any = function
    differentiable: Operation = result
    return differentiable


def refuse_dtype(*arrays: mx.array, dtypes: Sequence[mx.Dtype] = DTYPES) -> str | None:
    """Why these arrays, which must share one of `dtypes`, cannot be taken."""
    found = {array.dtype for array in arrays}
    if len(found) > 1:
        return f"dtypes differ: {', '.join(sorted(str(dtype) for dtype in found))}"
    return None if found <= set(dtypes) else f"dtype {found.pop()}"


def float_bits(value: float) -> int:
    """The bits of a positive float32: templates take integers, and a constant spares a buffer."""
    return int(np.float32(value).view(np.int32))


def threads_for(width: int) -> int:
    """Threads of a threadgroup that shares a row of `width`: about four elements each, in whole simdgroups."""
    return min(1024, max(32, -(-width // 128) * 32))


def on_device(shape: Sequence[int], dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    """Random numbers for a timing, which may be many."""
    return mx.random.normal(shape, scale=scale).astype(dtype)


def normal(random: np.random.Generator, shape: Sequence[int], dtype: mx.Dtype, scale: float = 1.0) -> mx.array:
    """Random numbers for a case."""
    return mx.array((random.standard_normal(shape) * scale).astype(np.float32)).astype(dtype)

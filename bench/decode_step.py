"""The engine's compiled decode step with fused kernels and without, one after the other in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from bench.shapes import SHAPES
from engine.adapters.stacked import StackedLora
from engine.generation.draws import Draw
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling_batch import sampling_batch
from engine.generation.step import Step
from engine.models.cache import KeyValues
from engine.models.joint import JointKeyValues
from engine.models.llama import Llama
from engine.models.qwen2 import Qwen2Args
from engine.weights.tensors import Tensors
from kernels import registry
from kernels.registry import NAMES, parse
from stoker.contract import GenerateRequest

#: Steps that are launched one after the other before the last is waited for, as the engine runs a pass ahead.
STEPS, TIMES = 16, 9


class Setting(NamedTuple):
    """`kernels`: the value of STOKER_KERNELS. `bits`: of keys and values. A row has half as many tokens as `capacity`
    or more."""

    rows: int
    adapters: int
    kernels: str
    bits: int = 16
    capacity: int = 512


def _without(name: str) -> str:
    """All kernels except one."""
    return ",".join(other for other in NAMES if other != name)


#: The base of all that are alike in rows, adapters and capacity comes first.
SETTINGS = (
    *(Setting(32, 0, "off"), Setting(32, 0, "auto")),
    *(Setting(32, 8, "off"), Setting(32, 8, "auto")),
    *(Setting(1, 0, "off"), Setting(1, 0, "auto")),
    # What one is worth.
    *(Setting(32, 0, _without(name)) for name in ("sample", "attend", "add_rms_norm")),
)
#: Keys and values in fewer bits, which the kernel that attends packs and reads, and without it MLX's own operations.
PACKED = tuple(
    Setting(rows, 0, kernels, bits, capacity)
    for rows, capacity in ((1, 512), (1, 4096), (32, 512))
    for kernels, bits in (("auto", 16), ("auto", 8), ("auto", 4), (_without("attend"), 8), (_without("attend"), 4))
)


class RandomTensors(Tensors):
    """Makes what a layer takes, where it is used: normal numbers, of a scale that keeps hidden states near 1."""

    def __init__(self, dtype: mx.Dtype) -> None:
        super().__init__({}, {}, "random", dtype)

    def take(
        self, name: str, shape: tuple[int, ...], *, transpose: bool = False, dtype: mx.Dtype | None = None
    ) -> mx.array:
        scale = 0.05 if len(shape) == 1 else shape[-1] ** -0.5
        made = mx.random.normal(shape[::-1] if transpose else shape, scale=scale) + (1.0 if "norm" in name else 0.0)
        made = made.astype(dtype or self._dtype)
        mx.eval(made)
        return made


def random_llama(shape: str = "qwen2.5-0.5b", dtype: mx.Dtype = mx.bfloat16) -> Llama:
    """A decoder of one of `SHAPES` with random weights."""
    mx.random.seed(0)
    return Llama(Qwen2Args.from_config(SHAPES[shape]), RandomTensors(dtype))


class Loop:
    """Some decode steps in a row, each fed by the one before, under one setting; compiled when made.

    Where there are adapters, a row has one of rank 16 on every linear layer.
    """

    def __init__(self, llama: Llama, setting: Setting) -> None:
        self._llama, self.setting = llama, setting
        rows, adapters, capacity = setting.rows, setting.adapters, setting.capacity
        with self._set():
            kind = JointKeyValues if llama.kv_sizes.joint else KeyValues
            self._step, self._kv = Step(llama, compiled="all"), kind(llama, rows, capacity)
        random = np.random.default_rng(0)
        self._offset = random.integers(capacity // 2, capacity, rows).astype(np.int32)
        self._tokens = mx.array(random.integers(0, llama.args.vocab, rows), mx.int32)
        request = GenerateRequest(model="m", prompt="x", temperature=0.8, top_k=50, top_p=0.95)
        self._sampling = sampling_batch([Draw(request, float(u)) for u in random.random(rows)], llama.args.vocab)
        self._adapters = random_adapters(llama, rows, adapters) if adapters else None
        mx.eval(self._kv.stored, self._tokens)
        self.run()

    @property
    def name(self) -> str:
        rows, adapters, kernels, bits, capacity = self.setting
        missing = [name for name in NAMES if name not in parse(kernels)]
        used = {"off": "none", "auto": "all"}.get(kernels, f"all except {', '.join(missing)}")
        kept = f" of {capacity // 2} to {capacity} tokens in {bits} bits" if self.setting in PACKED else ""
        return f"{rows} rows{kept}, {adapters} adapters, kernels: {used}"

    def run(self) -> float:
        """Milliseconds of a step."""
        with self._set():
            start = time.perf_counter()
            tokens, capacity = self._tokens, self.setting.capacity
            for _ in range(STEPS):
                positions = self._kv.pending(self._offset)
                offset = mx.array(self._offset)
                given = ForwardInput(tokens[:, None], offset, capacity, adapters=self._adapters, positions=positions)
                chosen = self._step(self._kv, given, self._sampling)
                tokens = chosen[0]
                mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            mx.eval(tokens)
            return (time.perf_counter() - start) * 1e3 / STEPS

    @contextmanager
    def _set(self) -> Iterator[None]:
        registry.use(self.setting.kernels)
        self._llama.kv_bits = self.setting.bits
        try:
            yield
        finally:
            registry.use("auto")
            self._llama.kv_bits = 16


def measure(loops: Sequence[Loop]) -> list[dict[str, Any]]:
    """Medians of all loops, taken in turn, and how much faster than the first of the same rows and adapters each is."""
    samples = [[loop.run() for loop in loops] for _ in range(TIMES)]
    found: list[dict[str, Any]] = []
    base: dict[tuple[int, int, int], float] = {}
    for index, loop in enumerate(loops):
        taken = [turn[index] for turn in samples]
        ms = float(np.median(taken))
        rows, adapters, _, _, capacity = loop.setting
        speedup = base.setdefault((rows, adapters, capacity), ms) / ms
        found.append({"name": loop.name, "ms": ms, "speedup": speedup, "samples": taken})
        print(f"decode step, {loop.name:52} {ms:8.3f} ms  {speedup:.2f} ×", flush=True)
    return found


def random_adapters(
    llama: Llama, rows: int, adapters: int, targets: Sequence[str] | None = None, rank: int = 16
) -> StackedLora:
    """Random adapters on the layers of these last names (None: on all); row i has adapter 1 + i modulo their number."""
    stacks = {}
    for name, (wide, out) in llama.linear_shapes.items():
        if targets is not None and name.rsplit(".", 1)[-1] not in targets:
            continue
        real = (mx.arange(adapters + 1) > 0)[:, None, None]
        a = mx.random.normal((adapters + 1, wide, rank), scale=wide**-0.5).astype(llama.dtype)
        b = mx.random.normal((adapters + 1, rank, out), scale=0.01).astype(llama.dtype)
        stacks[name] = {"a": mx.where(real, a, 0), "b": mx.where(real, b, 0)}
    mx.eval(stacks)
    return StackedLora(stacks, mx.array(1 + np.arange(rows) % adapters, mx.uint32))

"""The engine's compiled decode step with fused kernels and without, one after the other in turn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
STEPS, TIMES, CAPACITY = 16, 9, 512
#: Rows, adapters, and the value of STOKER_KERNELS: the base of each pair of rows and adapters comes first.
SETTINGS = (
    *((32, 0, "off"), (32, 0, "auto")),
    *((32, 8, "off"), (32, 8, "auto")),
    *((1, 0, "off"), (1, 0, "auto")),
    # All except one: what that one is worth.
    *((32, 0, ",".join(other for other in NAMES if other != name)) for name in ("sample", "attend", "add_rms_norm")),
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
    """Some decode steps in a row, each fed by the one before, under one value of STOKER_KERNELS; compiled when made.

    Rows have 256 to 511 tokens, and where there are adapters, one of rank 16 on every linear layer.
    """

    def __init__(self, llama: Llama, rows: int, adapters: int, setting: str) -> None:
        self.rows, self.adapters, self.setting = rows, adapters, setting
        with _kernels(setting):
            kind = JointKeyValues if llama.kv_sizes.joint else KeyValues
        self._step, self._kv = Step(llama, compiled="all"), kind(llama, rows, CAPACITY)
        random = np.random.default_rng(0)
        self._offset = random.integers(CAPACITY // 2, CAPACITY, rows).astype(np.int32)
        self._tokens = mx.array(random.integers(0, llama.args.vocab, rows), mx.int32)
        request = GenerateRequest(model="m", prompt="x", temperature=0.8, top_k=50, top_p=0.95)
        self._sampling = sampling_batch([Draw(request, float(u)) for u in random.random(rows)], llama.args.vocab)
        self._adapters = random_adapters(llama, rows, adapters) if adapters else None
        mx.eval(self._kv.stored, self._tokens)
        self.run()

    @property
    def name(self) -> str:
        missing = [name for name in NAMES if name not in parse(self.setting)]
        used = {"off": "none", "auto": "all"}.get(self.setting, f"all except {', '.join(missing)}")
        return f"{self.rows} rows, {self.adapters} adapters, kernels: {used}"

    def run(self) -> float:
        """Milliseconds of a step."""
        with _kernels(self.setting):
            start = time.perf_counter()
            tokens = self._tokens
            for _ in range(STEPS):
                positions = self._kv.pending(self._offset)
                offset = mx.array(self._offset)
                given = ForwardInput(tokens[:, None], offset, CAPACITY, adapters=self._adapters, positions=positions)
                chosen = self._step(self._kv, given, self._sampling)
                tokens = chosen[0]
                mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            mx.eval(tokens)
            return (time.perf_counter() - start) * 1e3 / STEPS


def measure(loops: Sequence[Loop]) -> list[dict[str, Any]]:
    """Medians of all loops, taken in turn, and how much faster than the first of the same rows and adapters each is."""
    samples = [[loop.run() for loop in loops] for _ in range(TIMES)]
    found: list[dict[str, Any]] = []
    base: dict[tuple[int, int], float] = {}
    for index, loop in enumerate(loops):
        taken = [turn[index] for turn in samples]
        ms = float(np.median(taken))
        speedup = base.setdefault((loop.rows, loop.adapters), ms) / ms
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


@contextmanager
def _kernels(setting: str) -> Iterator[None]:
    registry.use(setting)
    try:
        yield
    finally:
        registry.use("auto")

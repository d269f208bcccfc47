"""The engine's compiled decode step on a GPU: with fused kernels, and by turns with MLX's own instead of some.

Random bfloat16 weights of Qwen2.5-0.5B's shape. Launches and the device's time are those that torch's profiler sees.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from bench.device import traced
from bench.report import Record, Row, by_turns, parser, ratio, row
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
from engine.platform.probe import device
from engine.weights.tensors import Tensors
from kernels import registry
from kernels.backend import of_machine
from kernels.registry import NAMES
from stoker.contract import GenerateRequest

#: Steps that are launched one after the other before the last is waited for, as the engine runs a pass ahead.
STEPS, ROUNDS, QUICK, CAPACITY = 16, 40, 10, 512
#: Rows and adapters.
CELLS = {"1 row": (1, 0), "32 rows": (32, 0), "32 rows over 8 adapters": (32, 8)}
#: In the long form: what one kernel alone is worth.
LEFT_OUT = ("greedy", "attend", "lora_add_rms_norm", "add_rms_norm")


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
        self._setting = setting
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

    def run(self) -> float:
        """Milliseconds of a step."""
        with _kernels(self._setting):
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


def measured(llama: Llama, cell: str, quick: bool) -> list[Row]:
    """Steps of these rows and adapters, with all kernels, with none, and in the long form without one."""
    rows, adapters = CELLS[cell]
    settings = {"MLX's own kernels": "off"}
    if rows > 1 and not quick:
        settings |= {f"without {one}": ",".join(other for other in NAMES if other != one) for one in LEFT_OUT}
    loops = {"all": Loop(llama, rows, adapters, "auto")}
    loops |= {name: Loop(llama, rows, adapters, setting) for name, setting in settings.items()}
    found = by_turns({name: loop.run for name, loop in loops.items()}, QUICK if quick else ROUNDS)
    ours, seen = row(cell, "ms", found["all"]), traced(loops["all"].run)
    shares: list[Row] = []
    if seen is not None:
        launches, device_ms = seen[0] // STEPS, seen[1] / STEPS
        ours = replace(ours, launches=launches, device_ms=device_ms)
        shares = [row(f"{cell}: share of a step that the device works", "", [device_ms / ms for ms in found["all"]])]
    others = {name: samples for name, samples in found.items() if name != "all"}
    return [
        ours,
        *(row(f"{cell}: {name}", "ms", samples) for name, samples in others.items()),
        *(ratio(f"{cell}, {name} against all kernels", samples, found["all"]) for name, samples in others.items()),
        *shares,
    ]


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


def main() -> int:
    options = parser(__doc__).parse_args()
    if of_machine() == "reference":
        print("No GPU that MLX knows: a decode step launches nothing here.", file=sys.stderr)
        return 1
    record = Record("decode-gpu", options.out, device=device())
    llama = random_llama()
    for cell in CELLS:
        record.part(cell, partial(measured, llama, cell, options.quick))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())

"""The engine's compiled decode step on a GPU: with fused kernels, and by turns with MLX's own instead of some.

Random bfloat16 weights of Qwen2.5-0.5B's shape. Launches and the device's time are those that torch's profiler sees.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

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
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.models.qwen2 import Qwen2Args
from engine.platform.probe import device
from engine.weights.tensors import Tensors
from kernels import registry
from kernels.backend import of_machine
from kernels.registry import NAMES
from stoker.contract import GenerateRequest

#: Steps that are launched one after the other before the last is waited for, as the engine runs a pass ahead.
STEPS, ROUNDS, QUICK = 16, 40, 10


class Setting(NamedTuple):
    """`kernels`: the value of STOKER_KERNELS. `bits`: of keys and values. A row has half as many tokens as `capacity`
    or more."""

    rows: int
    adapters: int = 0
    kernels: str = "auto"
    bits: int = 16
    capacity: int = 512


class Cell(NamedTuple):
    """A step, what it is called among `others`, and those, by name."""

    called: str
    step: Setting
    others: Mapping[str, Setting]


def _without(*names: str) -> str:
    """All kernels except these."""
    return ",".join(other for other in NAMES if other not in names)


def _cell(rows: int, adapters: int = 0) -> Cell:
    return Cell("all kernels", Setting(rows, adapters), {"MLX's own kernels": Setting(rows, adapters, "off")})


CELLS = {"1 row": _cell(1), "32 rows": _cell(32), "32 rows over 8 adapters": _cell(32, 8)}
#: In the long form too: what one kernel alone is worth.
LEFT_OUT = {1: ("norm_project",), 32: ("greedy", "attend", "add_rms_norm")}
ALONE = {
    f"{rows} row{'s' if rows > 1 else ''}, one kernel less": Cell(
        "all kernels", Setting(rows), {f"without {name}": Setting(rows, kernels=_without(name)) for name in names}
    )
    for rows, names in LEFT_OUT.items()
}
#: And keys and values in fewer bits, by the kernels, and without them by MLX's own operations.
PACKED = {
    f"{rows} row{'s' if rows > 1 else ''} of {capacity // 2:,} to {capacity:,} tokens": Cell(
        "16 bits",
        Setting(rows, capacity=capacity),
        {
            f"{bits} bits{by}": Setting(rows, kernels=kernels, bits=bits, capacity=capacity)
            for by, kernels in (("", "auto"), (" by MLX's own", _without("attend", "pack_kv")))
            for bits in (8, 4)
        },
    )
    for rows, capacity in ((1, 512), (1, 4096), (32, 512))
}


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
        self._llama, self._setting = llama, setting
        rows, adapters, capacity = setting.rows, setting.adapters, setting.capacity
        with self._set():
            joint = llama.kv_sizes.joint
            self._step = Step(llama, compiled="all")
            self._kv = JointKeyValues(llama) if joint else KeyValues(llama, 0, 0)
            self._kv.fit([capacity] * rows)
        random = np.random.default_rng(0)
        self._offset = random.integers(capacity // 2, capacity, rows).astype(np.int32)
        self._tokens = mx.array(random.integers(0, llama.args.vocab, rows), mx.int32)
        request = GenerateRequest(model="m", prompt="x", temperature=0.8, top_k=50, top_p=0.95)
        self._sampling = sampling_batch([Draw(request, float(u)) for u in random.random(rows)], llama.args.vocab)
        self._adapters = random_adapters(llama, rows, adapters) if adapters else None
        mx.eval(self._kv.stored, self._tokens)
        self.run()

    def run(self) -> float:
        """Milliseconds of a step."""
        with self._set():
            start = time.perf_counter()
            tokens, capacity = self._tokens, self._setting.capacity
            for _ in range(STEPS):
                places = self._kv.pending(self._offset)
                offset = mx.array(self._offset)
                given = ForwardInput(tokens[:, None], offset, capacity, adapters=self._adapters, places=places)
                chosen = self._step(self._kv, given, self._sampling)
                tokens = chosen[0]
                mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            mx.eval(tokens)
            return (time.perf_counter() - start) * 1e3 / STEPS

    @contextmanager
    def _set(self) -> Iterator[None]:
        registry.use(self._setting.kernels)
        self._llama.kv_bits = self._setting.bits
        try:
            yield
        finally:
            registry.use("auto")
            self._llama.kv_bits = 16


def measured(llama: Llama, name: str, cell: Cell, rounds: int) -> list[Row]:
    """The step of a cell and its others by turns, and what the device does of it."""
    loops = {cell.called: Loop(llama, cell.step)}
    loops |= {other: Loop(llama, setting) for other, setting in cell.others.items()}
    found = by_turns({side: loop.run for side, loop in loops.items()}, rounds)
    own, seen = found.pop(cell.called), traced(loops[cell.called].run)
    ours, shares = row(name, "ms", own), list[Row]()
    if seen is not None:
        launches, device_ms = seen[0] // STEPS, seen[1] / STEPS
        ours = replace(ours, launches=launches, device_ms=device_ms)
        shares = [row(f"{name}: share of a step that the device works", "", [device_ms / ms for ms in own])]
    return [
        ours,
        *(row(f"{name}: {other}", "ms", samples) for other, samples in found.items()),
        *(ratio(f"{name}, {other} against {cell.called}", samples, own) for other, samples in found.items()),
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


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--part", action="append", dest="parts", help="the cell of this name alone (1 row, 32 rows, …)")
    options = made.parse_args()
    if of_machine() == "reference":
        print("No GPU that MLX knows: a decode step launches nothing here.", file=sys.stderr)
        return 1
    record = Record("decode-gpu", options.out, device=device())
    llama = random_llama()
    cells, rounds = (CELLS, QUICK) if options.quick else (CELLS | ALONE | PACKED, ROUNDS)
    for name, cell in cells.items():
        if not options.parts or name in options.parts:
            record.part(name, partial(measured, llama, name, cell, rounds))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())

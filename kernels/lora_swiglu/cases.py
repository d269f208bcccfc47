"""Shapes of `lora_swiglu` to check and to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kernels.kernel import Case, Timing, normal, on_device
from kernels.lora.arguments import LoraSides
from kernels.lora.cases import matrices
from kernels.lora_swiglu.arguments import LoraSwigluInput


@dataclass(frozen=True)
class _Shape:
    rows: int
    adapters: int
    inputs: int
    outputs: int
    rank: int
    #: Which layers adapters change, of which they are DoRA's, and which have a bias that it shifts.
    adapted: str = "gate, up"
    dora: str = ""
    shifted: str = ""
    #: Gate and up side by side in one array.
    joint: bool = True
    #: Without an axis of tokens.
    flat: bool = True
    #: How far what the layers made is from 0.
    scale: float = 1.0
    #: No row has an adapter.
    bare: bool = False

    @property
    def label(self) -> str:
        parts = (
            f"{self.rows} rows, {self.adapters - 1} adapters, rank {self.rank}, {self.inputs} → {self.outputs}",
            f"on {self.adapted}",
            *([f"DoRA on {self.dora}"] if self.dora else []),
            *([] if self.joint else ["apart"]),
            *([] if self.scale == 1 else ["far from 0"]),
            *(["no row with one"] if self.bare else []),
        )
        return ", ".join(parts)


_SHAPES = (
    _Shape(1, 2, 8, 40, 1),
    _Shape(5, 4, 512, 640, 8, dora="gate, up", shifted="gate, up"),
    _Shape(3, 3, 100, 300, 3, adapted="gate", joint=False, flat=False),
    _Shape(4, 3, 200, 33, 64, adapted="up"),
    _Shape(3, 3, 96, 70, 24, dora="up", shifted="up", joint=False),
    _Shape(3, 3, 96, 70, 24, dora="gate", flat=False),
    _Shape(2, 3, 70, 60, 50),
    # So many rows that a thread makes several outputs, the last group fewer.
    _Shape(9, 3, 600, 1100, 8),
    _Shape(9, 2, 40, 30, 4, adapted="gate", bare=True),
    # e^−y is beyond float32.
    _Shape(3, 3, 64, 96, 8, scale=100.0),
)


def cases(dtype: mx.Dtype, random: np.random.Generator) -> Iterable[Case]:
    for shape in _SHAPES:
        yield Case(shape.label, _given(shape, dtype, random))


def _given(shape: _Shape, dtype: mx.Dtype, random: np.random.Generator) -> LoraSwigluInput:
    before = (shape.rows,) if shape.flat else (shape.rows, 1)
    x = normal(random, (*before, shape.inputs), dtype)
    whole = normal(random, (*before, 2 * shape.outputs), dtype)
    whole = mx.concatenate([whole[..., : shape.outputs] * shape.scale, whole[..., shape.outputs :]], axis=-1)
    index = np.arange(shape.rows) % shape.adapters if shape.rows > 1 else np.ones(1)
    gate_sides, up_sides = (_sides(shape, layer, dtype, random) for layer in ("gate", "up"))
    return LoraSwigluInput(
        *(x, *_parts(whole, shape), (0, shape.outputs) if shape.joint else (0, 0), shape.outputs),
        *(mx.array(index * (not shape.bare), mx.uint32), gate_sides, up_sides),
    )


def _parts(whole: mx.array, shape: _Shape) -> tuple[mx.array, mx.array]:
    if shape.joint:
        return whole, whole
    return mx.contiguous(whole[..., : shape.outputs]), mx.contiguous(whole[..., shape.outputs :])


def _sides(shape: _Shape, layer: str, dtype: mx.Dtype, random: np.random.Generator) -> LoraSides | None:
    if layer not in shape.adapted:
        return None
    a, b = matrices(random, shape.adapters, shape.inputs, shape.outputs, shape.rank, dtype)
    real, size = (mx.arange(shape.adapters) > 0)[:, None], (shape.adapters, shape.outputs)
    gain = mx.where(real, normal(random, size, dtype), 1) if layer in shape.dora else None
    shift = mx.where(real, normal(random, size, dtype), 0) if layer in shape.shifted else None
    return LoraSides(a, b, gain, shift)


def timings(dtype: mx.Dtype) -> Iterable[Timing]:
    random = np.random.default_rng(0)
    for rows, inputs, outputs in ((1, 896, 4864), (32, 896, 4864), (32, 3584, 18944)):
        gate, up = (LoraSides(*matrices(random, 9, inputs, outputs, 16, dtype)) for _ in range(2))
        x, whole = on_device((rows, inputs), dtype), on_device((rows, 2 * outputs), dtype)
        index = mx.array(1 + np.arange(rows) % 8, mx.uint32)
        used = min(rows, 8) / 9
        moved = x.nbytes + whole.nbytes * 1.5 + used * sum(each.a.nbytes + each.b.nbytes for each in (gate, up))
        yield Timing(
            f"{rows} row{'s' if rows > 1 else ''}, 8 adapters, rank 16, {inputs} → 2 × {outputs}",
            LoraSwigluInput(x, whole, whole, (0, outputs), outputs, index, gate, up),
            int(moved),
        )

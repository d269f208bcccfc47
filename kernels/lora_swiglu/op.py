"""What a row's own adapter adds to gate and up of an MLP, and silu(gate) · up (SwiGLU: Shazeer, 2020)."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import Arrays, Kernel, refuse_dtype
from kernels.lora.arguments import LoraInput, LoraSides
from kernels.lora.op import lora_reference, refuse_lora, times_a
from kernels.lora_swiglu.arguments import LoraSwigluInput
from kernels.lora_swiglu.cases import cases, timings

_BODY = Body(
    "lora_swiglu",
    ("x", "gate", "up", "index", *(f"{side}{layer}" for layer in range(2) for side in LoraSides._fields)),
    ("out",),
    ("packed.h", "low_rank.h"),
)
_THREADS = 512
#: Rows up to which a thread makes one output: a GPU has room for all threadgroups at once, and they end the sooner.
FEW_ROWS = 8


def lora_swiglu(given: LoraSwigluInput) -> mx.array:
    """silu(gate) · up, silu(y) = y / (1 + e^−y), of what `lora` makes of both, (rows, outputs) or (rows, 1, outputs) as
    `x`, in the dtype of `gate`.

    Not differentiated.
    """
    return KERNEL(*given)[0]


def _reference(given: LoraSwigluInput) -> Arrays:
    gate, up = (lora_reference(y)[0] if isinstance(y, LoraInput) else y for y in given.layers)
    return [gate * mx.sigmoid(gate) * up]


def _refuse(given: LoraSwigluInput) -> str | None:
    for y, start in zip((given.gate, given.up), given.starts, strict=True):
        if y.shape[:-1] != given.x.shape[:-1] or y.shape[-1] < start + given.outputs:
            return "shapes"
    if not given.sides or len({sides.a.shape for sides in given.sides}) > 1:
        return "no adapters, or of several shapes"
    adapted = [y for y in given.layers if isinstance(y, LoraInput)]
    if reason := next((reason for y in adapted if (reason := refuse_lora(y))), None):
        return reason
    return refuse_dtype(given.gate, given.up) or refuse_dtype(*(sides.a for sides in given.sides))


def _items(given: LoraSwigluInput) -> int:
    """Outputs of a thread. Each threadgroup reads A of its row's adapter anew, a row of it for each input, and of B a
    column for each output: with many rows it makes as many outputs as there are inputs, so that A is no more than half
    of what is read."""
    rows, inputs = given.x.shape[0], given.x.shape[-1]
    return 1 if rows <= FEW_ROWS else -(-min(inputs, given.outputs) // _THREADS)


def _launch(given: LoraSwigluInput) -> Arrays:
    x, gate, up, starts, outputs, indices, gate_sides, up_sides = given
    a, items = given.sides[0].a, _items(given)
    # What is absent is stood for by an array that is there: a new one would be a launch of its own.
    both = [LoraSides(a, a) if sides is None else sides for sides in (gate_sides, up_sides)]
    return _BODY.launch(
        (x, gate, up, indices, *(a if array is None else array for sides in both for array in sides)),
        template=[
            *(("T", gate.dtype), ("S", a.dtype), ("IN", x.shape[-1]), ("OUT", outputs), ("RANK", a.shape[-1])),
            *(*times_a(a, _THREADS), ("SIMDGROUPS", _THREADS // 32), ("ITEMS", items)),
            *zip(("GATE_ROW", "UP_ROW"), (gate.shape[-1], up.shape[-1]), strict=True),
            *zip(("GATE_START", "UP_START"), starts, strict=True),
            ("ADAPTED", _bits(gate_sides is not None, up_sides is not None)),
            ("GAIN", _bits(*(sides.gain is not None for sides in both))),
            ("SHIFT", _bits(*(sides.shift is not None for sides in both))),
        ],
        groups=(x.shape[0], -(-outputs // (_THREADS * items))),
        threads=_THREADS,
        outputs=[((*x.shape[:-1], outputs), gate.dtype)],
    )


def _bits(gate: bool, up: bool) -> int:
    return int(gate) + 2 * int(up)


KERNEL = Kernel(
    name="lora_swiglu",
    reason="one launch for five: `lora` of gate and of up, copies of their parts of one product, and what gates them",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(LoraSwigluInput(*fields)),
    reference=lambda *fields: _reference(LoraSwigluInput(*fields)),
    refuse=lambda *fields: _refuse(LoraSwigluInput(*fields)),
    cases=cases,
    timings=timings,
    # As of `lora`.
    tolerances={mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2},
)

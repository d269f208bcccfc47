"""What a row's own adapter adds to a layer's output, a residual's addition, and the RMSNorm after it."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype
from kernels.lora.arguments import LoraInput
from kernels.lora.op import lora_reference, refuse_lora, times_a
from kernels.lora_add_rms_norm.cases import cases, timings

_BODY = Body(
    "lora_add_rms_norm",
    ("x", "u", "y", "a", "b", "index", "gain", "shift", "w"),
    ("h", "out"),
    ("common.h", "packed.h", "low_rank.h"),
)
#: Beyond this a thread's part of a row no longer fits its registers.
_WIDEST, _THREADS = 8192, 512


class _Input(NamedTuple):
    x: mx.array
    lora: LoraInput
    weight: mx.array
    eps: float


def lora_add_rms_norm(x: mx.array, update: LoraInput, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """(h, y): h = x + `lora` of `update`, y = h / sqrt(mean(h²) + eps) · weight, in the shape of `x`: (rows, 1, D) or
    (rows, D).

    Not differentiated.
    """
    h, y = KERNEL(x, *update, weight, eps)
    return h, y


def _given(*fields: object) -> _Input:
    x, *lora, weight, eps = fields
    return _Input(x, LoraInput(*lora), weight, eps)  # type: ignore[arg-type]


def _reference(*fields: object) -> Arrays:
    given = _given(*fields)
    h = given.x + lora_reference(given.lora)[0]
    return [h, mx.fast.rms_norm(h, given.weight, given.eps)]


def _refuse(*fields: object) -> str | None:
    x, lora, weight, eps = _given(*fields)
    if x.shape != lora.y.shape:
        return "shapes that are broadcast"
    if x.shape[-1] > _WIDEST:
        return f"width {x.shape[-1]}"
    if reason := refuse_lora(lora) or refuse_dtype(x, lora.y, lora.x, weight):
        return reason
    return None if eps > 0 else "eps is not positive"


def _launch(*fields: object) -> Arrays:
    x, (u, y, a, b, index, gain, shift), weight, eps = _given(*fields)
    rows, width = x.shape[0], x.shape[-1]
    # What is absent is stood for by an array that is there: a new one would be a launch of its own.
    return _BODY.launch(
        (x, u, y, a, b, index, a if gain is None else gain, a if shift is None else shift, weight),
        template=[
            *(("T", x.dtype), ("S", a.dtype), ("D", width), ("IN", u.shape[-1]), ("RANK", a.shape[-1])),
            *(*times_a(a, _THREADS), ("SIMDGROUPS", _THREADS // 32), ("ITEMS", -(-width // _THREADS))),
            *(("GAIN", gain is not None), ("SHIFT", shift is not None), ("EPS", float_bits(eps))),
        ],
        groups=(rows, 1),
        threads=_THREADS,
        outputs=[(x.shape, x.dtype), (x.shape, x.dtype)],
    )


KERNEL = Kernel(
    name="lora_add_rms_norm",
    reason="one launch for two with adapters, or for five: what adapters add to o or down goes into the norm after it",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    # As of `lora`.
    tolerances={mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2},
)

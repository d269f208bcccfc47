"""Scaled dot-product attention of one new token a row over the rows' keys and values, each row as far as it has any."""

from __future__ import annotations

import mlx.core as mx

from kernels.attend.cases import cases, timings
from kernels.backend import Backend
from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype

_BODY = Body("attend", ("q", "keys", "values", "offset"), ("y",), ("packed.h",))
#: Threads of a threadgroup at most. Apple's GPUs take fewer than 1,024 of a kernel that needs many registers.
_THREADS: dict[Backend, int] = {"metal": 512, "cuda": 768, "emulator": 512}
#: Keys that a lane has under way at once.
_DEPTH = 4


def attend(
    q: mx.array, keys: mx.array, values: mx.array, offset: mx.array, *, scale: float, window: int | None = None
) -> mx.array:
    """softmax(scale · q Kᵀ) V, (rows, heads, 1, dim), of queries (rows, heads, 1, dim).

    `keys`, `values`: (slots, kv_heads, capacity, dim), whole as they are stored: row i is in slot i, and reads the
    positions up to `offset[i]`, int32 (rows,); with `window` the last so many of them.
    """
    return KERNEL(q, keys, values, offset, scale, window)[0]


def _reference(
    q: mx.array, keys: mx.array, values: mx.array, offset: mx.array, scale: float, window: int | None
) -> Arrays:
    rows, positions = q.shape[0], mx.arange(keys.shape[2])[None]
    seen = positions <= offset[:, None]
    if window is not None:
        seen = seen & (positions > offset[:, None] - window)
    attention = mx.fast.scaled_dot_product_attention
    return [attention(q, keys[:rows], values[:rows], scale=scale, mask=seen[:, None, None])]


def _pack(dtype: mx.Dtype) -> int:
    return 16 // int(dtype.size)


def _refuse(
    q: mx.array, keys: mx.array, values: mx.array, offset: mx.array, scale: float, window: int | None
) -> str | None:
    if q.ndim != 4 or q.shape[2] != 1:
        return "more than one token a row"
    rows, heads, _, dim = q.shape
    slots, kv_heads = keys.shape[:2]
    if values.shape != keys.shape or slots < rows or heads % kv_heads or keys.shape[3] != dim:
        return "shapes"
    if heads // kv_heads > min(_THREADS.values()) // 32:
        return f"{heads // kv_heads} heads to one of keys"
    if offset.dtype != mx.int32 or offset.shape != (rows,):
        return "offsets that are not int32 (rows,)"
    if reason := refuse_dtype(q, keys, values):
        return reason
    lanes = dim // _pack(q.dtype)
    if dim % _pack(q.dtype) or not 0 < lanes <= 32 or lanes & (lanes - 1):
        return f"heads of {dim}"
    return None if scale > 0 else "a scale that is not positive"


def _launch(
    q: mx.array, keys: mx.array, values: mx.array, offset: mx.array, scale: float, window: int | None
) -> Arrays:
    rows, heads, _, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    splits = max(1, _THREADS.get(KERNEL.backend, 512) // 32 // group)
    return _BODY.launch(
        (q, keys, values, offset),
        template=[
            *(("T", q.dtype), ("DIM", dim), ("GROUP", group), ("KV_HEADS", kv_heads), ("SPLITS", splits)),
            ("DEPTH", _DEPTH),
            *(("PACK", _pack(q.dtype)), ("WINDOW", window or 0), ("SCALE", float_bits(scale))),
        ],
        groups=(rows, kv_heads),
        threads=splits * group * 32,
        outputs=[(q.shape, q.dtype)],
    )


KERNEL = Kernel(
    name="attend",
    reason="rows of different lengths make MLX's own take a mask, and with one it is not fused: a launch for about six",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
)

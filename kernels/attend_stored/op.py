"""Attention of one new token a row over one layer's keys and values as they are stored, each row up to its own."""

from __future__ import annotations

import mlx.core as mx

from kernels import packed_kv
from kernels.attend.op import DEPTH, HEAD_THREADS, pack, unfit
from kernels.attend_stored.arguments import StoredAttention
from kernels.attend_stored.cases import cases, timings
from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype

_BODY = Body("attend_stored", ("q", "keys", "values", "offset", "sinks"), ("y",), ("packed.h", "stored.h", "codes.h"))


def attend_stored(given: StoredAttention) -> mx.array:
    """(rows, heads, 1, dim): softmax(scale · q Kᵀ) V over the positions that each row has. Not differentiated."""
    (y,) = KERNEL(*given)
    return y


def fits(given: StoredAttention) -> bool:
    """Whether the kernel runs here and takes this. Else MLX's own is better off with the positions in use alone."""
    return KERNEL.active and _refuse(given) is None


def _reference(given: StoredAttention) -> Arrays:
    rows, positions = given.q.shape[0], mx.arange(given.keys.shape[2])[None]
    seen = positions <= given.offset[:, None]
    if given.window is not None:
        seen = seen & (positions > given.offset[:, None] - given.window)
    keys, values = given.keys[:rows], given.values[:rows]
    if given.bits < 16:
        dim, dtype = given.q.shape[3], given.q.dtype
        keys, values = (packed_kv.unpack(words, dim, given.bits, dtype) for words in (keys, values))
    y = mx.fast.scaled_dot_product_attention(
        given.q, keys, values, scale=given.scale, mask=seen[:, None, None], sinks=given.sinks
    )
    return [y]


def _refuse(given: StoredAttention) -> str | None:
    q, keys, values, offset, sinks = given.q, given.keys, given.values, given.offset, given.sinks
    dim = q.shape[3]
    width = dim if given.bits == 16 else packed_kv.words_of(dim, given.bits)
    if keys.shape != values.shape or keys.shape[0] < q.shape[0] or keys.shape[3] != width or q.shape[2] != 1:
        return "shapes"
    if offset.dtype != mx.int32 or offset.shape != (q.shape[0],):
        return "offsets that are not int32 (rows,)"
    if given.bits < 16 and (reason := refuse_dtype(keys, values, dtypes=(mx.uint32,))):
        return reason
    kept = (keys, values) if given.bits == 16 else ()
    if reason := refuse_dtype(*(array for array in (q, sinks, *kept) if array is not None)):
        return reason
    if reason := unfit(q.shape[1], keys.shape[1], dim, q.dtype, given.bits):
        return reason
    return None if given.scale > 0 else "a scale that is not positive"


def _launch(given: StoredAttention) -> Arrays:
    q, keys = given.q, given.keys
    heads, kv_heads, dim, bits = q.shape[1], keys.shape[1], q.shape[3], given.bits
    grouped = dim if bits == 16 else packed_kv.group_of(dim, bits)
    return _BODY.launch(
        # What is absent is stood for by an array that is there: a new one would be a launch of its own.
        (q, keys, given.values, given.offset, q if given.sinks is None else given.sinks),
        template=[
            *(("T", q.dtype), ("DIM", dim), ("BITS", bits), ("WIDTH", keys.shape[3]), ("GROUPED", grouped)),
            *(("GROUP", heads // kv_heads), ("KV_HEADS", kv_heads), ("SPLITS", HEAD_THREADS // 32), ("DEPTH", DEPTH)),
            *(("PACK", pack(q.dtype, bits)), ("WINDOW", given.window or 0), ("SCALE", float_bits(given.scale))),
            ("SINKS", given.sinks is not None),
        ],
        groups=(q.shape[0], heads),
        threads=HEAD_THREADS,
        outputs=[(q.shape, q.dtype)],
    )


KERNEL = Kernel(
    name="attend_stored",
    reason="rows of different lengths make MLX's own take a mask, and with one it is not fused: one launch for seven",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(StoredAttention(*fields)),
    reference=lambda *fields: _reference(StoredAttention(*fields)),
    refuse=lambda *fields: _refuse(StoredAttention(*fields)),
    cases=cases,
    timings=timings,
)

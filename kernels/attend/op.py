"""Attention of one new token a row, from the projections on: norms, rotation, and what is stored, each row as far as it
has any."""

from __future__ import annotations

import mlx.core as mx

from kernels.attend.arguments import AttendInput
from kernels.attend.cases import cases, timings
from kernels.backend import Backend
from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype

_BODY = Body(
    "attend",
    ("q", "k", "v", "stored", "fresh", "offset", "period", "q_weight", "k_weight"),
    ("y", "made"),
    ("packed.h",),
)
#: Threads of a threadgroup at most. Apple's GPUs take fewer than 1,024 of a kernel that needs many registers.
_THREADS: dict[Backend, int] = {"metal": 512, "cuda": 768, "emulator": 512}
#: Keys that a lane has under way at once.
_DEPTH = 4


def attend(given: AttendInput) -> tuple[mx.array, mx.array]:
    """(rows, heads · dim): softmax(scale · q Kᵀ) V over what is stored and the new token. And `fresh` with this layer's
    new keys and values behind it, (rows, heads, dim): they are the caller's to store."""
    y, made = KERNEL(*given)
    return y, made


def unfit(heads: int, kv_heads: int, dim: int, dtype: mx.Dtype) -> str | None:
    """Why the body cannot take heads of this kind, or None."""
    if heads % kv_heads or heads // kv_heads > min(_THREADS.values()) // 32:
        return f"{heads} heads over {kv_heads} of keys"
    lanes = dim // _pack(dtype)
    fits = dim % _pack(dtype) == 0 and dim % 2 == 0 and 0 < lanes <= 32 and not lanes & (lanes - 1)
    return None if fits else f"heads of {dim}"


def _reference(given: AttendInput) -> Arrays:
    rows, dim, kv_heads, offset = given.q.shape[0], given.stored.shape[3], given.kv_heads, given.offset
    counts = (given.heads, kv_heads, kv_heads)
    queries, keys, values = (
        x[:, start : start + count * dim].reshape(rows, count, 1, dim)
        for x, start, count in zip((given.q, given.k, given.v), given.starts, counts, strict=True)
    )
    queries = _turned(queries, given.q_weight, given)
    keys = _turned(keys, given.k_weight, given)
    first = 0 if given.fresh is None else given.fresh.shape[1]
    layer = given.stored[:rows, first : first + 2 * kv_heads]
    positions = mx.arange(layer.shape[2])[None]
    seen = positions < offset[:, None]
    if given.window is not None:
        seen = seen & (positions > offset[:, None] - given.window)
    y = mx.fast.scaled_dot_product_attention(
        queries,
        mx.concatenate([layer[:, :kv_heads], keys], axis=2),
        mx.concatenate([layer[:, kv_heads:], values], axis=2),
        scale=given.scale,
        mask=mx.concatenate([seen, mx.ones((rows, 1), mx.bool_)], axis=1)[:, None, None],
    )
    before = [] if given.fresh is None else [given.fresh]
    return [y.reshape(rows, -1), mx.concatenate([*before, keys[:, :, 0], values[:, :, 0]], axis=1)]


def _turned(x: mx.array, weight: mx.array | None, given: AttendInput) -> mx.array:
    x = x if weight is None else mx.fast.rms_norm(x, weight, given.eps)
    offset, periods = given.offset, given.period
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)


def _pack(dtype: mx.Dtype) -> int:
    return 16 // int(dtype.size)


def _refuse(given: AttendInput) -> str | None:
    q, stored, fresh, offset = given.q, given.stored, given.fresh, given.offset
    rows = q.shape[0]
    first = 0 if fresh is None else fresh.shape[1]
    if stored.shape[0] < rows or first + 2 * given.kv_heads > stored.shape[1]:
        return "shapes"
    if offset.dtype != mx.int32 or offset.shape != (rows,):
        return "offsets that are not int32 (rows,)"
    if given.period.dtype != mx.float32:
        return f"periods of dtype {given.period.dtype}"
    found = (q, given.k, given.v, stored, fresh, given.q_weight, given.k_weight)
    if reason := refuse_dtype(*(array for array in found if array is not None)):
        return reason
    if reason := unfit(given.heads, given.kv_heads, stored.shape[3], q.dtype):
        return reason
    return None if given.scale > 0 else "a scale that is not positive"


def _launch(given: AttendInput) -> Arrays:
    q, k, v, stored, fresh, offset, period, q_weight, k_weight = given[:9]
    rows, dim, group = q.shape[0], stored.shape[3], given.heads // given.kv_heads
    splits = max(1, _THREADS.get(KERNEL.backend, 512) // 32 // group)
    made = (0 if fresh is None else fresh.shape[1]) + 2 * given.kv_heads
    # What is absent is stood for by an array that is there: a new one would be a launch of its own.
    absent = (stored if fresh is None else fresh, *(period if each is None else each for each in (q_weight, k_weight)))
    return _BODY.launch(
        (q, k, v, stored, absent[0], offset, period, *absent[1:]),
        template=[
            *(("T", q.dtype), ("DIM", dim), ("GROUP", group), ("KV_HEADS", given.kv_heads), ("SPLITS", splits)),
            *(("DEPTH", _DEPTH), ("PACK", _pack(q.dtype)), ("WINDOW", given.window or 0)),
            *(("SCALE", float_bits(given.scale)), ("EPS", float_bits(given.eps))),
            *(("NORM", q_weight is not None), ("FIRST", fresh is None)),
            *zip(("Q_ROW", "K_ROW", "V_ROW"), (x.shape[1] for x in (q, k, v)), strict=True),
            *zip(("Q_START", "K_START", "V_START"), given.starts, strict=True),
        ],
        groups=(rows, given.kv_heads),
        threads=splits * group * 32,
        outputs=[((rows, given.heads * dim), q.dtype), ((rows, made, dim), q.dtype)],
    )


KERNEL = Kernel(
    name="attend",
    reason="rows of different lengths make MLX's own take a mask, and with one it is not fused: a launch for some nine",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(AttendInput(*fields)),
    reference=lambda *fields: _reference(AttendInput(*fields)),
    refuse=lambda *fields: _refuse(AttendInput(*fields)),
    cases=cases,
    timings=timings,
    # The rotation's angle is rounded as in `rope`, and turned queries and keys are rounded before they are multiplied.
    tolerances={mx.float32: 5e-4, mx.float16: 5e-3, mx.bfloat16: 3e-2},
)

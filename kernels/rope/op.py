"""Rotary positions (Su et al., 2021) of one new token a row: queries and keys in one launch, with their norms."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype
from kernels.rope.arguments import RopeInput
from kernels.rope.cases import cases, timings

_BODY = Body("rope", ("q", "k", "offset", "period", "q_weight", "k_weight"), ("queries", "keys"))
_THREADS = 256


def rope(given: RopeInput) -> tuple[mx.array, mx.array]:
    """Queries (rows, heads, 1, dim) and keys (rows, kv_heads, 1, dim), rotated by each row's position."""
    queries, keys = KERNEL(*given)
    return queries, keys


def _reference(given: RopeInput) -> Arrays:
    q, k, offset, period, q_weight, k_weight, eps = given
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = x if weight is None else mx.fast.rms_norm(x, weight, eps)
        heads = normed[:, :, None]
        rotated.append(
            mx.fast.rope(heads, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=period)
        )
    return rotated


def _refuse(given: RopeInput) -> str | None:
    q, k, offset, period, q_weight, k_weight, _ = given
    if q.shape[-1] % 2 or q.shape[-1] > 512:
        return f"head of {q.shape[-1]}"
    if offset.dtype != mx.int32 or offset.shape != q.shape[:1]:
        return "offsets that are not int32 (rows,)"
    if period.dtype != mx.float32:
        return f"periods of dtype {period.dtype}"
    return refuse_dtype(*(array for array in (q, k, q_weight, k_weight) if array is not None))


def _launch(given: RopeInput) -> Arrays:
    q, k, offset, period, q_weight, k_weight, eps = given
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    return _BODY.launch(
        (q, k, offset, period, period if q_weight is None else q_weight, period if k_weight is None else k_weight),
        template=[
            *(("T", q.dtype), ("HEADS", heads), ("KV_HEADS", kv_heads), ("DIM", dim), ("ITEMS", -(-dim // 64))),
            *(("NORM", q_weight is not None), ("EPS", float_bits(eps))),
        ],
        groups=(rows, -(-(heads + kv_heads) // (_THREADS // 32))),
        threads=_THREADS,
        outputs=[((rows, heads, 1, dim), q.dtype), ((rows, kv_heads, 1, dim), q.dtype)],
    )


KERNEL = Kernel(
    name="rope",
    reason="one launch for two, or for four where heads are normed (Qwen3)",
    bodies=(_BODY,),
    launch=lambda *fields: _launch(RopeInput(*fields)),
    reference=lambda *fields: _reference(RopeInput(*fields)),
    refuse=lambda *fields: _refuse(RopeInput(*fields)),
    cases=cases,
    timings=timings,
    # cos and sin of some thousand radians differ by the rounding of the angle itself.
    tolerances={mx.float32: 5e-4, mx.float16: 3e-3, mx.bfloat16: 2e-2},
)

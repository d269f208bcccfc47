"""Rotary positions (Su et al., 2021) of one new token a row: queries and keys in one launch, with their norms."""

from __future__ import annotations

import mlx.core as mx

from kernels.body import Body
from kernels.kernel import Arrays, Kernel, float_bits, refuse_dtype
from kernels.rope.cases import cases, timings

_BODY = Body("rope", ("q", "k", "offset", "period", "q_weight", "k_weight"), ("queries", "keys"))
_THREADS = 256


def rope(
    q: mx.array,
    k: mx.array,
    offset: mx.array,
    period: mx.array,
    *,
    weights: tuple[mx.array, mx.array] | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array]:
    """Queries (rows, heads, 1, dim) and keys (rows, kv_heads, 1, dim), rotated by each row's position.

    `q`: (rows, heads, dim) and `k`: (rows, kv_heads, dim), as the projections make them; `offset`: int32 (rows,);
    `period`: float32 (dim / 2,): the pair i, i + dim / 2 turns by offset / period[i]. `weights` are those (dim,) of an
    RMSNorm over each head of q and of k before that (Qwen3).
    """
    q_weight, k_weight = weights or (None, None)
    queries, keys = KERNEL(q, k, offset, period, q_weight, k_weight, eps)
    return queries, keys


def _reference(
    q: mx.array,
    k: mx.array,
    offset: mx.array,
    period: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    eps: float,
) -> Arrays:
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = x if weight is None else mx.fast.rms_norm(x, weight, eps)
        heads = normed[:, :, None]
        rotated.append(
            mx.fast.rope(heads, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=period)
        )
    return rotated


def _refuse(
    q: mx.array,
    k: mx.array,
    offset: mx.array,
    period: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    eps: float,
) -> str | None:
    if q.shape[-1] % 2 or q.shape[-1] > 512:
        return f"head of {q.shape[-1]}"
    if offset.dtype != mx.int32 or offset.shape != q.shape[:1]:
        return "offsets that are not int32 (rows,)"
    if period.dtype != mx.float32:
        return f"periods of dtype {period.dtype}"
    return refuse_dtype(*(array for array in (q, k, q_weight, k_weight) if array is not None))


def _launch(
    q: mx.array,
    k: mx.array,
    offset: mx.array,
    period: mx.array,
    q_weight: mx.array | None,
    k_weight: mx.array | None,
    eps: float,
) -> Arrays:
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
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    # cos and sin of some thousand radians differ by the rounding of the angle itself.
    tolerances={mx.float32: 5e-4, mx.float16: 3e-3, mx.bfloat16: 2e-2},
)

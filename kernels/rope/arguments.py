"""What `rope` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class RopeInput(NamedTuple):
    """One new token a row. A tuple, as `Kernel` is called with its fields one by one.

    `q`: (rows, heads, dim) and `k`: (rows, kv_heads, dim), as the projections make them; `offset`: int32 (rows,);
    `period`: float32 (dim / 2,): the pair i, i + dim / 2 turns by offset / period[i]. `q_weight` and `k_weight` are
    those (dim,) of an RMSNorm over each head of q and of k before that (Qwen3); both or neither.
    """

    q: mx.array
    k: mx.array
    offset: mx.array
    period: mx.array
    q_weight: mx.array | None = None
    k_weight: mx.array | None = None
    eps: float = 1e-6

"""What `attend` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels.lora.arguments import LoraSides


class AttendAdapters(NamedTuple):
    """Low-rank adapters of q, k and v, of one rank; None where a layer is not changed.

    `x`: (rows, in), what was projected; `indices`: int32 or uint32 (rows,), 0 for rows without adapter, as in `lora`.
    """

    x: mx.array
    indices: mx.array
    sides: tuple[LoraSides | None, LoraSides | None, LoraSides | None]


class AttendInput(NamedTuple):
    """One new token a row. A tuple, as `Kernel` is called with its fields one by one.

    `q`, `k`, `v`: (rows, width) each, as the projections make them, from `starts` on; they may be one array.
    `stored`: (heads, positions, width), some layers' keys and values as they are kept: a layer has `kv_heads` of keys,
    then as many of values. Row i reads `offset[i]` positions, int32 (rows,), with `window` the last window − 1 of them;
    its new token comes behind them. `segment[i]`, int32 (rows, 3), says where they lie: where those begin that it
    shares with other rows, how many it shares, none perhaps, and where those begin that come behind them and are its
    own. What a row gets is the same, bit for bit, however many it shares.
    `bits`: 16: numbers are kept as they are, width = dim. 8 or 4: packed, uint32 (`kernels.packed_kv`).
    `fresh`: (rows, heads, width), what this gave for the layers before it in `stored`; None for the first.
    `period`: float32 (dim / 2,): the pair i, i + dim / 2 turns by offset / period[i]. `q_weight` and `k_weight` are
    those (dim,) of an RMSNorm over each head of q and of k before that (Qwen3); both or neither.
    `adapters`: what the rows' own add to q, k and v first; None: nothing.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    stored: mx.array
    fresh: mx.array | None
    segment: mx.array
    offset: mx.array
    period: mx.array
    q_weight: mx.array | None
    k_weight: mx.array | None
    starts: tuple[int, int, int]
    heads: int
    kv_heads: int
    scale: float
    eps: float = 1e-6
    window: int | None = None
    adapters: AttendAdapters | None = None
    bits: int = 16

    @property
    def dim(self) -> int:
        """Numbers of a head."""
        return 2 * self.period.shape[0]

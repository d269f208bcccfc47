"""What `attend_stored` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class StoredAttention(NamedTuple):
    """One new token a row. A tuple, as `Kernel` is called with its fields one by one.

    `q`: (rows, heads, 1, dim). `keys`, `values`: (slots, kv_heads, capacity, width), one layer's as they are kept; row
    i is in slot i, and reads the positions up to its new token's, `offset[i]`, int32 (rows,), with `window` the last
    `window` of them. `sinks`: (heads,), scores without a value that take their share of the weights (gpt-oss), or None.
    `bits`: 16: numbers are kept as they are, width = dim. 8 or 4: packed, uint32 (`kernels.packed_kv`).
    """

    q: mx.array
    keys: mx.array
    values: mx.array
    offset: mx.array
    scale: float
    window: int | None = None
    sinks: mx.array | None = None
    bits: int = 16

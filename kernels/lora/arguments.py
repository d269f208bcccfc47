"""What `lora` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class LoraSides(NamedTuple):
    """What the adapters of a batch change in one layer, as in `LoraInput`."""

    a: mx.array
    b: mx.array
    gain: mx.array | None = None
    shift: mx.array | None = None


class LoraInput(NamedTuple):
    """A batch of one layer. A tuple, as `Kernel` is called with its fields one by one.

    `x`: (rows, T, IN), the layer's input; `y`: (rows, T, OUT), what the layer made of it; the body takes T = 1, which
    both may leave out.
    `a`: (adapters, IN, rank); `b`: (adapters, rank, OUT), scale and DoRA's gain folded in; `gain`, `shift`:
    (adapters, OUT), 1 and 0 where absent.
    `indices`: int32 or uint32 (rows,), 0 for rows without adapter: row 0 of `a`, `b` and `shift` must be zero and that
    of `gain` one, as the reference reads them and the kernel does not.
    """

    x: mx.array
    y: mx.array
    a: mx.array
    b: mx.array
    indices: mx.array
    gain: mx.array | None = None
    shift: mx.array | None = None

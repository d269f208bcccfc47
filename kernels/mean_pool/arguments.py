"""What `mean_pool` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class MeanPoolInput(NamedTuple):
    """A batch of texts. A tuple, as `Kernel` is called with its fields one by one.

    `x`, `residual`: (texts, tokens, D) of one dtype; `weight`, `bias`: (D,) of that dtype; `lengths`: int32 (texts,),
    from 1 to tokens: padding is on the right. `gradient`: whether the result may be differentiated.
    """

    x: mx.array
    residual: mx.array
    weight: mx.array
    bias: mx.array
    lengths: mx.array
    eps: float
    normalize: bool = True
    gradient: bool = True

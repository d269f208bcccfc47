"""Products with the experts of a mixture on a CPU: rows of one expert in blocks."""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge import package

#: Rows of a block. A row at a time reads the whole matrix of its expert again; larger blocks are padded more. Of 16
#: experts 768 wide, 1,024 rows took a fifth of the time of single rows with 8, and 64 rows two thirds.
BLOCK = 8


def in_blocks(x: mx.array, weight: mx.array, experts: mx.array) -> mx.array:
    """x[i] @ weight[experts[i]] for rows x (P, 1, D), weights (E, D, F) and experts (P,) in ascending order; (P, 1, F).

    The rows of each expert are laid out in blocks of its own, the last one padded, so that MLX multiplies a block at a
    time. There are as many blocks as there could be of any choice of experts: nothing has to be evaluated for it.
    """
    rows, count = experts.shape[0], weight.shape[0]
    most = min(rows, -(-rows // BLOCK) + count)
    each = (experts[:, None] == mx.arange(count)).sum(axis=0)
    ends = mx.cumsum((each + (BLOCK - 1)) // BLOCK)
    first_block = mx.concatenate([mx.zeros(1, ends.dtype), ends[:-1]])
    first_row = mx.cumsum(each) - each
    index = (first_block * BLOCK - first_row)[experts] + mx.arange(rows)
    source = mx.zeros(most * BLOCK, mx.int32)
    source[index] = mx.arange(rows)
    owner = mx.minimum((mx.arange(most)[:, None] >= ends).sum(axis=1), count - 1)
    blocks = x[:, 0][source].reshape(most, BLOCK, -1)
    product = mx.gather_mm(blocks, weight, rhs_indices=owner, sorted_indices=True)
    return product.reshape(most * BLOCK, 1, -1)[index]


@functools.cache
def _blocked() -> type[Any]:
    """mlx-lm's dense experts, which multiply rows that are sorted by their experts in blocks."""
    plain: type[Any] = package.load("switch_layers").SwitchLinear

    class BlockedLinear(plain):
        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            if not sorted_indices or indices.ndim != 1:
                result: mx.array = super().__call__(x, indices, sorted_indices=sorted_indices)
                return result
            y = in_blocks(x, self["weight"].swapaxes(-1, -2), indices)
            return y + self["bias"][indices][:, None] if "bias" in self else y

    BlockedLinear.__name__ = plain.__name__
    return BlockedLinear


def block(network: nn.Module) -> None:
    """Let the dense experts of a network multiply in blocks."""
    plain = package.load("switch_layers").SwitchLinear
    for module in network.modules():
        if type(module) is plain:
            module.__class__ = _blocked()

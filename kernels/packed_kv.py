"""Keys and values in 8 or 4 bits: the numbers of a head in groups, each with a step and a least number of its own.

A head's numbers of one token lie together as words of 32 bits: the numbers, then a word for each group, whose halves
are its step and its least number (float16). So what keeps keys and values moves, cuts and stores these as it does any
others; and what a token has here depends on no other token.
"""

from __future__ import annotations

import math

import mlx.core as mx

#: By bits, numbers of a group at most. A word for so many makes 8 bits 8.5, and 4 bits 5: with groups of 64 these have
#: two thirds more of an error in perplexity, for a tenth less (SmolLM2).
GROUPS = {8: 64, 4: 32}
#: Numbers of a head that a lane of a kernel has: with 4 bits they fill a word.
LANE_NUMBERS = 8
#: A group fills words.
_LEAST_GROUP = 8


def group_of(size: int, bits: int) -> int:
    """Numbers of a group of heads of `size`."""
    return math.gcd(size, GROUPS[bits])


def fits(size: int, bits: int) -> bool:
    """Whether heads of `size` numbers can be packed."""
    return group_of(size, bits) >= _LEAST_GROUP


def words_of(size: int, bits: int) -> int:
    """Words of one head of one token."""
    return size * bits // 32 + size // group_of(size, bits)


def pack(x: mx.array, bits: int) -> mx.array:
    """uint32 (…, words) of numbers (…, size). Each group's least and greatest number bound the others; one that is not
    finite makes its whole group so."""
    *outer, size = x.shape
    groups = x.astype(mx.float32).reshape(*outer, -1, group_of(size, bits))
    least = groups.min(axis=-1, keepdims=True).astype(mx.float16)
    step = ((groups.max(axis=-1, keepdims=True) - least) / (2**bits - 1)).astype(mx.float16)
    inverse = mx.where(step > 0, 1 / step.astype(mx.float32), 0)
    codes = mx.clip(mx.round((groups - least) * inverse), 0, 2**bits - 1).astype(mx.uint8).reshape(*outer, size)
    if bits == 4:
        codes = codes[..., ::2] | codes[..., 1::2] << 4
    forms = mx.concatenate([step, least], axis=-1).view(mx.uint32).reshape(*outer, -1)
    return mx.concatenate([codes.view(mx.uint32), forms], axis=-1)


def unpack(words: mx.array, size: int, bits: int, dtype: mx.Dtype) -> mx.array:
    """The numbers (…, size) that words (…, words) stand for."""
    outer, count = words.shape[:-1], size * bits // 32
    codes = words[..., :count].view(mx.uint8)
    if bits == 4:
        codes = mx.stack([codes & 15, codes >> 4], axis=-1)
    forms = words[..., count:].view(mx.float16).reshape(*outer, -1, 2).astype(mx.float32)
    groups = codes.reshape(*outer, -1, group_of(size, bits)).astype(mx.float32)
    return (groups * forms[..., :1] + forms[..., 1:]).reshape(*outer, size).astype(dtype)

"""Rotary positions (Su et al., 2021) of one new token a row: queries and keys in one launch, with their norms."""

from kernels.rope.arguments import RopeInput
from kernels.rope.op import KERNEL, rope

__all__ = ["KERNEL", "RopeInput", "rope"]

"""Attention of one new token a row over what is stored, for models whose layers do the rest themselves."""

from kernels.attend_stored.arguments import StoredAttention
from kernels.attend_stored.op import KERNEL, attend_stored, fits

__all__ = ["KERNEL", "StoredAttention", "attend_stored", "fits"]

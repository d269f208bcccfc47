"""Scaled dot-product attention of one new token a row over the rows' keys and values, each row as far as it has any."""

from kernels.attend.op import KERNEL, attend

__all__ = ["KERNEL", "attend"]

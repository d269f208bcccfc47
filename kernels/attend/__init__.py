"""Attention of one new token a row, from the projections on (rotation: Su et al., 2021)."""

from kernels.attend.arguments import AttendAdapters, AttendInput
from kernels.attend.op import KERNEL, attend, unfit

__all__ = ["KERNEL", "AttendAdapters", "AttendInput", "attend", "unfit"]

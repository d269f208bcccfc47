"""A residual's addition and the RMSNorm after it (Zhang and Sennrich, 2019), as between a decoder's parts."""

from kernels.add_rms_norm.op import KERNEL, add_rms_norm

__all__ = ["KERNEL", "add_rms_norm"]

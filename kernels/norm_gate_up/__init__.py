"""A residual's addition, the RMSNorm after it, and the gated products that read it, of a few rows (Shazeer, 2020)."""

from kernels.norm_gate_up.op import KERNEL, norm_gate_up, takes

__all__ = ["KERNEL", "norm_gate_up", "takes"]

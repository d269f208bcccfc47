"""What adapters add to a layer's output, a residual's addition, and the RMSNorm after it (Zhang, Sennrich, 2019)."""

from kernels.lora_add_rms_norm.op import KERNEL, lora_add_rms_norm

__all__ = ["KERNEL", "lora_add_rms_norm"]

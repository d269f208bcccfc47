"""What adapters add to gate and up of a gated MLP (SwiGLU: Shazeer, 2020), and silu(gate) · up."""

from kernels.lora_swiglu.arguments import LoraSwigluInput
from kernels.lora_swiglu.op import KERNEL, lora_swiglu

__all__ = ["KERNEL", "LoraSwigluInput", "lora_swiglu"]

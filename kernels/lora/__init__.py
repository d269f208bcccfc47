"""LoRA (Hu et al., 2021) and DoRA (Liu et al., 2024) of a batch in which each row has its own adapter or none."""

from kernels.lora.arguments import LoraInput, LoraSides
from kernels.lora.op import KERNEL, lora

__all__ = ["KERNEL", "LoraInput", "LoraSides", "lora"]

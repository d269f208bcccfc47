"""Every fused kernel, by name."""

from __future__ import annotations

from kernels import add_layer_norm, add_rms_norm, attend, lora, mean_pool, rope, sample
from kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL
    for module in (sample, attend, lora, add_rms_norm, add_layer_norm, mean_pool, rope)
}
NAMES = tuple(KERNELS)

"""The end of a sentence encoder: the last addition and LayerNorm, the mean over the real tokens, the L2 norm."""

from kernels.mean_pool.arguments import MeanPoolInput
from kernels.mean_pool.op import KERNEL, mean_pool

__all__ = ["KERNEL", "MeanPoolInput", "mean_pool"]

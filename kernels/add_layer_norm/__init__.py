"""A residual's addition and the LayerNorm after it (Ba et al., 2016), as between an encoder's parts."""

from kernels.add_layer_norm.op import KERNEL, add_layer_norm

__all__ = ["KERNEL", "add_layer_norm"]

"""From logits to tokens without a sort."""

from kernels.sample.arguments import Penalties, SampleInput
from kernels.sample.op import KERNEL, Sampled, sample
from kernels.sample.reference import FAINTEST, adjusted

__all__ = ["FAINTEST", "KERNEL", "Penalties", "SampleInput", "Sampled", "adjusted", "sample"]

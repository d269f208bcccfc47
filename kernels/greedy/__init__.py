"""The likeliest token of each row, with its logit and log-probability."""

from kernels.greedy.op import KERNEL, greedy

__all__ = ["KERNEL", "greedy"]

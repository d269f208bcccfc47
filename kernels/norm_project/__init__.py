"""A residual's addition, the RMSNorm after it, and the product that reads it, of a few rows."""

from kernels.norm_project.op import KERNEL, ProjectInput, norm_project, takes

__all__ = ["KERNEL", "ProjectInput", "norm_project", "takes"]

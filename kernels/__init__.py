"""Fused kernels: bodies, references, back-ends.

This module imports nothing: transformers probes any installed package called `kernels` for its version, and that
probe must neither load MLX nor fail.
"""

__version__ = "0.1.0"

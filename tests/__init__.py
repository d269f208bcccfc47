"""Tests. The fast BLAS comes before them: MLX takes the one that is there when it is first imported, by any test."""

from engine.platform import blas

blas.boot(1)

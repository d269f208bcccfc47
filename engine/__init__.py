"""The warm model: weights, tokenizers, architectures, generation, embedding and training.

Knows neither Redis nor Celery. This module imports nothing: `engine.platform.blas` has to run before MLX is loaded.
"""

"""The warm model: weights, tokenizers, architectures, generation, embedding and training.

Knows neither Redis nor Celery. This module imports nothing, so that `engine.blas` can run before MLX is loaded.
"""

"""Decoders that mlx-lm has a model file for, run over Stoker's own keys and values, adapters and trainer."""

"""Continuous batching: one running batch for all generation jobs of a model."""

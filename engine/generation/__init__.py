"""Continuous batching: one running batch for all generation jobs of a model.

Who does what in which order: docs/architecture.md#a-step-of-the-generation-lane.
"""

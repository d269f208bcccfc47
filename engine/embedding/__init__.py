"""Embedding: the texts of all waiting jobs share batches."""

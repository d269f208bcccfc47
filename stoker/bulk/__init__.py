"""Bulk embedding with resumable output: many jobs in flight, vectors in order, files that a later run continues."""

"""Embedding without end: many jobs in flight, in order, and files that a broken-off run goes on with."""

"""Benchmarks: `make bench-all`. Timings live here, never in tests."""

"""Runs the Metal text of a kernel on a Linux CPU, with checks: for tests and for `stoker kernels check` without a GPU.

`trace` takes the text from MLX itself, `build` compiles it with g++ against a small stand-in for Metal's library, `run`
executes it with random schedules and reports races, accesses out of bounds, reads of what nobody wrote, outputs left
unwritten and barriers that not all threads reach. It says nothing of speed, of register limits or of a GPU's rounding.
"""

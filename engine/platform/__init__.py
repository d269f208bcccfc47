"""What the engine takes from the machine: processes with limits, native libraries, the heap, files, MLX's device."""

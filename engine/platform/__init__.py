"""What the engine takes from the operating system: processes with limits, native libraries, the heap."""

"""The same bodies for NVIDIA: Metal's vocabulary in CUDA, and the attributes that MLX declares on Metal alone."""

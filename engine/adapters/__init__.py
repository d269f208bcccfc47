"""LoRA adapters: on disk, in memory, and in the forward pass."""

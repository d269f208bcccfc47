"""LoRA training on the resident base, one step at a time."""

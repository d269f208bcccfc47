"""Weight files: safetensors and GGUF, every field checked before it is used."""

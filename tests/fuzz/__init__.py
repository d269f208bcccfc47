"""Random input against a real broker and a real worker, next to a stream that must stay right. `make fuzz`."""

"""Files: texts in, vectors out, and writes that are whole or not at all."""

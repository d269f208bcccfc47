"""Models on disk: where they are, what they say, whether they are whole, and how they become warm."""

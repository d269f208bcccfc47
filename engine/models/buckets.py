"""The few sizes in which rows, tokens and positions come, so that few shapes are ever compiled."""

from __future__ import annotations


def bucket(least: int, smallest: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16 … that is at least `least` and `smallest`: at most half too much."""
    size = max(1, least, smallest)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= size else power

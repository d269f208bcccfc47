"""How much to take on in one step, so that a step lasts about as long as other lanes can wait."""

from __future__ import annotations


class EmbedPacer:
    """Tokens for the next step: what this machine has lately done in `seconds`, between `least` and `most`."""

    def __init__(self, seconds: float, least: int, most: int) -> None:
        self._seconds, self._least, self._most = seconds, least, max(least, most)
        self._rate = 0.0

    @property
    def tokens(self) -> int:
        return min(self._most, max(self._least, int(self._rate * self._seconds)))

    def note(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` took `seconds`."""
        rate = tokens / max(seconds, 1e-9)
        # Follows within a few steps; one slow step, that compiled a new shape, does not halve the next ones.
        self._rate = rate if not self._rate else 0.75 * self._rate + 0.25 * rate

"""Stop strings in a stream: found across the borders of tokens, and never half shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through as soon as it cannot be the beginning of a stop string any more.

    A stop string may hold names of special tokens. Such a name is looked at and never shown.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        #: For each character of `_held` whether it is shown; empty while all are.
        self._shown: list[bool] = []

    def add(self, text: str, hidden: str = "") -> tuple[str, str | None]:
        """What may be shown now of `text`, and the stop string that was completed: the first by position, of those the
        longest. `hidden` is the name of a special token that follows `text`."""
        if not self._stops:
            return text, None
        if hidden or self._shown:
            known = self._shown or [True] * len(self._held)
            self._shown = known + [True] * len(text) + [False] * len(hidden)
        self._held += text + hidden
        found = [(position, -len(stop), stop) for stop in self._stops if (position := self._held.find(stop)) >= 0]
        if found:
            position, _, stop = min(found)
            before = self._take(position)
            self._held, self._shown = "", []
            return before, stop
        return self._take(len(self._held) - self._beginning(self._held)), None

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return self._take(len(self._held))

    def _take(self, length: int) -> str:
        """The first `length` characters of what is held, without what is not shown."""
        taken, shown = self._held[:length], self._shown[:length]
        self._held, self._shown = self._held[length:], self._shown[length:]
        if all(self._shown):
            self._shown = []
        return taken if not shown else "".join(letter for letter, seen in zip(taken, shown, strict=True) if seen)

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0

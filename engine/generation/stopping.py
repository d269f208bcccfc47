"""Stop strings in a stream: found across the borders of tokens, and never half shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through as soon as it cannot be the beginning of a stop string any more."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """What may be shown now, and the stop string that was completed: the first by place, of those the longest."""
        if not self._stops:
            return text, None
        whole = self._held + text
        found = [(place, -len(stop), stop) for stop in self._stops if (place := whole.find(stop)) >= 0]
        if found:
            place, _, stop = min(found)
            self._held = ""
            return whole[:place], stop
        held = self._beginning(whole)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held], None

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0

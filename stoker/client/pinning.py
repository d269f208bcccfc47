"""Waiting for what the workers say of a prefix that was pinned just now. No input or output."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from stoker.client.following import checked_timeout
from stoker.contract.kinds import GENERATE
from stoker.contract.presence import REFUSED, PrefixState, Presence

#: Seconds between two looks: at first, and at the longest.
FIRST_LOOK, LONGEST_LOOK = 0.05, 1.0


class Verdict:
    """Of all workers that hold the model. `timeout`: seconds, None: no limit; a worker that has said nothing by then
    does not count: it is of an earlier release, or busy. Raises `InvalidRequest` for a `timeout` that is no time."""

    def __init__(self, model: str, pin: str, timeout: float | None) -> None:
        self._model, self._pin = model, pin
        seconds = checked_timeout(timeout)
        self._until, self._pause = time.monotonic() + (math.inf if seconds is None else seconds), FIRST_LOOK
        #: Worker → what it says.
        self.said: dict[str, PrefixState] = {}

    def heard(self, alive: Iterable[Presence]) -> bool:
        """Whether there is nothing more to wait for."""
        holding = {worker.worker: worker for worker in alive if self._holds(worker)}
        self.said = {
            name: state for name, worker in holding.items() for state in worker.prefixes if state.id == self._pin
        }
        return len(self.said) == len(holding) or time.monotonic() >= self._until

    def _holds(self, worker: Presence) -> bool:
        return any(card.model == self._model and GENERATE.name in card.kinds for card in worker.models)

    def pause(self) -> float:
        """Seconds until the next look."""
        self._pause = min(LONGEST_LOOK, self._pause * 1.5)
        return self._pause

    @property
    def refusal(self) -> str | None:
        """Why no worker keeps it; None: one does, or may."""
        refused = [state.why for state in self.said.values() if state.state == REFUSED]
        return refused[0] if refused and len(refused) == len(self.said) else None

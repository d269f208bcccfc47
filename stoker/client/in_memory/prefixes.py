"""The pinned prefixes in memory, as `stoker/broker/prefixes.py` has them in the broker; all are ready at once."""

from __future__ import annotations

import time

from stoker.broker.prefixes import check_number
from stoker.contract.prefixes import PinnedPrefix, checked_length
from stoker.contract.presence import READY, PrefixState


class Prefixes:
    """By model and name. Nothing is tokenized: the worker says of no prefix how long it is."""

    def __init__(self) -> None:
        self._pinned: dict[str, dict[str, PinnedPrefix]] = {}

    def of(self, model: str) -> dict[str, PinnedPrefix]:
        return dict(self._pinned.get(model, {}))

    def pin(self, model: str, name: str, prefix: PinnedPrefix) -> PinnedPrefix:
        """Raises as the broker's link."""
        check_number(self.of(model), name, model)
        made = prefix.model_copy(update={"time": time.time()})
        checked_length(made)
        self._pinned.setdefault(model, {})[name] = made
        return made

    def unpin(self, model: str, name: str) -> bool:
        return self._pinned.get(model, {}).pop(name, None) is not None

    @property
    def states(self) -> tuple[PrefixState, ...]:
        return tuple(
            PrefixState(model=model, name=name, id=prefix.id, state=READY)
            for model, pinned in self._pinned.items()
            for name, prefix in pinned.items()
        )

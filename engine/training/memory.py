"""What training runs keep in memory between their turns, and how much the runs of an engine may keep together.

What a step needs besides, it gives back at its end; one run has its turn at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from engine.adapters.lora import chosen_targets, target_shapes
from engine.adapters.sharding import axis_of
from engine.models.shard import Shard
from stoker.contract import TrainRequest

#: Numbers that a run keeps of each weight that it trains, at most: the weight and its two moments as they are now and
#: as they were at the last checkpoint, and the gradient so far. 4 bytes each.
_KEPT = 7
#: What the runs of an engine may keep together, by default.
BUDGET = 1 << 30


def kept_bytes(shapes: Mapping[str, tuple[int, int]], request: TrainRequest, shard: Shard | None = None) -> int:
    """What a run on a model with linear layers of these shapes keeps between its turns; `shard`: on this rank of those
    that share the model.

    Raises `InvalidRequest` for targets that the model has not.
    """

    def own(name: str, side: str, width: int) -> int:
        return width if shard is None or axis_of(shard, name, side) is None else width // shard.size

    layers = target_shapes(shapes, chosen_targets(shapes, request.targets)).items()
    outputs = sum(own(name, "m", out) for name, (_, out) in layers) if request.dora else 0
    trained = request.rank * sum(own(name, "a", wide) + own(name, "b", out) for name, (wide, out) in layers) + outputs
    # DoRA keeps the norms of the base too.
    return 4 * (_KEPT * trained + outputs)


class RunMemory:
    """`limit` bytes for all runs together. One that is alone may take more: none could make way for it. From any
    thread."""

    def __init__(self, limit: int = BUDGET) -> None:
        self.limit = limit
        self._kept: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def kept(self) -> int:
        """Bytes of all runs."""
        return sum(list(self._kept.values()))

    def reserve(self, holder: str, needed: int) -> int:
        """Count `needed` bytes as those of `holder`, if they fit next to those of the others; a holder may ask again.
        Return how many others they do not fit next to: 0, they fit."""
        with self._lock:
            others = {name: kept for name, kept in self._kept.items() if name != holder}
            if others and sum(others.values()) + needed > self.limit:
                return len(others)
            self._kept[holder] = needed
            return 0

    def release(self, holder: str) -> None:
        with self._lock:
            self._kept.pop(holder, None)

"""How far MLX may run ahead of the device in a training step: what it launches early takes memory early.

An operation gets the memory of its result when it is launched, and gives back that of its inputs when it is done. A
host that is faster than the device launches up to ten graphs of operations ahead: a step that needs 4 GB took up to 11
on an H100. A device that has a little to do ahead idles no more than one that has much.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from engine.platform.compiler import on_cpu

#: What may be taken ahead, as a share of what the largest step needs.
SHARE, SHARE_CPU = 1 / 4, 1 / 8


class RunAhead:
    """Bounds what a run's evaluations take. In the engine's thread: MLX has one limit of memory for a process.

    What MLX keeps for reuse counts too: where an array fits into none of it, MLX first gives back what is beyond.
    """

    def __init__(self) -> None:
        self._largest = self._needed = self._peak = 0
        self._share = SHARE_CPU if on_cpu() else SHARE

    @property
    def peak(self) -> int:
        """The most bytes that the process held at once, as MLX counts them."""
        return max(self._peak, int(mx.get_peak_memory()))

    @contextmanager
    def bounded(self, tokens: int = 0) -> Iterator[None]:
        """Evaluate a step of so many tokens within it; 0: what needs less than a step does.

        One that is larger than all before shows what it needs: nothing of it is launched early.
        """
        resting, larger = int(mx.get_active_memory()), tokens > self._largest
        if larger:
            self._peak = self.peak
            mx.reset_peak_memory()
        ahead = 0 if larger else int((1 + self._share) * self._needed)
        # Beyond this limit MLX waits for what it has launched; it refuses nothing.
        before = mx.set_memory_limit(resting + ahead)
        try:
            yield
        finally:
            mx.set_memory_limit(before)
        if larger:
            self._largest, self._needed = tokens, int(mx.get_peak_memory()) - resting

"""The beginning of prompts that is pinned: what memory and the disk keep for it while other things come."""

from __future__ import annotations

from dataclasses import dataclass

from engine.prefixes.identity import Adapter

#: Pins take a half at most, of memory for prefixes and of the disk: what comes without being pinned needs room too.
PINNED_PART = 2


@dataclass(frozen=True)
class Beginning:
    """`ids`: its tokens. `nbytes`: what their keys and values take in memory."""

    adapter: Adapter
    ids: tuple[int, ...]
    nbytes: int

"""The beginning of prompts that is pinned: what memory and the disk keep for it while other things come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from engine.models.openings import shared_length
from engine.prefixes.identity import Adapter

#: Pins take a half at most, of memory for prefixes and of the disk: what comes without being pinned needs room too.
PINNED_PART = 2


@dataclass(frozen=True)
class Beginning:
    """`ids`: its tokens. `nbytes`: what their keys and values take in memory, where no other begins alike."""

    adapter: Adapter
    ids: tuple[int, ...]
    nbytes: int


def bytes_together(beginnings: Iterable[Beginning], token_bytes: int, shortest: int) -> int:
    """What they take in memory, which has once what several begin alike with, if these are `shortest` tokens or more
    (`engine.prefixes.tree`). `token_bytes`: what the keys and values of one token take."""
    # In this order none of those before has more in common with one than the last of them.
    ordered = sorted(set(beginnings), key=lambda each: (each.adapter or ("", 0), each.ids))
    shared = [_shared(*pair, shortest) for pair in pairwise(ordered)]
    return sum(each.nbytes for each in ordered) - sum(shared) * token_bytes


def _shared(left: Beginning, right: Beginning, shortest: int) -> int:
    """Tokens of both that memory has once."""
    if left.adapter != right.adapter:
        return 0
    length = shared_length(np.asarray(left.ids), np.asarray(right.ids))
    return length if length >= shortest else 0

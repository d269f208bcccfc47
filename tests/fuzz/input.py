"""One input: what it is, in words, and the act of giving it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz.world import World


@dataclass(frozen=True)
class Input:
    """`act` gives it to the world and returns what went wrong. `alone`: no other input may be under way meanwhile,
    because it spoils what all jobs share; the stream goes on all the same."""

    what: str
    act: Callable[[World], list[str]]
    alone: bool = False


#: A source draws an input: the same from the same numbers. The number is its own, for names that no other input uses.
Source = Callable[[random.Random, int], Input]

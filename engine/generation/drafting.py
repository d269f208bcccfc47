"""How many tokens of each row a pass takes: the newest alone, or a draft behind it where that is measured to pay.

A pass over several tokens a row takes longer: on a CPU a row that is alone has seven more tokens for a quarter of a
pass, eight rows have three more for nearly a whole one; padding costs as much as drafts. So for each size of a pass its
seconds are measured as it runs, and a draft is tried where the tokens that are expected of it a second are more than
those of ordinary decoding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from engine.generation.batch import Tried
from engine.generation.row import Row
from engine.models.buckets import bucket

#: Tokens of each row that a pass may take: few sizes, each of which may have to be compiled.
WIDTHS = (2, 3, 5, 9)
#: How much faster than ordinary decoding a pass with drafts has to be expected.
GAIN = 1.05
#: How much longer than without drafts a row may wait for a token because others draft.
WAIT = 1.1
#: What a token more of each row is taken to cost, of a pass, where no width was run; else what the last one cost.
GUESS = 0.25
#: Passes of one size whose median is what they take: at least, with drafts and without, and at most.
TRIES, LEAST, MOST = 2, 3, 9
#: Passes after which a size that was not run since is unknown again, and after which one pass goes without drafts.
FORGET, WITHOUT = 128, 64


@dataclass
class _Passes:
    """Of one size: seconds of the last ones, and how many passes there were when the last one was."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MOST))
    last: int = 0


class Drafter:
    """One lane's."""

    def __init__(self) -> None:
        self._drafted, self._accepted = 0, 0
        self._passes: dict[tuple[int, int], _Passes] = {}
        self._count, self._drafting = 0, 0

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that were tried as drafts, and those of them that were right."""
        return self._drafted, self._accepted

    def count(self, tried: Tried) -> None:
        """A pass with this draft was read."""
        generation, accepted = tried.row.generation, max(0, len(tried.taken) - 1)
        self._drafted += tried.drafted
        self._accepted += accepted
        generation.drafted += tried.drafted
        generation.accepted += accepted

    def note(self, rows: int, width: int, seconds: float) -> None:
        """A pass over `width` tokens of each row took `seconds`, from its launch until its tokens were there."""
        self._count += 1
        self._drafting = self._drafting + 1 if width > 1 else 0
        size = bucket(rows), width
        passes = self._passes.get(size)
        if passes is None or self._count - passes.last > FORGET:
            # The first one of a size may have been compiled: it says that there was one, and nothing of its time.
            passes = self._passes[size] = _Passes()
        else:
            passes.seconds.append(seconds)
        passes.last = self._count

    def width(self, rows: Sequence[Row], room: int, ahead: int = 0) -> int:
        """Tokens of each row that the next pass takes, `room` at most; 1: no drafts. `ahead`: how many tokens are on
        their way to the host, which would have to be the expected ones."""
        hopes = [(row.lookup.rate, row.most_drafted - ahead) for row in rows if row.lookup and row.lookup.expects]
        if not hopes or self._drafting >= WITHOUT:
            return 1
        alone = self._typical(len(rows), 1)
        if alone is None:
            return 1
        # What a pass makes, and the seconds in which the best so far makes it.
        made, taken, chosen = GAIN * len(rows), alone, 1
        for width, seconds in self._sizes(len(rows), alone):
            if width > room:
                break
            further = [_expected(rate, min(most, width - 1), ahead) for rate, most in hopes]
            least, tokens = min(further) if len(hopes) == len(rows) else 0.0, len(rows) + sum(further)
            if tokens * taken > made * seconds and seconds <= WAIT * (1 + least) * alone:
                made, taken, chosen = tokens, seconds, width
        return chosen

    def _sizes(self, rows: int, alone: float) -> Iterator[tuple[int, float]]:
        """Widths, each with what a pass takes: those that were run, and the next one, of which it is guessed. `alone`:
        what a pass without drafts takes."""
        seconds, before, token = alone, 1, GUESS * alone
        for width in WIDTHS:
            known = self._typical(rows, width)
            if known is None:
                yield width, seconds + token * (width - before)
                return
            yield width, known
            seconds, before, token = known, width, max(0.0, known - seconds) / (width - before)

    def _typical(self, rows: int, width: int) -> float | None:
        """What a pass of this size takes; None: unknown."""
        passes = self._passes.get((bucket(rows), width))
        if passes is None or self._count - passes.last > FORGET:
            return None
        needed = LEAST if width == 1 else TRIES
        return median_low(passes.seconds) if len(passes.seconds) >= needed else None


def _expected(rate: float, tokens: int, ahead: int) -> float:
    """How many of so many drafted tokens come, each if all before it came, at this rate."""
    return sum(rate ** (ahead + step) for step in range(1, tokens + 1))

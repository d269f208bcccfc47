"""Whose texts are next: jobs take fair turns, and the oldest one always gets on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import Generic, TypeVar

from engine.embedding.packing import evenly

J = TypeVar("J", bound=Hashable)

#: The oldest job gets one of this many tokens at least, however many newer jobs come.
OLDEST_SHARE = 4


@dataclass(eq=False)
class _Line(Generic[J]):
    """The texts of one job that wait. `rows`: in the order of service; `turn`: that of the next one."""

    job: J
    number: int
    rows: list[int]
    lengths: Sequence[int]
    turn: int
    taken: int = 0

    @property
    def waits(self) -> bool:
        return self.taken < len(self.rows)

    @property
    def length(self) -> int:
        """Tokens of the next text."""
        return self.lengths[self.rows[self.taken]]

    def take(self, early: bool) -> _Taken[J]:
        found = _Taken(self, self.rows[self.taken], self.length, self.turn, early)
        self.turn += found.length
        self.taken += 1
        return found

    def put_back(self) -> None:
        self.taken -= 1
        self.turn -= self.length


@dataclass(frozen=True)
class _Taken(Generic[J]):
    """A text of a batch. `early`: the text was owed to its job, so it came before its turn."""

    line: _Line[J]
    row: int
    length: int
    turn: int
    early: bool


class Turns(Generic[J]):
    """Start-time fair queueing over jobs (Goyal et al. 1996), in tokens.

    The turn of a text is the lane's present when its job came, and the tokens of its job before it. So the first texts
    of a new job go into the next batch, next to those that a large one has got to: a small job never waits behind a
    large one.

    Turns alone let a job starve while new ones come faster than they are served, because each of them starts at the
    present. So the oldest job that waits is owed a quarter of the tokens that are served, and what it does not get by
    its turns it gets before all others: of n tokens the last is served when 4 · n have been, and a batch or two.
    """

    def __init__(self) -> None:
        #: In the order in which they came; each has a text that waits.
        self._lines: dict[J, _Line[J]] = {}
        #: The turn of the last text that was served by it; how many jobs ever came; tokens that the oldest job is owed.
        self.present = self._count = 0
        self.owed = 0.0

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, job: J, lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each text of the job, by its row. A text without tokens does not wait."""
        # No caller sees in which order a job's texts are embedded: those of a length meet in a step.
        rows = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: -lengths[row])
        if rows:
            self._lines[job] = _Line(job, self._count, rows, lengths, self.present)
            self._count += 1

    @property
    def jobs(self) -> list[J]:
        """Those with a text that waits, in the order in which they came."""
        return list(self._lines)

    def remove(self, job: J) -> None:
        """Forget what waits of a job, if anything does."""
        if job in self._lines:
            self.owed = 0.0 if self._lines[job] is self._oldest else self.owed
            del self._lines[job]

    @property
    def _oldest(self) -> _Line[J]:
        return next(iter(self._lines.values()))

    def take(self, tokens: int, streams: int) -> list[tuple[J, int]]:
        """The next batch, as (job, row); some job must wait.

        As many tokens as given, or a text for each stream; a few texts less where that keeps the streams busier.
        """
        oldest, batch = self._oldest, self._fill(tokens, streams)
        for _ in range(len(batch) - evenly([text.length for text in batch], streams)):
            batch.pop().line.put_back()
        served = sum(text.length for text in batch)
        got = sum(text.length for text in batch if text.line is oldest)
        self.owed = max(0.0, self.owed + served / OLDEST_SHARE - got) if oldest.waits else 0.0
        # A text that was served before its turn says nothing of the others' present.
        self.present = max([self.present, *(text.turn for text in batch if not text.early)])
        for text in batch:
            if not text.line.waits:
                self._lines.pop(text.line.job, None)
        return [(text.line.job, text.row) for text in batch]

    def _fill(self, tokens: int, streams: int) -> list[_Taken[J]]:
        heap = [(line.turn, line.number, line) for line in self._lines.values()]
        heapify(heap)
        batch: list[_Taken[J]] = []
        owed, room, oldest = self.owed, tokens, self._oldest
        while heap:
            turn, number, line = heap[0]
            if not line.waits:
                heappop(heap)
                continue
            if turn != line.turn:
                heapreplace(heap, (line.turn, number, line))
                continue
            early = oldest.waits and owed >= oldest.length
            line = oldest if early else line
            if not batch:
                room = max(tokens, streams * line.length)
            if line.length > room:
                break
            batch.append(line.take(early))
            room -= batch[-1].length
            owed -= batch[-1].length if line is oldest else 0
        return batch

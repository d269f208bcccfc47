"""Where rows that decode have their positions: segments of their own, and runs that they share. No arrays.

All lie in one line of positions, wherever some are free: the arrays of all layers are alike there
(`engine.models.joint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.models.buckets import bucket
from engine.models.openings import FEWEST, Kept, Opening, Share, Span, own_lengths, share

#: Positions of its own that a row has at least; and those that are nobody's.
SMALLEST, PADDING = FEWEST, 1


@dataclass(eq=False)
class Run:
    """Positions from `start` on that rows share: the keys and values of `opening`, which nobody writes any more."""

    opening: Opening
    start: int

    @property
    def size(self) -> int:
        return len(self.opening.tokens)


class Segment(NamedTuple):
    """Where a row's positions lie in the arrays: `size` of its own from `start` on, behind the first `shared` ones,
    which are those of `run`. `opening`: what others may share of it."""

    start: int
    size: int
    shared: int = 0
    run: Run | None = None
    opening: Opening | None = None

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def room(self) -> int:
        """Positions that the row may have."""
        return self.shared + self.size


class Layout(NamedTuple):
    """`sizes`: positions that each row has of its own. `positions`: of an array that holds these, what rows share, and
    rows that are to come."""

    sizes: list[int]
    positions: int


class Move(NamedTuple):
    """`size` positions from `start` on are to lie from `to` on."""

    start: int
    to: int
    size: int


@dataclass
class Segments:
    """Those of the `rows` that are here, by their slots."""

    rows: list[Segment] = field(default_factory=list)

    def of(self, rows: Sequence[int]) -> Segments:
        """Of these rows alone."""
        return Segments([self.rows[row] for row in rows])

    def have_room(self, lengths: Sequence[int]) -> bool:
        """Whether rows of such lengths are held as they lie."""
        held = self.rows
        return len(lengths) <= len(held) and all(n <= one.room for n, one in zip(lengths, held, strict=False))

    def room(self, lengths: Sequence[int]) -> int:
        """Positions that each of these rows has behind such a length, at least."""
        return min((one.room - n for n, one in zip(lengths, self.rows, strict=False)), default=0)

    def outgrown(self, row: int, length: int) -> int | None:
        """Positions of its own that a row needs which outgrows its segment, or has none yet; None: it has room."""
        if row >= len(self.rows):
            return bucket(length, SMALLEST)
        held = self.rows[row]
        return None if length <= held.room else bucket(length - held.shared, SMALLEST)

    @property
    def kept(self) -> list[Kept]:
        """What rows that come may share."""
        return [Kept(one.opening, None if one.run is None else one.run.opening) for one in self.rows]

    @property
    def runs(self) -> dict[Run, int]:
        """Those that rows have, and how much of each at most."""
        found: dict[Run, int] = {}
        for one in self.rows:
            if one.run is not None:
                found[one.run] = max(one.shared, found.get(one.run, 0))
        return found

    @property
    def _taken(self) -> list[tuple[int, int]]:
        """Where positions are taken: from, and up to."""
        owned: list[Segment | Run] = [*self.rows, *self.runs]
        return sorted((each.start, each.start + each.size) for each in owned)

    def gap(self, size: int, positions: int) -> int | None:
        """Where `size` of so many positions are nobody's."""
        return _gap(self._taken, size, positions)

    def can_take(self, more: Sequence[Span], positions: int) -> bool:
        """Whether so many positions have gaps for all these rows that come."""
        taken = self._taken
        for length in own_lengths(more, self.kept):
            size = bucket(length, SMALLEST)
            start = _gap(taken, size, positions)
            if start is None:
                return False
            taken = sorted([*taken, (start, start + size)])
        return True

    def layout(self, lengths: Sequence[int], more: Sequence[Span] = ()) -> Layout:
        """Of rows of such lengths, new ones among them, and of those that come behind them."""
        shared = [one.shared for one in self.rows] + [0] * (len(lengths) - len(self.rows))
        each = [bucket(length - less, SMALLEST) for length, less in zip(lengths, shared, strict=False)]
        coming = sum(bucket(length, SMALLEST) for length in own_lengths(more, self.kept)) if more else 0
        return Layout(each, PADDING + bucket(sum(each) + coming + sum(self.runs.values())))

    def lay_out(self, sizes: Sequence[int]) -> list[Move]:
        """Let runs, then segments of these sizes lie one after the other; what has to be moved for that."""
        held, start, moves = self.rows, PADDING, list[Move]()
        for run in self.runs:
            moves.append(Move(run.start, start, run.size))
            run.start, start = start, start + run.size
        self.rows = []
        for row, size in enumerate(sizes):
            old = held[row] if row < len(held) else Segment(0, 0)
            moves.append(Move(old.start, start, min(old.size, size)))
            self.rows.append(old._replace(start=start, size=size))
            start += size
        return moves

    def add(self, span: Span, positions: int) -> None:
        """Let a row come behind the others, in a gap of so many positions, which has to be there."""
        found = share(span, self.kept)
        shared = 0 if found is None else found.length
        size = bucket(span.length - shared, SMALLEST)
        start = self.gap(size, positions)
        assert start is not None, "`fit` has made room"
        self.rows.append(Segment(start, size, shared, None if found is None else self._run_of(found), span.opening))

    def _run_of(self, found: Share) -> Run:
        """The run that a row shares. Of one that shares nothing the beginning becomes one, where it lies."""
        giver = self.rows[found.row]
        if giver.run is not None:
            return giver.run
        assert giver.opening is not None
        run, shared = Run(giver.opening.cut(found.length), giver.start), found.length
        self.rows[found.row] = giver._replace(
            start=giver.start + shared, size=giver.size - shared, shared=shared, run=run
        )
        return run

    def keep(self, count: int) -> None:
        """Let go of all rows except the first `count`, and of what no row shares any more."""
        del self.rows[count:]
        for run, longest in self.runs.items():
            run.opening = run.opening.cut(longest)


def _gap(taken: Sequence[tuple[int, int]], size: int, positions: int) -> int | None:
    """Where `size` of so many positions lie before, between or behind those that are taken."""
    start = PADDING
    for first, end in taken:
        if first - start >= size:
            return start
        start = end
    return start if positions - start >= size else None

"""Which rows that decode share the positions of a common beginning, and how many: by what they begin with alone.

The keys and values of a token depend on the tokens before it and on the adapter: rows that begin alike have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

#: Positions of a common beginning at least: fewer are copied, and a row's own are given out in no fewer.
FEWEST = 128


@dataclass(frozen=True, eq=False)
class Opening:
    """What a row begins with: int32 `tokens`, seen with an adapter, `owner`, the row of the adapter stack."""

    owner: int
    tokens: np.ndarray
    #: What `common` has found. It is asked in each step in which rows wait.
    _known: WeakKeyDictionary[Opening, int] = field(default_factory=WeakKeyDictionary, repr=False)

    def cut(self, length: int) -> Opening:
        """The first so many tokens of it."""
        return self if length >= len(self.tokens) else Opening(self.owner, self.tokens[:length])

    def common(self, other: Opening) -> int:
        """How many tokens both begin with; 0 where those are too few to be shared."""
        if self.owner != other.owner:
            return 0
        if (known := self._known.get(other)) is None:
            known = self._known[other] = _common(self.tokens, other.tokens)
        return known


def _common(left: np.ndarray, right: np.ndarray) -> int:
    if left is right:
        return len(left)
    # Most differ here.
    if not np.array_equal(left[:FEWEST], right[:FEWEST]):
        return 0
    return shared_length(left, right)


def shared_length(left: np.ndarray, right: np.ndarray) -> int:
    """How many tokens of both are alike, from the first on."""
    length = min(len(left), len(right))
    different = np.flatnonzero(left[:length] != right[:length])
    return int(different[0]) if len(different) else length


class Span(NamedTuple):
    """A row that is to come: how many positions it needs, its newest token's among them, and what those before that
    begin with, where others may share it.

    `others`: rows that are certain to begin with all of it too, as the other completions of its job."""

    length: int
    opening: Opening | None = None
    others: int = 0


class Kept(NamedTuple):
    """A row that is there: what it begins with, and what has positions of its own that rows share, where there is such
    a run."""

    opening: Opening | None
    run: Opening | None = None


class Share(NamedTuple):
    """`length` positions, which the row of this index has."""

    row: int
    length: int


def share(span: Span, kept: Sequence[Kept]) -> Share | None:
    """What a row that comes shares, and with which of those that are there; None: it gets positions of its own.

    A row shares one beginning, and of a row that shares already only what it shares. So one that could share more with
    others, were it whole, stays whole where that is more than what it would share now: the next one shares with it.
    """
    opening = span.opening
    if opening is None:
        return None
    most = len(opening.tokens)
    run, row, wanted, size, last = Share(-1, 0), Share(-1, 0), 0, 0, None
    for index, one in enumerate(kept):
        if one.opening is None:
            continue
        whole = opening.common(one.opening)
        wanted = max(wanted, whole)
        if one.run is None:
            row = Share(index, whole) if whole > row.length else row
        elif one.run is not last:
            last, length = one.run, opening.common(one.run)
            # Of runs as good the shortest: a longer one is there only as long as a row has all of it.
            if length > run.length or (length == run.length and len(last.tokens) < size):
                run, size = Share(index, length), len(last.tokens)
    found = row if row.length >= run.length + FEWEST else run
    pays = max(span.others * (most - found.length), wanted - found.length) <= found.length
    return found if pays and found.length else None


def own_lengths(spans: Sequence[Span], kept: Sequence[Kept]) -> list[int]:
    """How many positions each of these rows needs of its own, were they to come one after the other."""
    rows, found = list(kept), list[int]()
    for span in spans:
        shared = share(span, rows)
        rows.append(Kept(span.opening, None if shared is None else _shared(rows, shared)))
        found.append(span.length - (0 if shared is None else shared.length))
    return found


def _shared(rows: list[Kept], shared: Share) -> Opening:
    """The run that a row shares; of a row that shared nothing before, its beginning becomes one."""
    giver = rows[shared.row]
    if giver.run is None:
        assert giver.opening is not None
        rows[shared.row] = giver = giver._replace(run=giver.opening.cut(shared.length))
    assert giver.run is not None
    return giver.run

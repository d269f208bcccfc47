"""The rows that a lane answers for: one list that owns them, from their admission to their end."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from engine.generation.row import Row, RowState


class Roster:
    """Every row that was admitted and has not ended; of those, the rows that wait, in their order: by priority, those
    of one as they came.

    The prefill and the batch have rows on loan: what fails there cannot lose one, nor the ticket that it belongs to.
    """

    def __init__(self) -> None:
        self._rows: dict[Row, None] = {}
        self.waiting: list[Row] = []

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows)

    def admit(self, rows: Sequence[Row]) -> None:
        self._rows |= dict.fromkeys(rows)
        for row in rows:
            self._let_wait(row, bisect_right)

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows that had their turn wait again, before the others of their priority."""
        for row in reversed(rows):
            if row.state is not RowState.ENDED:
                self._let_wait(row, bisect_left)

    def end(self, row: Row) -> None:
        row.state = RowState.ENDED
        self._rows.pop(row, None)
        if row in self.waiting:
            self.waiting.remove(row)

    def _let_wait(self, row: Row, place: Callable[..., int]) -> None:
        row.state, row.cached = RowState.WAITING, 0
        self.waiting.insert(place(self.waiting, row.priority, key=_priority), row)


def _priority(row: Row) -> int:
    return row.priority

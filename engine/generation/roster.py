"""The rows that a lane answers for: one list that owns them, from their admission to their end."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from engine.generation.row import Row, RowState


class Roster:
    """Every row that was admitted and has not ended; of those, the rows that wait, in their order: by priority, those
    of one as they came.

    The prefill and the batch have rows on loan: what fails there cannot lose one, nor the ticket that it belongs to,
    and a cancel, a deadline and the end of the lane find each.
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
            self._let_wait(row)

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows that had their turn wait again, where they were: before all of their priority that came later."""
        for row in rows:
            if row.state is not RowState.ENDED:
                self._let_wait(row)

    def end(self, row: Row) -> None:
        row.state = RowState.ENDED
        self._rows.pop(row, None)
        if row in self.waiting:
            self.waiting.remove(row)

    def _let_wait(self, row: Row) -> None:
        row.state, row.cached = RowState.WAITING, 0
        insort(self.waiting, row, key=claim)


def claim(row: Row) -> tuple[int, float, int]:
    """The smallest is served first, the largest makes way first: by priority, those of one as they came."""
    return row.priority, row.ticket.submitted, row.number

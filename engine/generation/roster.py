"""The rows that a lane answers for: one list that owns them, from their admission to their end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from engine.generation.row import Row, RowState


class Roster:
    """Every row that was admitted and has not ended; of those, the rows that wait, in their order.

    The prefill and the batch have rows on loan: what fails there cannot lose one, nor the ticket that it belongs to.
    """

    def __init__(self) -> None:
        self._rows: dict[Row, None] = {}
        self.waiting: deque[Row] = deque()

    def __bool__(self) -> bool:
        return bool(self._rows)

    @property
    def rows(self) -> list[Row]:
        return list(self._rows)

    def admit(self, rows: Sequence[Row]) -> None:
        self._rows |= dict.fromkeys(rows)
        self.waiting.extend(self._waiting_now(rows))

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows that had their turn wait again, before the others."""
        self.waiting.extendleft(reversed(self._waiting_now([row for row in rows if row.state is not RowState.ENDED])))

    def end(self, row: Row) -> None:
        row.state = RowState.ENDED
        self._rows.pop(row, None)
        if row in self.waiting:
            self.waiting.remove(row)

    @staticmethod
    def _waiting_now(rows: Sequence[Row]) -> Sequence[Row]:
        for row in rows:
            row.state, row.cached = RowState.WAITING, 0
        return rows

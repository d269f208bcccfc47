"""Who has a slot and memory of the batch, and who makes way for whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.generation.batch import Batch
from engine.generation.grouping import Grouping
from engine.generation.kv_budget import KvBudget
from engine.generation.prompts import Prompts
from engine.generation.roster import Roster, claim
from engine.generation.row import Row, RowState


class Seats:
    """Rows that have to make way are put back among those that wait. They keep their tokens and are prefilled with them
    later, so that their streams go on where they were."""

    def __init__(
        self, slots: int, roster: Roster, prompts: Prompts, batch: Batch, budget: KvBudget, preempted: int
    ) -> None:
        self._slots, self._roster, self._prompts = slots, roster, prompts
        self._batch, self._budget = batch, budget
        #: Rows that were put back out of the batch.
        self.preempted = preempted

    def taken(self, waiting: Sequence[Row], grouping: Grouping) -> Iterator[Row]:
        """The rows to be prefilled next: the first that waits, and those behind it that go with it. None of them waits
        any more. Raises `RowFault`."""
        group: list[Row] = []
        for row in waiting:
            # A job fails when one of its rows cannot have its adapter.
            group = [taken for taken in group if taken.state is not RowState.ENDED]
            if row.state is RowState.ENDED:
                continue
            if not grouping.joins(group, row) or not self._has_place(row, group):
                return
            self._roster.waiting.remove(row)
            group.append(row)
            yield row

    def _has_place(self, row: Row, group: Sequence[Row]) -> bool:
        """Whether a row may be prefilled with `group`. Those of a worse priority make way, except that the last of them
        keeps its slot."""
        behind = any(other.priority > row.priority for other in self._roster.rows)
        while True:
            seated = [*self._batch.rows, *self._prompts.rows, *group]
            as_good = sum(other.priority <= row.priority for other in seated)
            if as_good >= max(1, self._slots - behind):
                return False
            if len(seated) < self._slots and self._budget.admits([*group, row]):
                return True
            staying = [one for one in seated if one.priority <= row.priority and one not in group]
            # Else the worse would make way for nothing, and again in each step.
            if not self._budget.could_admit([*group, row], staying) or not self._make_way(row.priority):
                return False

    def _make_way(self, priority: int) -> bool:
        """Put back what is worse than `priority`: prompts on their way, or a row; whether there was any."""
        if rows := self._prompts.give_up(priority):
            self._roster.put_back(rows)
            return True
        worse = [row for row in self._batch.rows if row.priority > priority]
        if worse:
            self._preempt(max(worse, key=claim))
        return bool(worse)

    def make_room(self, joining: Row | None = None) -> bool:
        """Before the batch grows by a token of each row, and by the row that is `joining`: of the worst priority, the
        rows that came last make way. False: the row that is `joining` is worse than all that are there, or came last of
        them, and had to."""
        batch, more = self._batch, [] if joining is None else [joining]
        while self._budget.must_shrink(more):
            last = max(batch.rows, key=claim)
            if joining is not None and claim(joining) > claim(last):
                self._roster.put_back([joining])
                return False
            if prompts := self._prompts.give_up(last.priority):
                # What rests of the background keeps no memory that a stream needs.
                self._roster.put_back(prompts)
                continue
            self._preempt(last)
            batch.shrink()
        return True

    def prepare(self, rows: Sequence[Row]) -> None:
        """Let the batch grow once for all rows that come, where there is memory; else it grows with each."""
        if len(rows) > 1 and not self._budget.must_shrink(rows):
            self._batch.fit([self._batch.span(row, row.cached + 1) for row in rows])

    def _preempt(self, row: Row) -> None:
        self._batch.leave(row)
        self._roster.put_back([row])
        self.preempted += 1

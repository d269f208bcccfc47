"""The prompts of a lane on their way into the batch: groups of one priority each, of which the best goes on first."""

from __future__ import annotations

from engine.generation.kv_budget import KvBudget
from engine.generation.prefill import Prefill
from engine.generation.row import Row


class Prompts:
    """A group of a better priority goes before one that is under way, which waits as it is meanwhile. `budget` hears
    what all of them take."""

    def __init__(self, budget: KvBudget) -> None:
        self._groups: list[Prefill] = []
        self._budget = budget

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def rows(self) -> list[Row]:
        return [row for group in self._groups for row in group.rows]

    def begin(self, group: Prefill) -> None:
        self._groups.append(group)
        self.count()

    def best(self, priorities: range) -> Prefill | None:
        """The group of these priorities that goes on next."""
        groups = [group for group in self._groups if group.priority in priorities]
        return min(groups, key=lambda group: group.priority, default=None)

    def count(self) -> None:
        """A group has grown, or has no rows any more and is let go of."""
        self._groups = [group for group in self._groups if group.rows]
        self._budget.prefilling = sum(group.kv.nbytes for group in self._groups)

    def drop(self, row: Row) -> None:
        """A row has ended."""
        for group in self._groups:
            if row in group.rows:
                group.rows.remove(row)
        self.count()

    def give_up(self, than: int) -> list[Row]:
        """Let go of the group of the worst priority, if that is worse than `than`; its rows."""
        worst = max(self._groups, key=lambda group: group.priority, default=None)
        if worst is None or worst.priority <= than:
            return []
        rows, worst.rows = worst.rows, []
        self.count()
        return rows

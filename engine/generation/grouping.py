"""Which prompts go through the model in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.adapters.pool import BASE, AdapterPool
from engine.generation.row import Row
from engine.prefixes.memory import PrefixCache

#: Prompts of a group at most.
GROUP = 16
#: Tokens of a group, padding included, where passes are compiled: on a GPU a short prompt takes as long as many.
GROUP_TOKENS = 2048
#: What a pass over the weights takes on a CPU, in tokens of a pass that is large: 11 for 0.1 billion weights, one BLAS
#: thread; without `few_rows` 25 to 50. A prompt that needs no pass of its own may cost as much padding.
PASS = 12


@dataclass(frozen=True)
class GroupLimits:
    """`tokens`: of a group, padding included. `padding`: of these, for each prompt behind the first; None: any number.
    `alike`: what is left of each prompt has to be of one length, because the model can take no padding."""

    tokens: int
    padding: int | None = None
    alike: bool = False

    def hold(self, lengths: Sequence[int]) -> bool:
        """Whether prompts of which so many tokens are left go together."""
        size = max(lengths) * len(lengths)
        if len(lengths) > GROUP or size > self.tokens or (self.alike and len(set(lengths)) > 1):
            return False
        return self.padding is None or size - sum(lengths) <= self.padding * (len(lengths) - 1)


class Grouping:
    """The rows of one group by what the prefix cache leaves of their prompts."""

    def __init__(self, limits: GroupLimits, pool: AdapterPool, prefixes: PrefixCache) -> None:
        self._limits, self._pool, self._prefixes = limits, pool, prefixes
        #: By row and adapter: tokens that the prefix cache has. Each is asked for once, as prompts may be long.
        self._known: dict[tuple[Row, int], int] = {}

    def joins(self, group: Sequence[Row], row: Row) -> bool:
        """Whether a row goes with those of a group, which may be none. It does not if one of them leaves a prefix that
        serves it, as the first of a job's rows does for the others: then it waits for that.

        Raises `RowFault` for a row of which this cannot be said."""
        if not group:
            return True
        if row.priority != group[-1].priority or any(self._leaves_prefix(one, row, group) for one in group):
            return False
        return self._limits.hold([self._left(one, group) for one in (*group, row)])

    def _leaves_prefix(self, first: Row, row: Row, group: Sequence[Row]) -> bool:
        if first.request.adapter != row.request.adapter:
            return False
        return self._prefixes.would_serve(_tokens(first), _tokens(row), self._found(row, group))

    def _left(self, row: Row, group: Sequence[Row]) -> int:
        return row.length - self._found(row, group)

    def _found(self, row: Row, group: Sequence[Row]) -> int:
        adapter = _adapter(row, group)
        if adapter is None:
            return 0
        if (row, adapter) not in self._known:
            with row.guarded():
                self._known[row, adapter] = self._prefixes.find(self._pool.identity(adapter), row.uncached)[1]
        return self._known[row, adapter]


def _tokens(row: Row) -> list[int]:
    with row.guarded():
        return row.uncached


def _adapter(row: Row, group: Sequence[Row]) -> int | None:
    """The index of a row's adapter; None: neither the row nor one of the group has acquired it yet."""
    if row.request.adapter is None:
        return BASE
    held = [one.adapter for one in (row, *group) if one.adapter >= 0 and one.request.adapter == row.request.adapter]
    return held[0] if held else None

"""A model's lane where several ranks share the model: rank 0's, which says to the others what theirs do.

Each rank has the same lane over its part of the model, and the lane is a function of what it is given: the jobs that
come, the rows that stop, the turns, and the seconds that it measures. Rank 0 gives all of that to the others, in its
order. So every rank makes the same passes in the same order, and the sums in them meet.
"""

from __future__ import annotations

import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol
from weakref import WeakKeyDictionary

from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.generation.followed import Admission
from engine.generation.lane import GenerateLane
from engine.generation.limits import LaneLimits
from engine.generation.row import Generation
from engine.models.shard import Shard
from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateResult, StreamToken

#: Versions of adapters that the other ranks have ready. Of DoRA each rank keeps the norms of each, a few megabytes.
MOST_LENT = 64


class Sharing(Protocol):
    """The ranks that share generating models, as rank 0 leads them. All in the engine's thread."""

    @property
    def shard(self) -> Shard:
        """This rank's part of each model."""
        ...

    def open(self, model: str, limits: LaneLimits) -> None:
        """Let the others make their lane of a model, and warm it up as this one is about to."""
        ...

    def lend(self, model: str, adapter: tuple[str, int], weights: LoraWeights) -> None:
        """Let the others have the files of an adapter's version."""
        ...

    def forget(self, model: str, adapter: tuple[str, int]) -> None:
        """Let the others keep nothing of a version in memory, as this rank is about to."""
        ...

    def admit(self, model: str, admission: Admission) -> None: ...

    def drop(self, model: str, numbers: list[int]) -> None:
        """Let the others end jobs, by the numbers of their admissions."""
        ...

    def turn(self, model: str, *, lookahead: bool) -> None:
        """Let the others make the turn that this one is about to make."""
        ...

    def turned(self, witness: str) -> None:
        """This rank has made it; another that made something else ends the group."""
        ...

    def measured(self, seconds: float) -> None:
        """Let the others have what this rank's clock said, or 1 or 0 for what it found of its own."""
        ...

    def lose(self, why: str) -> None:
        """Where this rank cannot go on: end the group. Raises."""
        ...


def witness(output: StepOutput) -> str:
    """What each rank must say alike of a turn: a checksum of the tokens that it chose."""
    chosen = [(entry.completion, entry.token_id) for _, entry in output.entries if isinstance(entry, StreamToken)]
    return f"{zlib.crc32(repr(chosen).encode()):08x}"


class LeadingLane(GenerateLane):
    """Rank 0's. From its warm-up on, the others hear of all that happens to it."""

    def __init__(self, model: LoadedModel, pool: AdapterPool, limits: LaneLimits, sharing: Sharing) -> None:
        self._name, self._sharing = model.name, sharing
        #: Whether the others are behind their warm-up, which they make by themselves.
        self._leads = False
        self._admitted = 0
        self._numbers: WeakKeyDictionary[Ticket[GenerateResult], int] = WeakKeyDictionary()
        #: What the others have, the least recently used first, with the stamp of the files that it was read from; None:
        #: these have become others.
        self._lent: OrderedDict[tuple[str, int], int | None] = OrderedDict()
        super().__init__(model, pool, limits, clock=self._measured, agreed=self._agreed)

    def warming(self) -> Iterator[None]:
        self._sharing.open(self._name, self.limits)
        yield from super().warming()
        self._leads = True

    def admit(self, work: Generation) -> None:
        if self._leads and not work.ended:
            self._pin(work)
            self._admitted += 1
            self._numbers[work.ticket] = self._admitted
            self._sharing.admit(self._name, Admission.of(self._admitted, work))
        super().admit(work)

    def forget(self, name: str, version: int) -> None:
        """When it is asked for again: the others hear of it then, and drop the same prefixes as this one."""
        if (name, version) in self._lent:
            self._lent[name, version] = None

    def _pin(self, work: Generation) -> None:
        """Let all ranks use one version of the job's adapter, and have its files. Raises what reading them does."""
        adapter = self._pool.resolved(work.request.adapter)
        if adapter is None:
            return
        name, version = adapter
        work.request = work.request.model_copy(update={"adapter": f"{name}@{version}"})
        stamp = self._pool.stamp(name, version)
        if self._lent.get(adapter) != stamp:
            weights = self._pool.read(name, version)
            self._make_room(adapter)
            self._sharing.lend(self._name, adapter, weights)
            super().forget(name, version)
            self._measure(adapter, weights)
            self._lent[adapter] = stamp
        self._lent.move_to_end(adapter)

    def _make_room(self, adapter: tuple[str, int]) -> None:
        """Let all ranks forget the versions that were used longest ago, except those of jobs that are here: a rank that
        loads one again needs its norms."""
        if adapter in self._lent:
            return
        named = {row.request.adapter for row in self.held}
        unused = [(name, version) for name, version in self._lent if f"{name}@{version}" not in named]
        for name, version in unused[: max(0, len(self._lent) + 1 - MOST_LENT)]:
            self._sharing.forget(self._name, (name, version))
            super().forget(name, version)
            del self._lent[name, version]

    def _measure(self, adapter: tuple[str, int], weights: LoraWeights) -> None:
        """With the others, which have just got it."""
        try:
            self._pool.measure(*adapter, weights)
        except Exception as error:
            self._sharing.lose(f"an adapter's norms failed on rank 0: {type(error).__name__}: {error}")
            raise

    def drop_stopped(self) -> None:
        stopped = [row for row in self.held if row.ticket.stopping]
        if stopped:
            self._sharing.drop(self._name, sorted({self._numbers[row.ticket] for row in stopped}))
        for row in stopped:
            self.drop(row)

    def run(self, *, lookahead: bool = True) -> StepOutput:
        if not self._leads:
            return super().run(lookahead=lookahead)
        self._sharing.turn(self._name, lookahead=lookahead)
        try:
            output = super().run(lookahead=lookahead)
        except Exception as error:
            # The others are in the middle of the same turn: there is no way back for one alone.
            self._sharing.lose(f"a turn failed on rank 0: {type(error).__name__}: {error}")
            raise
        self._sharing.turned(witness(output))
        return output

    def _measured(self) -> float:
        now = time.perf_counter()
        self._sharing.measured(now)
        return now

    def _agreed(self, own: bool) -> bool:
        self._sharing.measured(float(own))
        return own

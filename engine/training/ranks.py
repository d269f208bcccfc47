"""Ranks: processes that share the steps of a run, each with the model and with all that the run is.

All make the same calls in the same order. Between two calls nothing is owed: a rank that waits in `sum` waits for ranks
that are in the same call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from engine.models.shard import Shard
from engine.training.data import TokenizedExample
from engine.training.state import TrainState
from stoker.contract import TrainRequest
from stoker.errors import WorkerUnavailable

#: Counts travel in the float32 vector of the gradient as two numbers, whose sums are exact for up to 4096 ranks.
_LOW = 1 << 12


class Ranks(Protocol):
    """What a trainer asks of them."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        ...

    def sum(self, array: mx.array) -> mx.array:
        """The sum over all ranks of arrays of one shape and type, evaluated; the same bits on every rank."""
        ...


@dataclass(frozen=True)
class RunPlan:
    """All that another rank needs of a run to share it from here on. `state` and `anchor` are those of its trainer,
    whole."""

    run: str
    model: str
    request: TrainRequest
    examples: Sequence[TokenizedExample]
    state: TrainState
    anchor: TrainState


class Group(Ranks, Protocol):
    """The ranks as rank 0 leads them. In the engine's thread, except for `ready` and `close`."""

    def join(self) -> None:
        """Meet the others. Raises `ConfigError` if they do not fit together."""
        ...

    def hold(self, models: Mapping[str, str]) -> None:
        """All ranks hold these models: name → digest. Raises `ConfigError` if one does not."""
        ...

    def of(self, model: str) -> Group:
        """The ranks that share the runs of a model: this group, or rank 0 alone."""
        ...

    @property
    def ready(self) -> bool:
        """Whether every rank has done all that rank 0 said: the next call waits for none of them."""
        ...

    def begin(self, plan: RunPlan) -> None:
        """Let the others take part in a run."""
        ...

    def advance(self, run: str) -> None:
        """Let the others make the turn of a run that this one is about to make."""
        ...

    def advanced(self, run: str, witness: str) -> None:
        """This rank has made its turn; see `Trainer.witness`."""
        ...

    def check(self, run: str) -> None:
        """Raises `JobFailed` if the last turn of a run made something else on another rank."""
        ...

    def keep(self, run: str) -> None:
        """Let the others give their parts of the state that this one is about to keep, of a run whose model they
        share. Raises `WorkerUnavailable` if they are gone."""
        ...

    def end(self, run: str) -> None:
        """Let the others forget a run."""
        ...

    def lose(self, why: str) -> None:
        """Where this rank cannot go on, and the others wait for it: end the group. Raises."""
        ...

    def close(self) -> None:
        """Let the others end."""
        ...


class OneRank:
    """A worker of one process: a `Group` without others."""

    size, rank, ready = 1, 0, True

    def sum(self, array: mx.array) -> mx.array:
        return array

    def join(self) -> None: ...

    def hold(self, models: Mapping[str, str]) -> None: ...

    def of(self, model: str) -> Group:
        return self

    def begin(self, plan: RunPlan) -> None: ...

    def advance(self, run: str) -> None: ...

    def advanced(self, run: str, witness: str) -> None: ...

    def check(self, run: str) -> None: ...

    def keep(self, run: str) -> None: ...

    def end(self, run: str) -> None: ...

    def lose(self, why: str) -> None: ...

    def close(self) -> None: ...


ALONE: Group = OneRank()


class MlxRanks:
    """The processes of which MLX knows: by `mlx.launch`, or by the same environment variables."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._group: mx.distributed.Group | None = None

    def meet(self, backend: str) -> None:
        """`backend`: one of `mx.distributed`. Waits until all have come, and holds the interpreter meanwhile. Raises
        `RuntimeError` or `ValueError` where that cannot be."""
        group = mx.distributed.init(strict=True, backend=backend)
        if (group.rank(), group.size()) != (self.rank, self.size):
            raise ValueError(f"MLX has rank {group.rank()} of {group.size()}, not {self.rank} of {self.size}")
        self._group = group

    @property
    def shard(self) -> Shard:
        """This rank's part of a model that all share."""
        return Shard(self.rank, self.size, self._group)

    def sum(self, array: mx.array) -> mx.array:
        total = mx.distributed.all_sum(array, group=self._group)
        try:
            mx.eval(total)
        except RuntimeError as error:
            self.lose(str(error))
        return total

    def lose(self, why: str) -> None:
        """MLX has lost a rank: there is no way back to a group. Raises."""
        raise WorkerUnavailable(f"a rank of the group was lost: {why}. The job goes on when the group is back.")


def text_of_rank_0(ranks: Ranks, text: str = "", longest: int = 1024) -> str:
    """Rank 0's, on every rank; of `longest` bytes at most."""
    letters = np.frombuffer(text.encode().ljust(longest), np.uint8).astype(np.int32)
    return np.array(of_rank_0(ranks, mx.array(letters))).astype(np.uint8).tobytes().decode().rstrip()


def of_rank_0(ranks: Ranks, array: mx.array) -> mx.array:
    """What rank 0 gives, on every rank, bit for bit. The others give any array of its shape and type; of 4 bytes."""
    bits = array.view(mx.uint32) if ranks.rank == 0 else mx.zeros(array.shape, mx.uint32)
    return ranks.sum(bits).view(array.dtype)


@dataclass(frozen=True)
class Share:
    """A rank's part of one turn. `micro`: the micro-batch; `whole`: all its examples, or the rank's part of them;
    `after`: the micro-batches that are done when all ranks have made the turn."""

    micro: int
    whole: bool
    after: int


def share_of(micro: int, accumulation: int, ranks: Ranks) -> Share:
    """What a rank does when `micro` micro-batches are done: whole ones for as long as the step has one for every rank;
    the examples of each that is left over are dealt out (`part_of`)."""
    left = accumulation - micro % accumulation
    if left >= ranks.size:
        return Share(micro + ranks.rank, True, micro + ranks.size)
    return Share(micro, ranks.size == 1, micro + 1)


def part_of(examples: int, ranks: Ranks) -> slice:
    """This rank's examples of a micro-batch that is dealt out; none, if there are fewer than ranks."""
    return slice(ranks.rank * examples // ranks.size, (ranks.rank + 1) * examples // ranks.size)


def as_floats(loss: float, *counts: int) -> mx.array:
    """A loss and counts of up to 2^36, as numbers whose sums keep them: float32 (1 + 2 · counts,)."""
    return mx.array([loss, *(part for count in counts for part in divmod(count, _LOW))], mx.float32)


def from_floats(numbers: Sequence[float]) -> tuple[float, list[int]]:
    """The inverse, of a sum over ranks."""
    loss, *parts = numbers
    return loss, [int(high) * _LOW + int(low) for high, low in zip(parts[::2], parts[1::2], strict=True)]

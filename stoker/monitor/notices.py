"""What the ledger says of jobs, one fact a notice: that there is one, that it runs, waits again, gets on, ended."""

from __future__ import annotations

from dataclasses import dataclass

from stoker.broker.ledger.record import Watched
from stoker.contract.presence import node_of


@dataclass(frozen=True)
class TaskNotice:
    id: str


@dataclass(frozen=True)
class Known(TaskNotice):
    """A job that was accepted. `adapter`: the one that it uses or makes; `size`: how much it asks for."""

    kind: str
    model: str
    client: str
    priority: int
    adapter: str
    size: str
    submitted: float
    crashes: int

    @classmethod
    def of(cls, job_id: str, said: Watched) -> Known:
        asked = (said.kind, said.model, said.client, said.priority, said.adapter, said.size)
        return cls(job_id, *asked, submitted=said.submitted, crashes=said.crashes)

    def shown(self) -> dict[str, str | int]:
        """What Flower shows as the task's arguments."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "kind": self.kind,
            "client": self.client,
            "priority": self.priority,
            "size": self.size,
        }


@dataclass(frozen=True)
class Started(TaskNotice):
    """`worker`: the process that owns it."""

    worker: str
    time: float

    @property
    def node(self) -> str:
        return node_of(self.worker)


@dataclass(frozen=True)
class WaitsAgain(TaskNotice):
    """It had an owner, or was a dead letter, and waits."""

    time: float
    crashes: int = 0


@dataclass(frozen=True)
class Progress(TaskNotice):
    text: str


@dataclass(frozen=True)
class Ended(TaskNotice):
    """`state`: Celery's, `SUCCESS`, `FAILURE` or `REVOKED`. `error`: the class of what it failed with."""

    state: str
    time: float
    error: str = ""

"""What the client, its jobs and its adapters ask, without a word on who answers: the broker (`broker_link.py`), or an
in-memory double (`memory_link.py`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol, TypeVar

from stoker.broker.ledger.listing import OpenJob
from stoker.broker.letters import Letter
from stoker.broker.outcome import JobStatus
from stoker.broker.registry import AdapterEntry, Verb
from stoker.contract import EmbedReply, ModelCard, Presence, Request, StreamToken, TrainReport
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.prefixes import PinnedPrefix
from stoker.contract.vectors import Encoded

if TYPE_CHECKING:
    from stoker.settings import Settings

E = TypeVar("E", StreamToken, TrainReport)


class AsyncLink(Protocol):
    """One conversation about jobs. Every method may raise `BrokerUnavailable`."""

    @property
    def settings(self) -> Settings: ...

    def with_key(self, key: str, asked: str | None = None) -> AsyncLink:
        """The same conversation, and the same connections, under another client's key. `asked`: of every job that is
        sent, a digest of what it was asked for; None: as before."""

    async def submit(self, request: Request, job_id: str, data: bytes = b"") -> None:
        """Send a job; `data` is its input."""

    async def revive(self, request: Request, job_id: str, client: str | None) -> None:
        """Send a dead job again. `client`: the key of the one that it belonged to, if that is known."""

    async def ability(self, job_id: str) -> str | None:
        """What the job's record says that its model must be able to do; None where there is no record."""

    async def sender(self, job_id: str) -> str | None:
        """The key of the client that sent the job; None where there is no record."""

    async def status(self, job_id: str) -> JobStatus:
        """Raises `JobLost` for a job that is neither known nor ended."""

    async def begun(self, job_id: str) -> bool:
        """Whether a worker has begun the job, this one or one before it."""

    async def cancel(self, job_id: str) -> None:
        """Stop the job wherever it is. Raises `JobLost` for one that is not known."""

    async def value(self, job_id: str, timeout: float | None) -> object:
        """Wait for the end, and return what the job's record holds; raises what the job ended with."""

    def entries(self, job_id: str, entry: type[E], timeout: float | None) -> AsyncGenerator[E]:
        """Each entry of the job's stream once, in order; raises what the job ended with."""

    async def vectors(self, job_id: str, reply: EmbedReply) -> Encoded:
        """The vectors that the job has made. Raises `JobLost` for those that have expired."""

    async def discard(self, job_id: str) -> None:
        """Forget what a job that is done has made."""

    async def workers(self) -> list[Presence]:
        """The workers that are alive now."""

    async def models(self) -> dict[str, ModelCard]:
        """Every model that some worker serves or lately served."""

    async def command(self, worker: str, command: ModelCommand, timeout: float | None) -> ModelReport:
        """Ask a worker about a model, and wait; raises what it failed of."""

    async def jobs(self) -> dict[str, OpenJob]:
        """Jobs that have not ended, oldest first."""

    async def dead(self) -> dict[str, Letter]:
        """The dead letters."""

    async def adapters(self, model: str) -> list[AdapterEntry]:
        """Every adapter of the model, by name."""

    async def adapter(self, model: str, name: str) -> AdapterEntry:
        """Raises `UnknownAdapter`."""

    async def change_adapter(self, model: str, verb: Verb, name: str, version: int | None) -> bool:
        """Whether it could be done."""

    async def prefixes(self, model: str) -> dict[str, PinnedPrefix]:
        """The pinned prefixes of the model, the oldest first."""

    async def pin_prefix(self, model: str, name: str, prefix: PinnedPrefix) -> PinnedPrefix:
        """Pin it, as of now. Raises `InvalidRequest` for a name that is there already, and for one too many or too
        long."""

    async def unpin_prefix(self, model: str, name: str) -> bool:
        """Whether there was one."""

    async def close(self) -> None:
        """Let go of what the link holds open. It may be used again."""

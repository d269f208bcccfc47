"""The link of a client that works in memory: its jobs run as far as they are waited for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NoReturn, TypeVar

from stoker.adapters import existing
from stoker.broker.ledger.listing import OpenJob
from stoker.broker.letters import Letter
from stoker.broker.outcome import JobStatus, Outcome, read_vectors
from stoker.broker.registry import AdapterEntry, Verb
from stoker.client._async.link import AsyncLink
from stoker.client.asynchronously import sleep
from stoker.client.following import TimeLimit
from stoker.client.in_memory.memory import Memory
from stoker.client.in_memory.script import NotScripted
from stoker.contract import EmbedReply, ModelCard, Presence, Request, StreamToken, TrainReport
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.prefixes import PinnedPrefix
from stoker.contract.vectors import Encoded
from stoker.errors import JobTimeout
from stoker.settings import Settings

E = TypeVar("E", StreamToken, TrainReport)

#: Seconds between two looks at a job that hangs.
PAUSE = 0.005
#: Seconds after which a test waits for nothing, where no deadline comes nearer.
HANGS = 10.0


class AsyncMemoryLink:
    """`AsyncLink` over a `Memory`."""

    def __init__(self, memory: Memory, settings: Settings | None = None, asked: str = "") -> None:
        self._memory, self._settings, self._asked = memory, settings or memory.settings, asked

    def __reduce__(self) -> NoReturn:
        raise TypeError("a client that works in memory, and its jobs, cannot be pickled: they live in this process.")

    @property
    def settings(self) -> Settings:
        return self._settings

    def with_key(self, key: str, asked: str | None = None) -> AsyncLink:
        settings = self._settings.model_copy(update={"client_key": key})
        return AsyncMemoryLink(self._memory, settings, self._asked if asked is None else asked)

    async def submit(self, request: Request, job_id: str, data: bytes = b"") -> None:
        self._memory.submit(request, job_id, data, self._settings.client_key, self._asked)

    async def revive(self, request: Request, job_id: str, client: str | None) -> None:
        self._memory.revive(request, job_id, client)

    async def ability(self, job_id: str) -> str | None:
        return self._memory.ability(job_id)

    async def sender(self, job_id: str) -> str | None:
        return self._memory.sender(job_id)

    async def status(self, job_id: str) -> JobStatus:
        return self._memory.job(job_id).status

    async def begun(self, job_id: str) -> bool:
        return self._memory.job(job_id).status is not JobStatus.QUEUED

    async def cancel(self, job_id: str) -> None:
        self._memory.cancel(job_id)

    async def value(self, job_id: str, timeout: float | None) -> object:
        return (await self._end(job_id, timeout)).unwrap(job_id)

    async def entries(self, job_id: str, entry: type[E], timeout: float | None) -> AsyncGenerator[E]:
        index = 0
        while isinstance(found := self._memory.entry(job_id, index), entry):
            yield found
            index += 1
            # Others of the event loop have their turn between two tokens, as with a broker.
            await sleep(0)
        (await self._end(job_id, timeout)).unwrap(job_id)

    async def _end(self, job_id: str, timeout: float | None) -> Outcome:
        limit, left = TimeLimit(job_id, HANGS if timeout is None else timeout), self._memory.time_left(job_id)
        while (outcome := self._memory.end(job_id)) is None:
            try:
                await sleep(limit.slice(PAUSE))
            except JobTimeout:
                if timeout is not None:
                    raise
                raise NotScripted(_why_it_hangs(job_id, left)) from None
            before, left = left, self._memory.time_left(job_id)
            if timeout is None and before is not None and left is not None and left < before:
                # Its end comes nearer.
                limit.restart()
        return outcome

    async def vectors(self, job_id: str, reply: EmbedReply) -> Encoded:
        return read_vectors(reply, self._memory.blob(reply.blob))

    async def discard(self, job_id: str) -> None:
        self._memory.discard(job_id)

    async def workers(self) -> list[Presence]:
        return self._memory.workers()

    async def models(self) -> dict[str, ModelCard]:
        return self._memory.models()

    async def command(self, worker: str, command: ModelCommand, timeout: float | None) -> ModelReport:
        return self._memory.command(worker, command)

    async def jobs(self) -> dict[str, OpenJob]:
        return self._memory.jobs()

    async def dead(self) -> dict[str, Letter]:
        return self._memory.dead()

    async def adapters(self, model: str) -> list[AdapterEntry]:
        return self._memory.registry.list(model)

    async def adapter(self, model: str, name: str) -> AdapterEntry:
        return existing(self._memory.registry.get(model, name))

    async def change_adapter(self, model: str, verb: Verb, name: str, version: int | None) -> bool:
        return self._memory.registry.change(model, verb, name, version)

    async def prefixes(self, model: str) -> dict[str, PinnedPrefix]:
        return self._memory.prefixes.of(model)

    async def pin_prefix(self, model: str, name: str, prefix: PinnedPrefix) -> PinnedPrefix:
        return self._memory.prefixes.pin(model, name, prefix)

    async def unpin_prefix(self, model: str, name: str) -> bool:
        return self._memory.prefixes.unpin(model, name)

    async def close(self) -> None:
        """Nothing is held open."""


def _why_it_hangs(job_id: str, left: float | None) -> str:
    """`left`: seconds until its deadline, by a clock that stands still."""
    if left is None:
        return (
            f"job {job_id} hangs, as its answer says; nothing cancelled it, and it has no deadline. Give it one, "
            "cancel it, or wait with a timeout."
        )
    return (
        f"job {job_id} hangs, as its answer says; nothing cancelled it, and by the client's own clock, which stands "
        f"still, its deadline is {left:g} s away. Let that clock go on, cancel the job, or wait with a timeout."
    )

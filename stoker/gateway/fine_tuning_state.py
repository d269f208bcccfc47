"""How a training run of a client stands: as its job says, and when that is forgotten, as was kept or as the registry of
adapters has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from stoker.broker import keys, letters
from stoker.broker.connection import translated
from stoker.broker.fine_tunes import Ending, FineTune, FineTunes
from stoker.broker.outcome import JobStatus, lost
from stoker.client._async.client import AsyncClient
from stoker.client._async.jobs import AsyncTrainJob
from stoker.contract import TrainResult
from stoker.errors import BrokerUnavailable, JobCancelled, JobDead, JobLost, JobTimeout, StokerError, UnknownAdapter
from stoker.gateway.errors import row_of

#: Seconds that sending a large dataset may take: until then a run whose job is not there yet has not failed.
SENT_WITHIN = 600
_OPEN = {JobStatus.QUEUED: "queued", JobStatus.RUNNING: "running"}


@dataclass(frozen=True)
class Standing:
    """`status`: OpenAI's word for it. `ending`: of a run that has ended. `taken`: the job of the run's id is another
    client's: its own was forgotten, or has not come yet."""

    status: str
    ending: Ending | None = None
    taken: bool = False


class Standings:
    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def of(self, record: FineTune) -> Standing:
        with translated(self._client.settings):
            return await self._of(record)

    async def _of(self, record: FineTune) -> Standing:
        sender = await self._client.sender(record.id)
        if sender not in (None, record.owner):
            return replace(await self._forgotten(record, lost(record.id)), taken=True)
        job = AsyncTrainJob(self._client.link, record.id)
        try:
            status = await job.status()
            if status in _OPEN:
                return Standing(_OPEN[status])
            ending = await self._ended(job, record)
        except JobLost as error:
            return await self._forgotten(record, error)
        return Standing(ending.status, ending)

    async def _ended(self, job: AsyncTrainJob, record: FineTune) -> Ending:
        """As the job's result says, which is forgotten within a day: it is kept here. Raises `JobLost`."""
        try:
            ending = await self._succeeded(record, await job.result(10))
        except (BrokerUnavailable, JobTimeout, JobLost):
            raise
        except JobCancelled:
            ending = await self._failed(record, "cancelled")
        except JobDead as error:
            # A dead letter may be sent again: its end is not kept. When it died the letter says.
            return await self._failed(record, "failed", error, await self._died(record))
        except StokerError as error:
            ending = await self._failed(record, "failed", error)
        return await self._kept(record, ending)

    async def _succeeded(self, record: FineTune, result: TrainResult) -> Ending:
        known = (await self._versions(record)).get(result.version, {})
        return Ending(
            status="succeeded", version=result.version, step=result.best_step, loss=result.last_loss,
            finished=await self._time(known),
            held_out_loss=result.held_out_loss, tokens=result.tokens,
        )  # fmt: skip

    async def _died(self, record: FineTune) -> int | None:
        redis: Any = self._client.redis
        letter = await redis.hget(keys.DEAD, record.id)
        time = None if letter is None else letters.died(letters.read(letter))
        return None if time is None else int(time)

    async def _failed(
        self, record: FineTune, status: str, error: StokerError | None = None, finished: int | None = None
    ) -> Ending:
        """Nobody notes when a job ends that makes nothing, except where `finished` is known: the first to ask does,
        once."""
        if finished is None:
            before = record.ending
            finished = before.finished if before is not None else await FineTunes(self._client.redis).now()
        code, message = ("", "") if error is None else (row_of(error).code, str(error))
        return Ending.model_validate({"status": status, "finished": finished, "code": code, "message": message})

    async def _kept(self, record: FineTune, ending: Ending) -> Ending:
        if record.ending != ending:
            await FineTunes(self._client.redis).end(record.model_copy(update={"ending": ending}))
        return ending

    async def _forgotten(self, record: FineTune, error: JobLost) -> Standing:
        if record.ending is not None:
            return Standing(record.ending.status, record.ending)
        for version, known in (await self._versions(record)).items():
            if known.get("job") == record.id:
                made = {"version": version, "step": known.get("steps"), "loss": known.get("loss")}
                further = {"held_out_loss": known.get("held_out_loss"), "finished": await self._time(known)}
                ending = Ending.model_validate({"status": "succeeded", **made, **further})
                return Standing("succeeded", await self._kept(record, ending))
        since = record.created + SENT_WITHIN
        if await FineTunes(self._client.redis).now() < since:
            return Standing("validating_files")
        return Standing("failed", await self._failed(record, "failed", error, since))

    async def _time(self, known: Mapping[str, object]) -> int:
        """When a version was registered."""
        time = known.get("time")
        return int(time) if isinstance(time, int | float) else await FineTunes(self._client.redis).now()

    async def _versions(self, record: FineTune) -> dict[int, dict[str, object]]:
        try:
            entry = await self._client.link.adapter(record.model, record.adapter)
        except UnknownAdapter:
            return {}
        return {version: dict(known) for version, known in entry.versions.items()}

"""`/v1/fine_tuning/jobs`: training jobs, asked for and watched as OpenAI's clients do."""

from __future__ import annotations

import asyncio
import codecs
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stoker.broker.connection import translated
from stoker.broker.fine_tunes import FineTune, FineTunes
from stoker.client._async.client import AsyncClient
from stoker.client._async.jobs import AsyncTrainJob
from stoker.client.asynchronously import finished, in_thread
from stoker.contract.dataset import iterate_lines
from stoker.contract.lines import pieces
from stoker.contract.shown import as_json, brief
from stoker.errors import BrokerUnavailable, DatasetError, StokerError
from stoker.gateway.calls import Call, check_owner
from stoker.gateway.errors import Refused
from stoker.gateway.fields import parse
from stoker.gateway.fine_tuning_body import NAMES, FineTuningBody
from stoker.gateway.fine_tuning_form import checkpoints, events, job_object
from stoker.gateway.fine_tuning_state import Standings
from stoker.gateway.paging import Page, listing, page_of
from stoker.gateway.stored import Store
from stoker.gateway.uploads import refuse_pages

log = logging.getLogger(__name__)
PURPOSE = "fine-tune"
#: Entries of a page, at most and by default.
MOST, USUAL = 100, 20
#: Seconds that a cancelled run has to end before the answer says how it stands.
CANCELLED_WITHIN = 3.0


@dataclass(frozen=True)
class Lines:
    """A dataset that was looked through: where it is, and how many of its last lines are for evaluation."""

    path: Path
    held_out: int = 0


class FineTuning:
    """The endpoints, for a caller whose key is known."""

    def __init__(self, client: AsyncClient, store: Store) -> None:
        self._client, self._store = client, store
        #: A dataset is in memory while it is sent: one at a time.
        self._sending = asyncio.Semaphore(1)

    @property
    def _runs(self) -> FineTunes:
        return FineTunes(self._client.redis)

    async def create(self, call: Call) -> Response:
        body = parse(FineTuningBody, call.body)
        base, adapter = call.model(body.model)
        if adapter is not None:
            message = f"model: {as_json(body.model, 160)} given; runs begin from a base, so name it without an adapter."
            raise Refused(400, message, param="model", code="unsupported_parameter")
        owner, created = call.client.settings.client_key, await self._now()
        record = body.record(call.named.id, owner, created, base, secrets.randbelow(2**31))
        with TemporaryDirectory(prefix="stoker-fine-tune-") as folder:
            async with self._sending:
                lines = await self._lines(body, owner, Path(folder))
                record = await self._sent(call.client, record, body, lines)
        return JSONResponse(job_object(record, await Standings(self._client).of(record)))

    async def _now(self) -> int:
        with translated(self._client.settings):
            return await self._runs.now()

    async def _sent(self, client: AsyncClient, record: FineTune, body: FineTuningBody, lines: Lines) -> FineTune:
        """Sent twice it is one run. It is noted before it is sent: none runs that nobody knows."""
        # Who has noted a run of an id may see and cancel the job of it.
        await check_owner(client, record.id)
        with translated(self._client.settings):
            found = await self._runs.add(record)
        if found is None:
            message = f"job {record.id}: the id is taken; give another Idempotency-Key."
            raise Refused(409, message, code="id_taken")
        if found.ending is not None:
            return found
        try:
            options = body.options(found.seed, lines.held_out)
            await client.train(found.adapter, lines.path, model=found.model, job_id=found.id, **options)
            await check_owner(client, found.id)
        except BaseException as error:
            if found == record:
                await finished(partial(self._unsent, record))
            if isinstance(error, StokerError):
                raise NAMES.refusal(error) from None
            raise
        return found

    async def _unsent(self, record: FineTune) -> None:
        """Forget a run whose job did not come to the broker. Where that cannot be asked it may have come: such a run
        is kept, and shown as failed if it did not."""
        try:
            if await self._client.sender(record.id) != record.owner:
                with translated(self._client.settings):
                    await self._runs.forget(record)
        except BrokerUnavailable as error:
            log.warning("whether run %s was sent is not known: %s", record.id, error)

    async def _lines(self, body: FineTuningBody, owner: str, folder: Path) -> Lines:
        """The file to learn from, with the one to evaluate on behind it. Raises `Refused` for the first wrong line."""
        whole, last = folder / "training", folder / "validation"
        await self._looked_through(body.training_file, "training_file", owner, whole)
        if body.validation_file is None:
            return Lines(whole)
        held_out = await self._looked_through(body.validation_file, "validation_file", owner, last)
        await in_thread(_append, whole, last)
        return Lines(whole, held_out)

    async def _looked_through(self, file_id: str, field: str, owner: str, path: Path) -> int:
        """Write a stored file to `path`, and count its examples."""
        try:
            record = await self._store.find(file_id, owner)
            if record.purpose != PURPOSE:
                message = f"file: {file_id} was uploaded for {record.purpose}; upload it for {PURPOSE}."
                raise Refused(400, message, code="invalid_value")
            with path.open("wb") as file:
                async for part in self._store.read(record):
                    await in_thread(file.write, part)
            return await in_thread(_counted, path, record.filename[:80])
        except Refused as refused:
            message = f"{field}: {refused.message.removeprefix('file: ')}"
            raise Refused(refused.status, message, param=field, code=refused.code) from None
        except DatasetError as error:
            raise Refused(400, f"{field}: {error}", param=field, code="invalid_dataset") from None

    async def list(self, request: Request, owner: str) -> Response:
        page, standings, records = _page(request), Standings(self._client), dict[str, FineTune]()

        async def found() -> AsyncIterator[dict[str, object]]:
            async for record in self._runs.listed(owner):
                records[record.id] = record
                yield {"id": record.id}

        with translated(self._client.settings):
            chosen = await listing(found(), page)
        first = list(records).index(page.after) + 1 if page.after is not None else 0
        listed = list(records.values())[first : first + page.limit]
        return JSONResponse({**chosen, "data": [job_object(record, await standings.of(record)) for record in listed]})

    async def retrieve(self, request: Request, owner: str) -> Response:
        record = await self._asked(request, owner)
        return JSONResponse(job_object(record, await Standings(self._client).of(record)))

    async def cancel(self, request: Request, owner: str) -> Response:
        refuse_pages(request.headers)
        record = await self._asked(request, owner)
        standings, job = Standings(self._client), AsyncTrainJob(self._client.link, record.id)
        standing = await standings.of(record)
        if standing.ending is None and not standing.taken:
            await job.cancel()
            # What became of it is asked for next.
            with suppress(StokerError):
                await job.result(CANCELLED_WITHIN)
        return JSONResponse(job_object(record, await standings.of(record)))

    async def events(self, request: Request, owner: str) -> Response:
        page, record = _page(request), await self._asked(request, owner)
        standing = await Standings(self._client).of(record)
        reports = _no_reports if standing.taken else partial(self._runs.reports, record.id)
        with translated(self._client.settings):
            return JSONResponse(await listing(events(record, standing, reports, page.after), page))

    async def checkpoints(self, request: Request, owner: str) -> Response:
        page, record = _page(request), await self._asked(request, owner)
        return JSONResponse(await listing(checkpoints(record, await Standings(self._client).of(record)), page))

    async def _asked(self, request: Request, owner: str) -> FineTune:
        """Raises `Refused` for a run that this owner does not have."""
        job_id = request.path_params["job_id"]
        with translated(self._client.settings):
            record = await self._runs.find(job_id, owner)
        if record is None:
            message = (
                f"job: {brief(job_id, 80)} given; you have no run of that id. GET /v1/fine_tuning/jobs lists them."
            )
            raise Refused(404, message, param="id", code="job_not_found")
        return record


async def _no_reports(below: int | None, count: int) -> list[bytes]:
    return []


def _page(request: Request) -> Page:
    page = page_of(request.query_params, MOST, usual=USUAL)
    if not page.newest_first:
        message = "order: asc given; the newest come first. Leave it out."
        raise Refused(400, message, param="order", code="unsupported_parameter")
    return page


def _counted(path: Path, name: str) -> int:
    """Raises `DatasetError` for a wrong line, and where there is none."""
    with path.open("rb") as file:
        count = sum(1 for _ in iterate_lines(pieces(file), name))
    if not count:
        raise DatasetError(f"{name}: no example in it; expected one JSON object a line.")
    return count


def _append(whole: Path, last: Path) -> None:
    with whole.open("ab") as file, last.open("rb") as further:
        file.write(b"\n")
        # A byte order mark is one at the beginning of a file alone.
        file.write(further.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8))
        while data := further.read(2**20):
            file.write(data)

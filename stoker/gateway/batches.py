"""`/v1/batches`: files of requests, answered behind all others."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stoker.broker.batches import ENDED, Batch, Batches, BatchRecord
from stoker.broker.connection import translated
from stoker.client._async.client import AsyncClient
from stoker.contract.shown import as_json, brief
from stoker.gateway.calls import Call
from stoker.gateway.errors import Refused
from stoker.gateway.fields import MOST_METADATA, Body, at_most, parse
from stoker.gateway.files import checked_lifetime
from stoker.gateway.paging import listing, page_of
from stoker.gateway.stored import Store
from stoker.gateway.uploads import refuse_pages

#: Batches of one client that have not ended.
MOST_OPEN = 100
#: Hours that a batch may take.
LONGEST_WINDOW = 168


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: int


class BatchBody(Body):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str
    metadata: Annotated[dict[str, str], at_most(MOST_METADATA)] | None = None
    output_expires_after: ExpiresAfter | None = None

    def seconds(self) -> int:
        """Of the window. Raises `Refused`."""
        hours = self.completion_window.removesuffix("h")
        number = int(hours) if hours.isascii() and hours.isdecimal() and len(hours) < 4 else 0
        if not self.completion_window.endswith("h") or not 1 <= number <= LONGEST_WINDOW:
            message = (
                f"{as_json(self.completion_window)} given; allowed: 24h, or other hours from 1h to {LONGEST_WINDOW}h."
            )
            raise _wrong("completion_window", message)
        return number * 3600

    def check_metadata(self) -> None:
        """Raises `Refused`."""
        items = (self.metadata or {}).items()
        if any(len(name) > 64 or len(value) > 512 for name, value in items):
            raise _wrong("metadata", "names of at most 64 characters and values of at most 512 are allowed.")


class BatchEndpoints:
    """`broker`: the client whose broker knows the batches. `wake`: says that there is one to run."""

    def __init__(self, broker: AsyncClient, store: Store, wake: Callable[[], None]) -> None:
        self._broker, self._store, self._wake = broker, store, wake
        #: Ids of batches that are being made, by their owner.
        self._coming: dict[str, set[str]] = {}

    async def create(self, call: Call) -> Response:
        if call.named.given:
            message = "Idempotency-Key: given for a batch, which is no job; leave it out."
            raise Refused(400, message, code="unsupported_parameter")
        body, caller, owner = parse(BatchBody, call.body), call.caller, call.client.settings.client_key
        window, lifetime = body.seconds(), body.output_expires_after
        body.check_metadata()
        seconds = checked_lifetime(None if lifetime is None else lifetime.seconds, "output_expires_after")
        source = await self._store.find(body.input_file_id, owner, "input_file_id")
        if source.purpose != "batch":
            raise _wrong("input_file_id", f"{source.id} has the purpose {source.purpose}; upload it with batch.")
        created = await self._store.now()
        record = BatchRecord(
            id=f"batch_{uuid.uuid4().hex}", owner=owner, key=caller.key, endpoint=body.endpoint, input_file=source.id,
            models=None if caller.models is None else tuple(sorted(caller.models)), place=source.place,
            window=body.completion_window, metadata=body.metadata, created=created, expires=int(created) + window,
            lifetime=seconds,
        )  # fmt: skip
        with self._comes(record):
            await self._check_open(owner, source.place)
            with translated(self._broker.settings):
                await self._batches.create(record)
        self._wake()
        return JSONResponse(shown(Batch(record)))

    @contextmanager
    def _comes(self, record: BatchRecord) -> Iterator[None]:
        """A batch that is being made counts from now on, for others that come meanwhile."""
        own = self._coming.setdefault(record.owner, set())
        own.add(record.id)
        try:
            yield
        finally:
            own.discard(record.id)
            if not own:
                self._coming.pop(record.owner, None)

    async def _check_open(self, owner: str, place: str) -> None:
        """Whether there may be one more, with all that come. Each knows of those before it."""
        ids = set(self._coming[owner])
        with translated(self._broker.settings):
            found = await self._batches.open(place)
        ids |= {batch.record.id for batch in found if batch.record.owner == owner}
        if len(ids) > MOST_OPEN:
            message = f"you have {MOST_OPEN} batches that have not ended, the most there may be; cancel some, or wait."
            raise Refused(429, message, code="batches_full", again=60.0)

    async def list(self, request: Request, owner: str) -> Response:
        page = page_of(request.query_params, 100, usual=20)
        with translated(self._broker.settings):
            found = self._batches.listed(owner, newest_first=page.newest_first)
            return JSONResponse(await listing((shown(batch) async for batch in found), page))

    async def retrieve(self, request: Request, owner: str) -> Response:
        return JSONResponse(shown(await self._asked(request, owner)))

    async def cancel(self, request: Request, owner: str) -> Response:
        refuse_pages(request.headers)
        batch = await self._asked(request, owner)
        if batch.record.ended:
            message = f"batch: {batch.record.id} is {batch.record.status}; it cannot be cancelled any more."
            raise Refused(409, message, code="batch_ended")
        now = int(await self._store.now())
        with translated(self._broker.settings):
            await self._batches.cancel(batch.record.id, now)
        self._wake()
        return JSONResponse(shown(await self._asked(request, owner)))

    async def _asked(self, request: Request, owner: str) -> Batch:
        batch_id = request.path_params["batch_id"]
        found = None
        if is_id(batch_id):
            with translated(self._broker.settings):
                found = await self._batches.find(batch_id, owner)
        if found is None:
            message = f"batch: {brief(batch_id, 80)} given; there is no batch of that id. GET /v1/batches lists yours."
            raise Refused(404, message, param="id", code="batch_not_found")
        return found

    @property
    def _batches(self) -> Batches:
        return Batches(self._broker.redis)


def is_id(name: str) -> bool:
    """Whether a batch may be called so: an id is a part of keys."""
    return name.startswith("batch_") and len(name) < 64 and name.isascii() and name.replace("_", "").isalnum()


def _wrong(name: str, said: str) -> Refused:
    return Refused(400, f"{name}: {said}", param=name, code="invalid_value")


def shown(batch: Batch) -> dict[str, object]:
    """As OpenAI shows a batch."""
    record = batch.record
    stopping = bool(batch.cancelled) and not record.ended
    times = {status: record.since.get(status) for status in ("in_progress", "finalizing", *ENDED)}
    files = {name: file.id for name, file in (("output", record.output), ("error", record.errors)) if file is not None}
    errors = [{"code": one.code, "message": one.message, "param": None, "line": None} for one in record.trouble]
    return {
        "id": record.id, "object": "batch", "endpoint": record.endpoint, "input_file_id": record.input_file,
        "completion_window": record.window, "status": "cancelling" if stopping else record.status,
        "errors": {"object": "list", "data": errors} if errors else None,
        # They are there for their owner once the batch has ended.
        "output_file_id": files.get("output") if record.ended else None,
        "error_file_id": files.get("error") if record.ended else None,
        "created_at": int(record.created), "expires_at": record.expires, "cancelling_at": batch.cancelled or None,
        **{f"{status}_at": time for status, time in times.items()},
        "request_counts": {"total": record.total, "completed": record.completed, "failed": record.failed},
        "metadata": record.metadata,
    }  # fmt: skip

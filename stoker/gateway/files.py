"""`/v1/files`: what batches and training runs read, and what batches have written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import ClassVar, Literal
from urllib.parse import quote

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from stoker.broker.keys import FILE_TTL
from stoker.broker.stored_files import FileRecord
from stoker.client.asynchronously import finished
from stoker.contract.shown import brief
from stoker.gateway.errors import Refused
from stoker.gateway.events import SLOW
from stoker.gateway.fields import Body, checked_body
from stoker.gateway.paging import listing, page_of
from stoker.gateway.stored import Store
from stoker.gateway.uploads import form_of, refuse_pages

#: Files that one client may have, and their bytes. What its batches write counts, and is never refused.
MOST_FILES, MOST_STORED = 1000, 16 * 2**30
#: Seconds that `expires_after` may say.
LEAST_LIFETIME = 3600
#: Characters of a name that is kept.
LONGEST_NAME = 255


class UploadBody(Body):
    purpose: Literal["batch", "fine-tune"]
    expires_after_anchor: Literal["created_at"] | None = None
    expires_after_seconds: int | None = None

    #: The name of a field in the form → ours.
    FORM: ClassVar[Mapping[str, str]] = {
        "purpose": "purpose",
        "expires_after[anchor]": "expires_after_anchor",
        "expires_after[seconds]": "expires_after_seconds",
    }

    def lifetime(self) -> int:
        """Seconds. Raises `Refused`."""
        if (self.expires_after_anchor is None) != (self.expires_after_seconds is None):
            message = "expires_after: expected with anchor, which is created_at, and seconds."
            raise Refused(400, message, param="expires_after", code="invalid_value")
        return checked_lifetime(self.expires_after_seconds)


def checked_lifetime(seconds: int | None, field: str = "expires_after") -> int:
    """What the seconds of `field` say, or the default. Raises `Refused`."""
    if seconds is None:
        return FILE_TTL
    if not LEAST_LIFETIME <= seconds <= FILE_TTL:
        message = f"{field}: {seconds} seconds given; allowed: {LEAST_LIFETIME} to {FILE_TTL}."
        raise Refused(400, message, param=field, code="invalid_value")
    return seconds


class Files:
    """The endpoints, for a caller whose key is known."""

    def __init__(self, store: Store) -> None:
        self._store = store
        #: Bytes of each file that is being stored, by its owner and id.
        self._coming: dict[str, dict[str, int]] = {}

    async def upload(self, request: Request, owner: str) -> Response:
        refuse_idempotency(request.headers)
        async with form_of(request) as (file, fields):
            body = _body(fields)
            lifetime, name = body.lifetime(), (file.filename or "file")[:LONGEST_NAME]
            if not file.size:
                raise Refused(400, "file: empty; expected lines of JSON.", param="file", code="invalid_value")
            record = await self._store.new(owner, name, body.purpose, lifetime)
            with self._takes(record, file.size):
                await self._check_room(owner)
                record = await self._stored(record, file)
        return JSONResponse(shown(record))

    async def _stored(self, record: FileRecord, file: UploadFile) -> FileRecord:
        try:
            draft = await self._store.begin(record)
            while data := await file.read(2**20):
                await draft.write(data)
            record = await draft.flush()
            await self._store.keep(record)
        except BaseException:
            await finished(lambda: self._store.remove(record))
            raise
        return record

    @contextmanager
    def _takes(self, record: FileRecord, size: int) -> Iterator[None]:
        """A file that is being stored takes room from now on: others that come meanwhile may not have it."""
        own = self._coming.setdefault(record.owner, {})
        own[record.id] = size
        try:
            yield
        finally:
            del own[record.id]
            if not own:
                self._coming.pop(record.owner, None)

    async def _check_room(self, owner: str) -> None:
        """Whether there is room for all that come. Each knows of those before it."""
        sizes = dict(self._coming[owner])
        async for record in self._store.listed(owner):
            sizes.setdefault(record.id, record.bytes)
        files, stored = len(sizes) - 1, sum(sizes.values())
        if files >= MOST_FILES or stored > MOST_STORED:
            raise Refused(
                400, f"file: you have {files} files and would have {stored} bytes; allowed: {MOST_FILES} files and "
                f"{MOST_STORED} bytes. Delete some: DELETE /v1/files/ID.", param="file", code="files_full",
            )  # fmt: skip

    async def list(self, request: Request, owner: str) -> Response:
        page = page_of(request.query_params, 10_000, ("purpose",))
        purpose = request.query_params.get("purpose")
        found = self._store.listed(owner, newest_first=page.newest_first)
        wanted = (shown(record) async for record in found if purpose in (None, record.purpose))
        return JSONResponse(await listing(wanted, page))

    async def retrieve(self, request: Request, owner: str) -> Response:
        return JSONResponse(shown(await self._asked(request, owner)))

    async def content(self, request: Request, owner: str) -> ContentResponse:
        return ContentResponse(self._store, await self._asked(request, owner))

    async def delete(self, request: Request, owner: str) -> Response:
        refuse_pages(request.headers)
        record = await self._asked(request, owner)
        await self._store.remove(record)
        return JSONResponse({"id": record.id, "object": "file", "deleted": True})

    async def _asked(self, request: Request, owner: str) -> FileRecord:
        return await self._store.find(request.path_params["file_id"], owner)


def refuse_idempotency(headers: Mapping[str, str]) -> None:
    """Raise `Refused` for the id of a job, where there is none."""
    if "idempotency-key" in headers:
        message = "Idempotency-Key: given for a file, which is no job; leave it out."
        raise Refused(400, message, code="unsupported_parameter")


def _body(fields: Mapping[str, str]) -> UploadBody:
    unknown = [name for name in fields if name not in UploadBody.FORM]
    if unknown:
        allowed = ", ".join(("file", *UploadBody.FORM))
        message = f"{brief(unknown[0])}: no such field. Allowed: {allowed}."
        raise Refused(400, message, param=unknown[0][:80], code="unknown_parameter")
    given: dict[str, object] = {UploadBody.FORM[name]: value for name, value in fields.items()}
    seconds = fields.get("expires_after[seconds]")
    if seconds is not None and seconds.isascii() and seconds.isdecimal() and len(seconds) < 10:
        given["expires_after_seconds"] = int(seconds)
    try:
        return checked_body(UploadBody, given)
    except Refused as refused:
        # As the form calls the field.
        name = next((name for name, ours in UploadBody.FORM.items() if ours == refused.param), str(refused.param))
        message = refused.message.replace(str(refused.param), name, 1)
        raise Refused(refused.status, message, param=name, code=refused.code) from None


def shown(record: FileRecord) -> dict[str, object]:
    """As OpenAI shows a file."""
    return {
        "id": record.id, "object": "file", "bytes": record.bytes, "created_at": int(record.created),
        "expires_at": record.expires, "filename": record.filename, "purpose": record.purpose, "status": "processed",
        "status_details": None,
    }  # fmt: skip


class ContentResponse:
    """What a file holds, part by part, for as long as the client reads on."""

    def __init__(self, store: Store, record: FileRecord) -> None:
        self._store, self._record = store, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `Refused` where nothing was sent yet, and for a client that has left, or reads nothing any more."""
        headers = {
            "content-type": "application/octet-stream",
            "content-length": str(self._record.bytes),
            "content-disposition": f"attachment; filename*=utf-8''{quote(self._record.filename, safe='')}",
        }
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
        gone = asyncio.ensure_future(_left(receive))
        try:
            async with aclosing(self._store.read(self._record)) as parts:
                # Before the first one is there nothing is promised.
                part = await anext(parts, b"")
                await send(start)
                while part:
                    await _sent(send, part, gone)
                    part = await anext(parts, b"")
        finally:
            gone.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _sent(send: Send, part: bytes, gone: asyncio.Future[None]) -> None:
    """In pieces: one may take a slow client some time."""
    view = memoryview(part)
    for start in range(0, len(view), 2**16):
        if gone.done():
            raise Refused(499, "the client has gone.", code="client_gone")
        try:
            async with asyncio.timeout(SLOW):
                body = bytes(view[start : start + 2**16])
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except TimeoutError:
            raise Refused(499, "the client has gone.", code="client_gone") from None

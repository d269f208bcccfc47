"""Files that clients store: written and read part by part, never whole in memory; found by their owner alone."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from stoker.broker.connection import translated
from stoker.broker.stored_files import FileRecord, Span, StoredFiles, is_id
from stoker.client._async.client import AsyncClient
from stoker.client.asynchronously import in_thread
from stoker.contract.shown import as_json
from stoker.files.contents import PART, Contents, contents_of, there_are
from stoker.gateway.errors import Refused

log = logging.getLogger(__name__)
#: Seconds for which parts are kept of a file that is not whole, from its last part on.
UNFINISHED = 3600.0


class Store:
    """The files of all clients, over one broker and one place."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._contents: Contents | None = None

    @property
    def records(self) -> StoredFiles:
        return StoredFiles(self._client.redis)

    async def contents(self) -> Contents:
        """Made when it is first needed: a gateway that stores nothing makes no folder."""
        if self._contents is None:
            self._contents = await in_thread(contents_of, self._client.settings)
        return self._contents

    async def is_used(self) -> bool:
        """Whether a file may have been stored in this place."""
        return self._contents is not None or await in_thread(there_are, self._client.settings)

    async def now(self) -> float:
        """The broker's clock."""
        with translated(self._client.settings):
            return await self.records.now()

    async def find(self, file_id: str, owner: str, field: str | None = None) -> FileRecord:
        """Raises `Refused` for a file that this owner does not have. `field`: of a request, which names it; None: the
        path does."""
        with translated(self._client.settings):
            record = await self.records.find(file_id, owner)
        if record is None:
            said = f"{as_json(file_id, 80)} given; there is no file of that id. GET /v1/files lists yours."
            raise Refused(404, f"{field or 'file'}: {said}", param=field or "id", code="file_not_found")
        return record

    async def listed(self, owner: str, *, newest_first: bool = True) -> AsyncIterator[FileRecord]:
        """Every file of this owner."""
        with translated(self._client.settings):
            async for record in self.records.listed(owner, newest_first=newest_first):
                yield record

    async def read(self, record: FileRecord) -> AsyncGenerator[bytes]:
        """What it holds, part by part. Raises `Refused`."""
        contents = await self.contents()
        if record.place != contents.place:
            raise Refused(
                503, f"file: {record.id} lies where another gateway stores files; ask that one, or give both the same "
                "STOKER_ARTIFACTS, or the same STOKER_HOME.", code="file_elsewhere",
            )  # fmt: skip
        for part in record.parts():
            with said(record.id, "read"):
                yield await in_thread(contents.get, record.id, part)

    async def begin(self, record: FileRecord, until: float | None = None) -> Draft:
        """Write on, behind what there is of it. `until`: when parts go that nothing names by then, by the broker's
        clock; usually in an hour."""
        with translated(self._client.settings):
            until = await self.records.now() + UNFINISHED if until is None else until
            await self.records.reserve(record.place, record.id, until)
        return Draft(await self.contents(), record)

    async def new(self, owner: str, filename: str, purpose: str, lifetime: int) -> FileRecord:
        """A file that nobody sees yet. `lifetime`: seconds from now on."""
        place = (await self.contents()).place
        created = await self.now()
        return FileRecord(
            id=f"file-{uuid.uuid4().hex}", owner=owner, filename=filename, purpose=purpose, created=created,
            expires=int(created) + lifetime, place=place,
        )  # fmt: skip

    async def keep(self, record: FileRecord) -> None:
        """From now on its owner sees it."""
        with translated(self._client.settings):
            await self.records.keep(record)

    async def remove(self, record: FileRecord) -> None:
        with translated(self._client.settings):
            await self.records.forget(record)
        if record.place == (await self.contents()).place:
            await self._clear(record.id, record.place)

    async def sweep(self) -> None:
        """Delete the parts of files that have expired, were deleted, or whose writer died."""
        if not await self.is_used():
            return
        place = (await self.contents()).place
        with translated(self._client.settings):
            over = await self.records.over(place)
        for file_id in over:
            await self._clear(file_id, place)

    async def _clear(self, file_id: str, place: str) -> None:
        try:
            # What another program wrote there is no name of a folder.
            if is_id(file_id):
                await in_thread((await self.contents()).remove, file_id)
        except OSError as error:
            # The next sweep tries again.
            log.warning("the parts of file %s cannot be deleted: %s", file_id, error)
            return
        with translated(self._client.settings):
            await self.records.gone(place, file_id)


@dataclass
class Draft:
    """A file that grows. `record`: what there is of it for good."""

    contents: Contents
    record: FileRecord
    _writer: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _waiting: bytearray = field(default_factory=bytearray)

    async def write(self, data: bytes) -> None:
        """Raises `Refused` for a disk that takes nothing."""
        self._waiting += data
        while len(self._waiting) >= PART:
            await self._put(bytes(self._waiting[:PART]))
            del self._waiting[:PART]

    async def flush(self) -> FileRecord:
        """Write what waits, as a part that may be smaller than others."""
        if self._waiting:
            await self._put(bytes(self._waiting))
            self._waiting.clear()
        return self.record

    async def _put(self, data: bytes) -> None:
        *before, last = self.record.spans or (Span(writer=self._writer, parts=0),)
        if last.writer != self._writer:
            before, last = [*before, last], Span(writer=self._writer, parts=0)
        try:
            with said(self.record.id, "written"):
                await in_thread(self.contents.put, self.record.id, f"{self._writer}-{last.parts}", data)
        except BaseException:
            # It may be written yet, by a thread that nobody can stop: no other part gets its name.
            self._writer = uuid.uuid4().hex[:16]
            raise
        spans = (*before, Span(writer=self._writer, parts=last.parts + 1))
        self.record = self.record.model_copy(update={"spans": spans, "bytes": self.record.bytes + len(data)})


@contextmanager
def said(file_id: str, what: str) -> Iterator[None]:
    """A disk, or a store, that does not do what it is asked to: `Refused`."""
    try:
        yield
    except FileNotFoundError:
        message = f"file: {file_id} was deleted, or its parts were; upload it again."
        raise Refused(404, message, param="id", code="file_not_found") from None
    except OSError as error:
        log.warning("file %s cannot be %s: %s", file_id, what, error)
        message = (
            f"file: {file_id} cannot be {what} ({error.strerror or error}); the gateway's operator has to mend that."
        )
        raise Refused(507, message, code="storage_failed") from None

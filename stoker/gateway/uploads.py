"""The body of an upload: `multipart/form-data`, on disk before anything of it is looked at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from stoker.contract.shown import brief
from stoker.gateway.errors import Refused

#: Bytes of a file, and of all the rest of a request with one.
MOST_BYTES, MOST_FIELDS = 512 * 2**20, 2**20
#: Seconds that a client may send nothing, and that the whole may take.
SILENT, WITHIN = 30.0, 3600.0


def refuse_pages(headers: Mapping[str, str]) -> None:
    """Raise `Refused` for a page of a browser: it may send a form, or nothing at all, without being asked for leave,
    and says then where it is from."""
    if "origin" in headers:
        message = "Origin: given; pages of a browser may not ask. Ask from a program of your own."
        raise Refused(403, message, code="origin_not_allowed")


@asynccontextmanager
async def form_of(request: Request) -> AsyncIterator[tuple[UploadFile, dict[str, str]]]:
    """The file and the other fields. Raises `Refused`."""
    refuse_pages(request.headers)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise Refused(415, f"Content-Type: {brief(kind.decode('latin-1'))} given; expected multipart/form-data.")
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise Refused(415, f"Content-Type: charset {brief(charset)} given; expected utf-8.")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > MOST_BYTES + MOST_FIELDS:
        raise _too_large()
    parser = MultiPartParser(request.headers, _bounded(request), max_files=1, max_fields=8, max_part_size=64 * 1024)
    try:
        async with asyncio.timeout(WITHIN):
            form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"the body cannot be read as multipart/form-data ({error.message.rstrip('.')}).") from None
    except OSError as error:
        raise Refused(
            507, f"file: it cannot be kept ({error.strerror}).", param="file", code="storage_failed"
        ) from None
    except TimeoutError:
        raise Refused(408, f"the body did not come within {WITHIN:g} s; send less.", code="timeout") from None
    except ClientDisconnect:
        raise Refused(499, "the client has gone.", code="client_gone") from None
    try:
        yield _split(form)
    finally:
        await form.close()


async def _bounded(request: Request) -> AsyncGenerator[bytes]:
    size, stream = 0, request.stream()
    while True:
        try:
            async with asyncio.timeout(SILENT):
                piece = await anext(stream, None)
        except TimeoutError:
            raise Refused(408, f"the body stopped for {SILENT:g} s; send it at once.", code="timeout") from None
        if piece is None:
            return
        size += len(piece)
        if size > MOST_BYTES + MOST_FIELDS:
            raise _too_large()
        yield piece


def _split(form: FormData) -> tuple[UploadFile, dict[str, str]]:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise Refused(400, "file: missing; it has to be given.", param="file", code="missing_required_parameter")
    if file.size is not None and file.size > MOST_BYTES:
        raise _too_large()
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise Refused(400, f"{name}: given twice.", param=name, code="invalid_value")
        if name != "file" and isinstance(value, str):
            fields[name] = value
    return file, fields


def _too_large() -> Refused:
    message = f"file: larger than {MOST_BYTES} bytes, the most that a file may have; send several."
    return Refused(413, message, param="file", code="request_too_large")

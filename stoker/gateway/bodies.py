"""The body of a request, within bounds of size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from stoker.contract.shown import brief
from stoker.gateway.errors import Refused

#: Bytes: a job takes 8 million characters, and JSON may write one with several bytes.
MOST_BYTES = 16 * 2**20
#: Seconds that a client may take to send it.
READ_WITHIN = 60.0


async def read_body(request: Request) -> bytes:
    """Raises `Refused`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site may send any other type without being asked for leave.
        raise Refused(415, f"Content-Type: {brief(kind)} given; expected application/json.")
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() not in ("", "identity"):
        raise Refused(415, f"Content-Encoding: {brief(coding)} given; send the body as it is, not compressed.")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > MOST_BYTES:
        raise _too_large()
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(READ_WITHIN):
            async for part in request.stream():
                size += len(part)
                if size > MOST_BYTES:
                    raise _too_large()
                parts.append(part)
    except TimeoutError:
        message = f"the body did not come within {READ_WITHIN:g} s; send it at once."
        raise Refused(408, message, code="timeout") from None
    except ClientDisconnect:
        raise Refused(499, "the client has gone.", code="client_gone") from None
    return b"".join(parts)


def _too_large() -> Refused:
    message = f"the body is larger than {MOST_BYTES} bytes; send less, or several requests."
    return Refused(413, message, code="request_too_large")

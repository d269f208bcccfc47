"""Sending a job whose caller may leave before it is known whether it was taken."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from stoker.client._async.link import AsyncLink
from stoker.client.asynchronously import LEFT, finished
from stoker.contract import Request
from stoker.errors import StokerError


async def send(link: AsyncLink, request: Request, job_id: str, data: bytes = b"", *, made: bool) -> None:
    """`made`: the id was made for this call. A caller that is cancelled meanwhile never learns it, and the job would
    run for nobody: it is cancelled. One under an id of the caller's own goes on, so that the call can be repeated."""
    try:
        await link.submit(request, job_id, data)
    except LEFT:
        if made:
            await finished(partial(_take_back, link, job_id))
        raise


async def _take_back(link: AsyncLink, job_id: str) -> None:
    with suppress(StokerError):
        await link.cancel(job_id)

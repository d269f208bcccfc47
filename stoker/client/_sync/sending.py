# Generated from stoker/client/_async/sending.py by `make format`: edit that file.
"""Sending a job whose caller may leave before it is known whether it was taken."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

from stoker.client._sync.link import Link
from stoker.client.blocking import LEFT, finished
from stoker.contract import Request
from stoker.errors import StokerError


def send(link: Link, request: Request, job_id: str, data: bytes = b"", *, made: bool) -> None:
    """`made`: the id was made for this call. A caller that is cancelled meanwhile never learns it, and the job would
    run for nobody: it is cancelled. One under an id of the caller's own goes on, so that the call can be repeated."""
    try:
        link.submit(request, job_id, data)
    except LEFT:
        if made:
            finished(partial(_take_back, link, job_id))
        raise


def _take_back(link: Link, job_id: str) -> None:
    with suppress(StokerError):
        link.cancel(job_id)

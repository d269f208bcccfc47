"""Commands that watch jobs, send dead ones again, and cancel."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stoker.broker import ledger, letters
from stoker.broker.connection import translated
from stoker.broker.ledger.listing import OpenJob
from stoker.broker.ledger.record import summary
from stoker.cli.options import Json, Url, connect, print_json
from stoker.client import Client
from stoker.contract.kinds import KINDS
from stoker.contract.shown import brief, printable
from stoker.errors import InvalidRequest, JobLost


def list_jobs(as_json: Json = False, url: Url = None) -> None:
    """List jobs that have not ended: waiting or running, and on which worker."""
    with connect(url) as client:
        found = client.jobs()
    if as_json:
        print_json(found)
        return
    for job_id, record in found.items():
        state = f"running on {record['worker']}" if "worker" in record else "waiting"
        who = f"{record['client']}, priority {record['priority']}"
        print(f"{job_id}  {record['kind']:8} {record['model']:24} {who}, {state}, {record['age']:.0f} s old")


def list_dead(as_json: Json = False, url: Url = None) -> None:
    """List dead letters: jobs that crashed one worker after another, and messages that cannot be read."""
    with connect(url) as client:
        found = client.dead()
    if as_json:
        print_json(found)
        return
    for job_id, letter in found.items():
        workers = ", ".join(
            crash["worker"] + (f" ({crash['trouble']})" if "trouble" in crash else "") for crash in letter["history"]
        )
        how = "cannot be read, says" if letter["kind"] == letters.MESSAGE else "dead-lettered after"
        # Any client of the broker may have written it.
        print(printable(f"{job_id}  {letter['kind']:8} {letter['model']:24} {how} {workers or 'its letter'}"))
        if "message" in letter:
            print(printable(f"    {letter['bytes']} bytes, base64: {letter['message']}"))


def retry(
    job_id: Annotated[str, typer.Argument(help="As `stoker jobs dead` lists it.")],
    url: Url = None,
) -> None:
    """Send a dead job again, under its own id."""
    with connect(url) as client:
        print(f"{client.retry(job_id).id}: sent again")


def cancel(
    job_id: Annotated[str, typer.Argument(help="As printed when the job was sent, or shown in Flower.")],
    url: Url = None,
) -> None:
    """Stop a job, whether it waits or runs."""
    with connect(url) as client:
        print(_cancelled(client, job_id))


def cancel_many(
    job_ids: Annotated[list[str] | None, typer.Argument(help="Jobs to stop.", metavar="JOB_ID")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every job that has not ended.")] = False,
    model: Annotated[str | None, typer.Option(help="The jobs of this model.")] = None,
    kind: Annotated[str | None, typer.Option(help="The jobs of this kind: embed, generate, train, adapters.")] = None,
    url: Url = None,
) -> None:
    """Stop jobs: those that are named, or all of a model, a kind or the broker."""
    if bool(job_ids) == (everything or model is not None or kind is not None):
        raise InvalidRequest("jobs cancel: name jobs by their ids, or say which: --all, --model, --kind; not both.")
    _check_kind(kind)
    with connect(url) as client:
        chosen = job_ids or [job_id for job_id, job in client.jobs().items() if _is_meant(job, model, kind)]
        known = _cancel_each(client, chosen)
    if job_ids and known < len(job_ids):
        # A program learns it by the exit code.
        raise JobLost(f"{len(job_ids) - known} of {len(job_ids)} jobs are not known; see above.")


def purge(
    model: Annotated[str | None, typer.Option(help="Only the jobs of this model.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only the jobs of this kind.")] = None,
    url: Url = None,
) -> None:
    """Stop every job that waits; those that run go on."""
    _check_kind(kind)
    with connect(url) as client:
        waiting = {job_id: job for job_id, job in client.jobs().items() if "worker" not in job}
        chosen = [job_id for job_id, job in waiting.items() if _is_meant(job, model, kind)]
        with translated(client.settings):
            stopped = [job_id for job_id in chosen if _is_stopped(client.redis, job_id)]
    print(f"{len(stopped)} jobs")


def _is_stopped(redis: Any, job_id: str) -> bool:
    """Whether the job waited still. The broker decides that: workers go on taking jobs, and one that was taken since
    the jobs were listed runs on."""
    queue = summary(job_id).on(redis).queue
    stopped = queue is not None and ledger.refuse(redis, job_id, queue, ledger.revoked(job_id))
    print(f"{job_id}: stopped" if stopped else f"{job_id}: left alone; it does not wait any more")
    return stopped


def _check_kind(kind: str | None) -> None:
    if kind is not None and kind not in KINDS:
        raise InvalidRequest(f"kind: {brief(kind)} given; {', '.join(KINDS)} are allowed.")


def _is_meant(job: OpenJob, model: str | None, kind: str | None) -> bool:
    return model in (None, job["model"]) and kind in (None, job["kind"])


def _cancel_each(client: Client, job_ids: list[str]) -> int:
    """How many were known. One that is not (any more) is named, and does not hinder the others."""
    known = 0
    for job_id in job_ids:
        try:
            print(_cancelled(client, job_id))
            known += 1
        except JobLost as error:
            print(f"{job_id}: {error}")
    print(f"{known} jobs")
    return known


def _cancelled(client: Client, job_id: str) -> str:
    job = client.job(job_id)
    job.cancel()
    return f"{job_id}: asked to stop; it was {job.status()}"

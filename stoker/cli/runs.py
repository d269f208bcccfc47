"""`stoker runs`: the training runs whose folders are under STOKER_HOME."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.broker.outcome import JobStatus
from stoker.cli.options import Json, Url, connect, print_json
from stoker.cli.train import follow, outcome
from stoker.client import Client, Job, TrainJob
from stoker.errors import ConfigError, InvalidRequest, JobLost
from stoker.files.durable import remove_folder, write_whole
from stoker.local.runs import DONE, PIN_FILE, StoredRun, find_run, stored_runs
from stoker.settings import load_settings

RunId = Annotated[
    str, typer.Argument(help="Its id, the start of it, or an adapter's name: then its newest run.", metavar="RUN")
]


def list_runs(as_json: Json = False) -> None:
    """List the runs on this machine, newest first. One that cannot be read is a line of its own, on standard error."""
    found = sorted(stored_runs(load_settings().runs, _say), key=lambda run: run.changed, reverse=True)
    if as_json:
        print_json([run.plain() for run in found])
        return
    for run in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        progress = f"step {run.reports[-1]['step'] if run.reports else 0}/{run.asked['steps']}"
        print(f"{run.id}  {when}  {run.asked['name']:20} {progress:16} {run.status}")


def show(run: RunId, as_json: Json = False) -> None:
    """Show a run: what was asked, and its losses."""
    found = _found(run)
    if as_json:
        print_json(found.plain())
        return
    print(f"{found.id}: {found.status}")
    print("  " + ", ".join(f"{name} {value}" for name, value in found.asked.items() if name not in ("name", "dataset")))
    reports = found.reports
    for report in reports[:: max(1, len(reports) // 20)]:
        held_out = report.get("held_out_loss")
        said = "" if held_out is None else f"  held out {held_out:.4f}"
        print(f"  step {report['step']:6}  loss {report['loss']:.4f}{said}  rate {report['learning_rate']:.3g}")
    for report in reports:
        if report["note"]:
            print(f"  {report['note']}")


def plot(
    run: RunId, out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write; its suffix says which kind.")]
) -> None:
    """Draw a run's losses and learning rate."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed: pip install '.[plot]', from a checkout.") from None
    found = _found(run)
    reports = found.reports
    if not reports:
        raise InvalidRequest(f"run {run!r}: no step of it has been reported yet.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([report["step"] for report in reports], [report["loss"] for report in reports], label="loss")
    held_out = [report for report in reports if report["held_out_loss"] is not None]
    if held_out:
        losses = [report["held_out_loss"] for report in held_out]
        axes.plot([report["step"] for report in held_out], losses, "o-", label="held-out loss")
    axes.set(xlabel="step", ylabel="loss (nats)", title=found.id)
    rates = axes.twinx()
    rates.plot(
        [report["step"] for report in reports], [report["learning_rate"] for report in reports], color="grey", alpha=0.5
    )
    rates.set_ylabel("learning rate")
    axes.legend()
    try:
        write_whole(out, figure.savefig)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{out}: cannot be written ({error}).") from None
    print(out)


def attach(run: RunId, url: Url = None) -> None:
    """Follow a run that waits or goes on, from its first report. Ctrl-C leaves the run going."""
    with connect(url) as client:
        job = _job(client, run)
        if not isinstance(job, TrainJob):
            raise InvalidRequest(f"{job.id}: no training run. `stoker jobs list` says what it is.")
        result = follow(job)
        print(f"adapter {result.adapter}@{result.version}: {outcome(result)}")


def remove(run: RunId, url: Url = None) -> None:
    """Delete the folder of a run that has ended: its log and its checkpoints. The adapter that it made stays."""
    found = _found(run)
    if found.status != DONE and (not found.has_ended or load_settings(url=url).chosen_url is not None):
        with connect(url) as client:
            _refuse_open(client, found)
    try:
        remove_folder(found.folder)
    except OSError as error:
        raise ConfigError(f"{found.folder}: cannot be deleted ({error}).") from None
    print(f"{found.id}: deleted")


def pin(
    run: RunId, off: Annotated[bool, typer.Option("--off", help="Let it go with the others again.")] = False
) -> None:
    """Keep the folder of a run where `stoker clean` or the limits would delete it. `stoker runs remove` still does."""
    found = _found(run)
    file = found.folder / PIN_FILE
    try:
        if off:
            file.unlink(missing_ok=True)
        else:
            file.touch(mode=0o600)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be {'deleted' if off else 'made'} ({error}).") from None
    print(f"{found.id}: {'not pinned any more' if off else 'pinned'}")


def _refuse_open(client: Client, run: StoredRun) -> None:
    """A run whose worker died says that it runs, and one that failed does not say that its job was sent again; only the
    broker knows whether a worker will go on with it."""
    try:
        status = client.job(run.id).status()
    except JobLost:
        return
    if status in (JobStatus.QUEUED, JobStatus.RUNNING):
        raise InvalidRequest(f"run {run.id} is {status}. `stoker cancel {run.id}` ends it; then it can be removed.")


def _say(error: InvalidRequest) -> None:
    print(error, file=sys.stderr)


def _found(run: str) -> StoredRun:
    return find_run(load_settings().runs, run)


def _job(client: Client, run: str) -> Job[Any]:
    """The run may lie on another machine: then its id alone says which."""
    try:
        job_id = _found(run).id
    except InvalidRequest as error:
        try:
            return client.job(run)
        except JobLost:
            raise InvalidRequest(f"{error} Nor does the broker know a job of that id.") from None
    return client.job(job_id)

"""Training runs in the form of `/v1/fine_tuning/jobs`: jobs, their events, their checkpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from pydantic import ValidationError

from stoker.broker.fine_tunes import Ending, FineTune
from stoker.contract import TrainReport
from stoker.gateway.fine_tuning_state import Standing

#: Reports that are fetched at once.
STRIDE = 256
#: Reports of a run below an index (None: the newest ones), the newest first.
Reports = Callable[[int | None, int], Awaitable[list[bytes]]]


def name_of(record: FineTune, ending: Ending) -> str:
    """What the model is asked for by: the adapter, or this version where it does not serve under the bare name."""
    version = "" if record.promote else f"@{ending.version}"
    return f"{record.model}:{record.adapter}{version}"


def job_object(record: FineTune, standing: Standing) -> dict[str, object]:
    ending = standing.ending
    done = ending is not None and ending.status == "succeeded"
    hyper = {
        "n_epochs": record.epochs, "batch_size": record.batch_size, "learning_rate_multiplier": record.multiplier,
    }  # fmt: skip
    return {
        "id": record.id, "object": "fine_tuning.job", "created_at": record.created, "model": record.model,
        "fine_tuned_model": name_of(record, ending) if ending is not None and done else None,
        "finished_at": None if ending is None else ending.finished, "status": standing.status,
        "error": _error(ending), "organization_id": record.owner, "result_files": [], "seed": record.seed,
        "trained_tokens": None if ending is None else ending.tokens, "training_file": record.training_file,
        "validation_file": record.validation_file, "estimated_finish": None, "integrations": [],
        "metadata": record.metadata, "hyperparameters": hyper,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}},
    }  # fmt: skip


def _error(ending: Ending | None) -> dict[str, object] | None:
    if ending is None or ending.status != "failed":
        return None
    return {"code": ending.code, "message": ending.message, "param": None}


async def events(
    record: FineTune, standing: Standing, reports: Reports, after: str | None
) -> AsyncIterator[dict[str, object]]:
    """What happened in the run, the newest first, from the one of the id `after` on."""
    ended, created = f"ftevent-{record.id}-ended", f"ftevent-{record.id}-created"
    below = _index(record, after)
    if standing.ending is not None and (after in (None, ended)):
        yield _ended(record, standing.ending, ended)
    if after != created:
        async for report in _reports(reports, below):
            yield _step(record, report)
    yield _event(created, record.created, f"Created fine-tuning job: {record.id}")


def _index(record: FineTune, after: str | None) -> int | None:
    """Below which reports come; None: below none, as from the newest on."""
    index = (after or "").removeprefix(f"ftevent-{record.id}-")
    return int(index) + 1 if index.isascii() and index.isdecimal() and len(index) < 10 else None


async def _reports(reports: Reports, below: int | None) -> AsyncIterator[TrainReport]:
    while raw := await reports(below, STRIDE):
        for entry in raw:
            try:
                report = TrainReport.model_validate_json(entry)
            except ValidationError:
                # What another program wrote there: nothing is known of reports under it.
                return
            yield report
            below = report.index


def _ended(record: FineTune, ending: Ending, event_id: str) -> dict[str, object]:
    if ending.status == "succeeded":
        said, level = f"The job has successfully completed; new model: {name_of(record, ending)}", "info"
    else:
        said, level = f"The job has {ending.status}: {ending.message}", "error"
    return _event(event_id, ending.finished, said if ending.status != "cancelled" else "The job was cancelled", level)


def _step(record: FineTune, report: TrainReport) -> dict[str, object]:
    created = record.created if report.published is None else int(report.published)
    event_id = f"ftevent-{record.id}-{report.index}"
    if report.note:
        return _event(event_id, created, report.note, "warn")
    held_out = "" if report.held_out_loss is None else f", validation loss={report.held_out_loss:.4f}"
    event = _event(event_id, created, f"Step {report.step}/{report.steps}: training loss={report.loss:.4f}{held_out}")
    numbers = {
        "step": report.step, "total_steps": report.steps, "epoch": report.epoch, "train_loss": report.loss,
        "valid_loss": report.held_out_loss, "learning_rate": report.learning_rate,
        "gradient_norm": report.gradient_norm, "tokens": report.tokens,
    }  # fmt: skip
    return event | {"type": "metrics", "data": numbers}


def _event(event_id: str, created: int, message: str, level: str = "info") -> dict[str, object]:
    return {
        "id": event_id, "object": "fine_tuning.job.event", "created_at": created, "level": level, "message": message,
        "type": "message", "data": None,
    }  # fmt: skip


async def checkpoints(record: FineTune, standing: Standing) -> AsyncIterator[dict[str, object]]:
    """What can be asked for: the version that the run made. Those from which a run goes on are no models."""
    ending = standing.ending
    if ending is not None and ending.version is not None:
        metrics = {"step": ending.step, "train_loss": ending.loss, "full_valid_loss": ending.held_out_loss}
        yield {
            "id": f"ftckpt-{record.id}-{ending.version}", "object": "fine_tuning.job.checkpoint",
            "created_at": ending.finished, "fine_tuning_job_id": record.id, "step_number": ending.step,
            "fine_tuned_model_checkpoint": f"{record.model}:{record.adapter}@{ending.version}", "metrics": metrics,
        }  # fmt: skip

"""Where a training job's examples are: uploaded to the broker, or a file under this worker's data root."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from stoker.broker import keys
from stoker.contract.beneath import Beneath
from stoker.contract.dataset import ON_WORKER
from stoker.contract.names import Rule, checked
from stoker.contract.shown import trouble
from stoker.contract.uploads import Upload
from stoker.errors import DatasetError
from stoker.files.durable import draft_folder
from workers import uploads
from workers.job import Job


def fetch(job: Job, dataset: str) -> bytes | Path | Beneath | None:
    """The JSON lines, or their file; None if an upload has expired. Raises `DatasetError` for a file that is not
    there or lies outside the root."""
    if not dataset.startswith(ON_WORKER):
        return _uploaded(job, dataset)
    name, root = dataset.removeprefix(ON_WORKER), job.runtime.settings.data
    if root is None:
        raise DatasetError(
            f"dataset: {name!r} of the worker named; this one has no data root. Set STOKER_DATA there, or upload it."
        )
    file = Beneath(root, name)
    try:
        # Opened again when it is read, in the same way.
        file.open().close()
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"dataset: {name!r} of the worker named; there is no such file under its data root ({trouble(error)})."
        ) from None
    return file


def _uploaded(job: Job, dataset: str) -> bytes | Path | None:
    """A large one as a file in the run's folder: neither the worker nor the broker ever handles it in one piece.

    The file goes when the job is done here. The upload stays until the ledger ends the job: another worker may need it.
    """
    upload = Upload.parse(dataset, "dataset", job.id)
    if upload.size <= keys.PART:
        return uploads.read(job.runtime.redis, upload)
    if not job.runtime.redis.exists(keys.blob(dataset)):
        return None
    run = job.runtime.settings.runs / checked(Rule.JOB_ID, "job id", job.id)
    with ExitStack() as made:
        # Of this delivery alone: one that was overtaken may end while the next owner reads its own. Those of deliveries
        # that died are swept.
        path = Path(made.enter_context(draft_folder(run)), "dataset.jsonl")
        with path.open("wb") as file:
            for part in uploads.parts(job.runtime.redis, upload):
                file.write(part)
        job.resources.push(made.pop_all())
    return path

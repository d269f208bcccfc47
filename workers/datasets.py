"""Where a training job's examples are: uploaded to the broker, or a file under this worker's data root."""

from __future__ import annotations

from pathlib import Path

from stoker import keys
from stoker.contract.dataset import ON_WORKER
from stoker.errors import DatasetError
from workers.frame import Run


def fetch(run: Run, dataset: str) -> bytes | Path | None:
    """The JSON lines, or their file; None if an upload has expired. Raises `DatasetError` for a file that is not
    there or lies outside the root."""
    if not dataset.startswith(ON_WORKER):
        uploaded: bytes | None = run.runtime.redis.get(keys.blob(dataset))
        return uploaded
    name, root = dataset.removeprefix(ON_WORKER), run.runtime.settings.data
    if root is None:
        raise DatasetError(
            f"dataset: {name!r} of the worker named; this one has no data root. Set STOKER_DATA there, or upload it."
        )
    path = (root / name).resolve()
    # Once links are followed: a link may lead out as well as dots.
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        raise DatasetError(f"dataset: {name!r} of the worker named; there is no such file under its data root.")
    return path


def forget(run: Run, dataset: str) -> None:
    """Delete an upload that is no longer needed."""
    if not dataset.startswith(ON_WORKER):
        run.runtime.redis.delete(keys.blob(dataset))

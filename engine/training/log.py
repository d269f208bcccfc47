"""A run's reports on disk, a JSON line each, for people and for plots."""

from __future__ import annotations

from pathlib import Path

from stoker.contract import TrainReport
from stoker.files.durable import flush, write_whole


class RunLog:
    """Appends to `path`. A line may be lost or cut short when the machine dies; `keep` mends that on resuming."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def keep(self, reports: int) -> None:
        """Drop what was reported after the checkpoint that the run goes on from: it will be reported again."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            lines = []
        kept = [line for line in lines[:reports] if line.endswith(b"\n")]
        write_whole(self._path, lambda temporary: temporary.write_bytes(b"".join(kept)))

    def tail(self, most: int) -> list[TrainReport]:
        """The last reports."""
        lines = self._path.read_bytes().splitlines()[-most:]
        return [TrainReport.model_validate_json(line) for line in lines]

    def append(self, report: TrainReport) -> None:
        with open(self._path, "ab") as file:
            file.write(report.model_dump_json().encode() + b"\n")
            file.flush()

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never knows of more reports than the log."""
        flush(self._path)

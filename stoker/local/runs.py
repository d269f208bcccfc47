"""The folders of training runs under STOKER_HOME, as the engine writes them. Read without trust."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.contract.names import Rule, follows
from stoker.errors import InvalidRequest

RUN_FILE = "run.json"
LOG_FILE = "log.jsonl"
#: A file in a run's folder that keeps it (`stoker runs pin`).
PIN_FILE = "pinned"
#: The status of a run that has not ended.
RUNNING = "running"


@dataclass(frozen=True)
class StoredRun:
    """`changed`: seconds since the epoch. `facts`: the content of `run.json`. `reports`: those that are on disk."""

    folder: Path
    changed: float
    facts: dict[str, Any]
    reports: list[dict[str, Any]]

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def asked(self) -> dict[str, Any]:
        """The request."""
        return dict(self.facts["request"])

    @property
    def status(self) -> str:
        return str(self.facts["status"])

    @property
    def has_ended(self) -> bool:
        return self.status != RUNNING

    @property
    def is_pinned(self) -> bool:
        return (self.folder / PIN_FILE).exists()

    def plain(self) -> dict[str, Any]:
        return {"run": self.id, "changed": self.changed, **self.facts, "reports": self.reports}


def stored_runs(root: Path) -> Iterator[StoredRun]:
    """Every run in the folder `root`, by id. Raises `InvalidRequest` for one that cannot be read."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if (folder / RUN_FILE).is_file():
            yield read_run(folder)


def read_run(folder: Path) -> StoredRun:
    """Raises `InvalidRequest`."""
    try:
        facts: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
        log = folder / LOG_FILE
        lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
        # The last line may be on its way.
        reports = [json.loads(line) for line in lines if line.endswith(b"\n")]
        run = StoredRun(folder, (folder / RUN_FILE).stat().st_mtime, facts, reports)
        _ = run.asked["name"], run.asked["steps"], run.status
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidRequest(f"{folder}: cannot be read ({error!r}).") from None
    return run


def find_run(root: Path, given: str) -> StoredRun:
    """The run that `given` means: its id, the start of just one id, or the name of an adapter, whose newest run it is.

    Raises `InvalidRequest`.
    """
    if follows(Rule.JOB_ID, given) and (root / given / RUN_FILE).is_file():
        return read_run(root / given)
    runs = list(stored_runs(root))
    by_id = [run for run in runs if run.id.startswith(given)] if given else []
    if len(by_id) > 1:
        raise InvalidRequest(f"run {given!r} given; {len(by_id)} runs start so: {_listed(by_id)}. Give more of the id.")
    by_name = sorted((run for run in runs if run.asked["name"] == given), key=lambda run: run.changed)
    found = by_id or by_name[-1:]
    if not found:
        raise InvalidRequest(f"run {given!r} given; on this machine there are: {_listed(runs) or 'none'}.")
    return found[0]


def _listed(runs: list[StoredRun]) -> str:
    return ", ".join(f"{run.id} ({run.asked['name']})" for run in runs)

"""The folders of training runs under STOKER_HOME, as the engine writes them. Read without trust."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
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
#: That of one that made its adapter.
DONE = "done"
#: Bytes that are read of `run.json` and of a log; real ones have some 1000, and some 300 a report.
MAX_FACTS, MAX_LOG = 16 << 20, 1 << 30
_Type = type | tuple[type, ...]
#: What commands show of a report.
_REPORT: Mapping[str, _Type] = {
    "step": int,
    "loss": (int, float),
    "learning_rate": (int, float),
    "held_out_loss": (int, float, type(None)),
    "note": str,
}


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


def stored_runs(root: Path, unreadable: Callable[[InvalidRequest], object]) -> Iterator[StoredRun]:
    """Every run in the folder `root`, by id. One that cannot be read hinders no other: `unreadable` gets the reason."""
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if _has_run(folder):
            try:
                yield read_run(folder)
            except InvalidRequest as error:
                unreadable(error)


def read_run(folder: Path) -> StoredRun:
    """Raises `InvalidRequest`, which names the file and what is wrong with it."""
    path, log = folder / RUN_FILE, folder / LOG_FILE
    try:
        facts = _checked(str(path), _json(path, _content(path, MAX_FACTS)), {"request": dict, "status": str})
        _checked(f"{path}, request", facts["request"], {"name": str, "steps": int})
        # The last line may be on its way.
        lines = _content(log, MAX_LOG).splitlines(keepends=True) if os.path.lexists(log) else []
        reports = [_json(log, line) for line in lines if line.endswith(b"\n")]
        for number, report in enumerate(reports, 1):
            _checked(f"{log}, line {number}", report, _REPORT)
        return StoredRun(folder, path.stat().st_mtime, facts, reports)
    except OSError as error:
        raise InvalidRequest(f"{folder}: the run cannot be read ({error}).") from None


def _has_run(folder: Path) -> bool:
    try:
        (folder / RUN_FILE).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        # It may have one; reading it says what is in the way.
        return True
    return True


def _content(path: Path, most: int) -> bytes:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        # A pipe would never end, or never begin.
        raise InvalidRequest(f"{path}: no file, and only those are read.")
    if found.st_size > most:
        raise InvalidRequest(f"{path}: {found.st_size} bytes; at most {most} are read.")
    return path.read_bytes()


def _json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: not JSON ({error}).") from None


def _checked(where: str, found: object, wanted: Mapping[str, _Type]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise InvalidRequest(f"{where}: a {type(found).__name__} given; expected an object.")
    for name, kinds in wanted.items():
        value = found.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            given = f"{name} is {str(value)[:60]!r}" if name in found else f"no {name}"
            raise InvalidRequest(f"{where}: {given}; no run is written so. Delete the folder if nothing needs it.")
    return found


def find_run(root: Path, given: str) -> StoredRun:
    """The run that `given` means: its id, the start of just one id, or the name of an adapter, whose newest run it is.

    Raises `InvalidRequest`.
    """
    if follows(Rule.JOB_ID, given) and _has_run(root / given):
        return read_run(root / given)
    unreadable: list[InvalidRequest] = []
    runs = list(stored_runs(root, unreadable.append))
    by_id = [run for run in runs if run.id.startswith(given)] if given else []
    if len(by_id) > 1:
        raise InvalidRequest(f"run {given!r} given; {len(by_id)} runs start so: {_listed(by_id)}. Give more of the id.")
    by_name = sorted((run for run in runs if run.asked["name"] == given), key=lambda run: run.changed)
    found = by_id or by_name[-1:]
    if not found:
        raise InvalidRequest(
            f"run {given!r} given; on this machine there are: {_listed(runs) or 'none'}."
            + "".join(f"\n{error}" for error in unreadable)
        )
    return found[0]


def _listed(runs: list[StoredRun]) -> str:
    return ", ".join(f"{run.id} ({run.asked['name']})" for run in runs)

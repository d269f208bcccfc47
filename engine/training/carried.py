"""A run's folder as files that another worker can go on from: those of its newest two regular checkpoints, of what was
paused behind them, of the best step, and the reports up to there. Without MLX: workers read and write them in threads
of their own, while the engine trains.

Files of a checkpoint never change, and its folder is there whole or not at all (`checkpoint.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.platform.jsonfiles import NOTES_FILE, read_object
from stoker.errors import ModelError
from stoker.files.durable import draft_folder, make_folders, publish, remove_folder, write_whole

STATE_FILE = "trainer.safetensors"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
#: How the names of checkpoints begin: regular ones, those of a stopping worker, the adapter of the best step.
STEP, PAUSED, BEST = "step-", "paused-", "best-"
#: Regular checkpoints that are kept.
KEEP = 2
_STATE, _BEST = r"step-\d{8,12}|paused-\d{8,12}-\d{8,12}", r"best-\d{8,12}"
#: What folders with a state of the run are called, those with the adapter of the best step, and files that are carried.
#: People and their programs leave others next to them.
STATE, BEST_STEP = re.compile(_STATE), re.compile(_BEST)
FILE = re.compile(
    rf"log\.jsonl|({_STATE}|{_BEST})"
    r"/(adapter_config\.json|adapter_model\.safetensors|trainer\.safetensors|stoker\.json)"
)
#: Tries to open files that the engine deletes meanwhile, because newer ones are there.
_TRIES = 5


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is: it never goes back."""

    reports: int
    micro: int


@dataclass(frozen=True)
class CheckpointNotes:
    """What a checkpoint says of itself."""

    name: str
    position: Position
    best_step: int
    #: Model, base, dataset and request.
    made_of: Mapping[str, Any]


def read_notes(folder: Path) -> CheckpointNotes:
    """Raises `ModelError` for a folder that holds no state of a run."""
    notes = read_object(folder / NOTES_FILE)
    state, made_of = notes.get("state"), notes.get("made_of")
    if isinstance(state, dict) and isinstance(made_of, dict):
        numbers = [state.get(name) for name in ("reports", "micro", "best_step")]
        if all(isinstance(number, int) for number in numbers):
            reports, micro, best_step = numbers
            return CheckpointNotes(folder.name, Position(reports, micro), best_step, made_of)  # type: ignore[arg-type]
    raise ModelError(f"{folder / NOTES_FILE}: holds no state of a run.")


def newest(run: Path) -> CheckpointNotes | None:
    """The newest checkpoint of the run in this folder; None if it has none that can be read."""
    return max(_states(run), key=lambda notes: notes.position, default=None)


def _states(run: Path) -> list[CheckpointNotes]:
    home, found = run / CHECKPOINTS, []
    for folder in home.iterdir() if home.is_dir() else ():
        if STATE.fullmatch(folder.name):
            # It may be deleted meanwhile; of one that is damaged, the engine says so.
            with suppress(ModelError, OSError):
                found.append(read_notes(folder))
    return found


@dataclass(frozen=True)
class OpenFile:
    """`name`: within the run's folder, or that of its checkpoints. `size`: the bytes of it that count."""

    name: str
    file: BinaryIO
    size: int

    def read(self, start: int, size: int) -> bytes:
        self.file.seek(start)
        return self.file.read(min(size, self.size - start))


@dataclass(frozen=True)
class Snapshot:
    """What is carried, open: it stays though the engine deletes it. `files`: in the order in which they have to be
    written, so that a newest checkpoint has all that it needs."""

    notes: CheckpointNotes
    files: Sequence[OpenFile]


def snapshot(run: Path, resources: ExitStack) -> Snapshot | None:
    """The run as of its newest checkpoint; None if there is none. `resources` closes its files."""
    for _ in range(_TRIES):
        states = _states(run)
        if not states:
            return None
        last = max(states, key=lambda notes: notes.position)
        with ExitStack() as opened, suppress(FileNotFoundError):
            files = [_log(run, last.position.reports, opened), *_checkpoints(run / CHECKPOINTS, states, last, opened)]
            resources.push(opened.pop_all())
            return Snapshot(last, files)
    return None


def _log(run: Path, reports: int, opened: ExitStack) -> OpenFile:
    file = opened.enter_context((run / LOG_FILE).open("rb"))
    return OpenFile(LOG_FILE, file, sum(len(line) for line, _ in zip(file, range(reports), strict=False)))


def _checkpoints(
    home: Path, states: Sequence[CheckpointNotes], last: CheckpointNotes, opened: ExitStack
) -> list[OpenFile]:
    regular = sorted((notes for notes in states if notes.name.startswith(STEP)), key=lambda notes: notes.name)[-KEEP:]
    # A run that diverges goes back to the last regular one, and to the best step of that.
    bests = {notes.best_step for notes in (last, *regular[-1:]) if notes.best_step}
    names = [*map(best_name, sorted(bests)), *(notes.name for notes in regular if notes is not last), last.name]
    files = []
    for path in [path for name in names for path in sorted((home / name).iterdir())]:
        known = f"{path.parent.name}/{path.name}"
        if FILE.fullmatch(known):
            file = opened.enter_context(path.open("rb"))
            files.append(OpenFile(known, file, os.fstat(file.fileno()).st_size))
    return files


def best_name(step: int) -> str:
    return f"{BEST}{step:08}"


def install(run: Path, names: Sequence[str], fetch: Callable[[str, Path], object]) -> None:
    """Write the files `names` of a snapshot, in its order; `fetch` fills each. A process that dies in the middle leaves
    the run as it was, or with fewer checkpoints of what it is going to be."""
    make_folders(run)
    home = run / CHECKPOINTS
    for folder in dict.fromkeys(Path(name).parent.name for name in names):
        inside = [name for name in names if Path(name).parent.name == folder]
        if not folder:
            write_whole(run / LOG_FILE, lambda draft: fetch(LOG_FILE, draft))
            continue
        with draft_folder(home) as draft:
            for name in inside:
                fetch(name, draft / Path(name).name)
            # One of this disk may come from before a rollback, or be damaged.
            remove_folder(home / folder)
            publish(draft, home / folder)

"""Runs that are killed at any moment, also within a checkpoint's write: resumed, they repeat bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.training.log import RunLog
from stoker.errors import ModelError
from tests import powercut
from tests.engine.training_child import open_run

OPTIONS: dict[str, Any] = {
    "steps": 24,
    "batch_size": 3,
    "accumulation": 2,
    "checkpoint_every": 5,
    "dropout": 0.2,
    "dora": True,
    "schedule": "cosine",
    "warmup_steps": 3,
    "learning_rate": 5e-3,
    "label_smoothing": 0.1,
    "held_out": 0.2,
    "eval_every": 4,
}
#: What a report says of the machine, not of the run.
NOISE = ("tokens_per_second", "memory_bytes")


def start(home: Path) -> subprocess.Popen[str]:
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.engine.training_child", str(home), json.dumps(OPTIONS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(home: Path, kill_after: int | None) -> int | None:
    """Let a run go for so many of its words and kill it; the words of one that came to its end, else None."""
    with start(home) as process:
        assert process.stdout is not None
        for count, line in enumerate(process.stdout, 1):
            if count == kill_after:
                process.send_signal(signal.SIGKILL)
                break
            if line == "done\n":
                assert process.wait() == 0
                return count
    assert kill_after is not None, "it ended by itself"
    assert process.returncode == -signal.SIGKILL
    return None


def reports(home: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home / "run/log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in report.items() if name not in NOISE} for report in lines]


def check(tmp_path: Path, kills: int, seed: int) -> None:
    words = run(tmp_path / "calm", None)
    assert words is not None
    chance, home, done = random.Random(seed), tmp_path / "killed", 0
    while done < kills:
        # Far enough into a run of any length to land in steps, in checkpoints, and in the beginning.
        if run(home, chance.randint(1, words // 3)) is not None:
            home = tmp_path / f"killed-{done}"
            continue
        done += 1
    while run(home, None) is None:
        pass
    assert reports(home) == reports(tmp_path / "calm")
    assert (home / "end.safetensors").read_bytes() == (tmp_path / "calm/end.safetensors").read_bytes()


def test_a_run_that_is_killed_repeats_bit_for_bit(tmp_path: Path) -> None:
    check(tmp_path, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2, 3])
def test_a_run_that_is_killed_at_twenty_random_moments_repeats_bit_for_bit(tmp_path: Path, seed: int) -> None:
    check(tmp_path, kills=20, seed=seed)


def test_power_that_fails_at_any_moment_of_a_run_leaves_its_checkpoint_and_every_report_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The disk that records knows what would be safe, so the real one need not wait.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    options = {**OPTIONS, "steps": 2, "accumulation": 1, "checkpoint_every": 1, "eval_every": 1, "dora": False}
    (tmp_path / "disk").mkdir()
    with powercut.recorded(tmp_path / "disk") as disk:
        running = open_run(tmp_path / "disk", options)
        while not running.finished:
            if report := running.advance():
                disk.mark(str(report.step))
        running.end("done")
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            again = open_run(after, options)
            assert len(again.reported) == again.state.reports, cut
            assert again.state.step >= len(cut.marks), cut
        assert not cut.finished or json.loads(cut.tree["run/run.json"] or b"")["status"] == "done"


def test_power_that_fails_after_a_pause_leaves_the_pause_and_every_report_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind it another worker may take the run: what this disk has is what it would go on with here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    options = {**OPTIONS, "steps": 3, "accumulation": 2, "checkpoint_every": 3, "eval_every": 3, "dora": False}
    (tmp_path / "disk").mkdir()
    running = open_run(tmp_path / "disk", options)
    with powercut.recorded(tmp_path / "disk") as disk:
        for _ in range(3):
            running.advance()
        running.pause()
        disk.mark("paused")
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            again = open_run(after, options)
            assert len(again.reported) == again.state.reports, cut
            assert (again.state.reports, again.state.micro) == (1, 3) or not cut.marks, cut


def test_a_report_that_was_cut_short_or_lies_behind_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for kept, left in ((9, b"one\ntwo\n"), (1, b"one\n"), (0, b"")):
        (tmp_path / "log.jsonl").write_bytes(b"one\ntwo\nthr")
        log.keep(kept)
        assert (tmp_path / "log.jsonl").read_bytes() == left


def test_checkpoints_say_what_they_are_and_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    running = open_run(tmp_path, {**OPTIONS, "accumulation": 1})
    while not running.finished:
        running.advance()
    *best, last = sorted((tmp_path / "run/checkpoints").iterdir())
    assert [path.name[:9] for path in (*best, last)] == ["best-0000", "step-0000", "step-0000"]
    notes = json.loads((last / "stoker.json").read_text())
    assert notes["global_step"] == 24
    assert notes["made_of"]["request"]["dropout"] == 0.2
    assert {"loss", "learning_rate", "timestamp"} <= notes.keys()


def _say(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        notes = json.loads((folder / "stoker.json").read_text())
        (folder / "stoker.json").write_text(json.dumps({**notes, **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_say(made_of={}), "made of another model and base and dataset and request than this run"),
        (_say(state={"reports": 1}), "holds no state of a run"),
        (_say(state={"reports": 2, "micro": 2, "step": 2}), "no whole state of a run"),
        (lambda folder: (folder / "stoker.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "trainer.safetensors").write_bytes(b"12345678"), "trainer.safetensors"),
    ],
)
def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], why: str
) -> None:
    options = {**OPTIONS, "steps": 2, "accumulation": 1}
    running = open_run(tmp_path, options)
    while not running.finished:
        running.advance()
    damage(tmp_path / "run/checkpoints/step-00000002")
    with pytest.raises(ModelError, match="step-00000002.*" + why):
        open_run(tmp_path, options)

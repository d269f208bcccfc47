"""A run that is carried to another disk, at any moment, is there bit for bit what it would have been here."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from engine.training import carried
from engine.training.run import TrainingRun
from stoker.errors import ModelError
from tests.engine.test_training_kills import NOISE, OPTIONS
from tests.engine.training_child import open_run
from tests.workers.carrying import RunFolder, asked, files

STEPS = {**OPTIONS, "steps": 12, "checkpoint_every": 3, "eval_every": 2, "dora": False}


def carry(source: Path, target: Path) -> carried.Position | None:
    """Where the run is there."""
    with ExitStack() as resources:
        found = carried.snapshot(source, resources)
        if found is None:
            return None
        by_name = {file.name: file for file in found.files}

        def fetch(name: str, draft: Path) -> None:
            draft.write_bytes(by_name[name].read(0, by_name[name].size))

        carried.install(target, list(by_name), fetch)
        return found.notes.position


def finish(run: TrainingRun) -> dict[str, Any]:
    while not run.finished:
        run.advance()
    matrices = run.adapter().matrices
    return {f"{name}.{side}": array for name, sides in matrices.items() for side, array in sides.items()}


def reports(home: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (home / "run/log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in report.items() if name not in NOISE} for report in lines]


@pytest.mark.parametrize("paused", [False, True], ids=["from a checkpoint", "from the middle of a step"])
def test_a_run_that_is_carried_makes_the_same_bit_for_bit(tmp_path: Path, paused: bool) -> None:
    run = open_run(tmp_path / "here", STEPS)
    for _ in range(21):
        run.advance()
    if paused:
        run.pause()
    there = carry(tmp_path / "here/run", tmp_path / "there/run")
    assert there is not None
    assert 0 < there.reports < 12
    assert (there.micro == run.state.micro) == paused
    again = open_run(tmp_path / "there", STEPS)
    assert again.state.reports == len(again.reported) == there.reports
    here, elsewhere = finish(run), finish(again)
    assert here.keys() == elsewhere.keys()
    assert all(mx.array_equal(here[name], elsewhere[name]) for name in here)
    assert reports(tmp_path / "here") == reports(tmp_path / "there")


def test_each_new_checkpoint_is_said_once(tmp_path: Path) -> None:
    said: list[int] = []
    run = open_run(tmp_path, STEPS, lambda: said.append(run.state.step))
    finish(run)
    assert said == [3, 6, 9, 12]


def test_a_run_without_a_checkpoint_has_nothing_to_carry(tmp_path: Path) -> None:
    assert carry(tmp_path / "nowhere", tmp_path / "there") is None
    open_run(tmp_path, STEPS)
    assert carry(tmp_path / "run", tmp_path / "there") is None


def test_the_best_step_of_before_a_rollback_is_carried_too(tmp_path: Path) -> None:
    """The run may diverge there, and go back to a checkpoint whose best step was another."""
    run = RunFolder(tmp_path, asked())
    run.save(5, best=4)
    run.pause(9, 9, best=8)
    carry(run.path, tmp_path / "there")
    found = {name.split("/")[1] for name in files(tmp_path / "there") if "/" in name}
    assert found == {"best-00000004", "best-00000008", "step-00000005", "paused-00000009-00000009"}


def test_what_the_engine_deletes_meanwhile_is_carried_whole_or_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path, asked())
    run.save(5)
    plain, once = carried.read_notes, iter([True])

    def read(folder: Path) -> carried.CheckpointNotes:
        notes = plain(folder)
        if next(once, False):
            run.save(10)
            run.drop(5)
        return notes

    monkeypatch.setattr(carried, "read_notes", read)
    with ExitStack() as resources:
        found = carried.snapshot(run.path, resources)
        assert found is not None
        run.drop(10)
        assert found.notes.name == "step-00000010"
        assert all(len(file.read(0, file.size)) == file.size > 0 for file in found.files)


@pytest.mark.parametrize(
    "notes",
    [{}, {"state": {}, "made_of": {}}, {"state": {"reports": "3", "micro": 4, "best_step": 0}, "made_of": {}},
     {"state": {"reports": 3, "micro": 4, "best_step": 0}}, {"state": [3, 4, 0], "made_of": {}}],
)  # fmt: skip
def test_a_checkpoint_that_says_no_position_is_none_to_carry(tmp_path: Path, notes: dict[str, Any]) -> None:
    """One that another program wrote, or an older release: the others are carried all the same."""
    run = RunFolder(tmp_path, asked())
    run.save(5, best=4)
    bad = run.path / carried.CHECKPOINTS / "step-00000009"
    bad.mkdir()
    (bad / "stoker.json").write_text(json.dumps(notes))
    with pytest.raises(ModelError, match=r"stoker\.json: holds no state of a run"):
        carried.read_notes(bad)
    found = carried.newest(run.path)
    assert found is not None
    assert found.name == "step-00000005"

"""What a run reports, keeps and goes back to, from its first step to its last and behind a pause."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.platform.jsonfiles import NOTES_FILE
from engine.training import carried, objective, trainer
from engine.training.checkpoint import Checkpoints
from engine.training.data import TokenizedExample, collate, with_steps
from engine.training.guard import divergence
from engine.training.log import RunLog
from engine.training.run import TrainingRun
from stoker.contract import TrainReport
from tests.engine import tiny
from tests.workers.carrying import RunFolder, asked

EXAMPLES = [
    replace(TokenizedExample.of([(ids, True)]), line=line)
    for line, ids in enumerate([[3, 4, 5, 6], [7, 8, 9], [9, 9, 9, 3], [4, 6, 8], [5, 5, 6, 7]], 1)
]


class Opened:
    """A run in a folder, and what it said so far."""

    def __init__(self, model: LoadedModel, folder: Path, **options: Any) -> None:
        self.kept: list[int] = []
        self.reports: list[TrainReport] = []
        request = tiny.asking(**options)
        self.run = TrainingRun(model, request, EXAMPLES, folder, lambda: self.kept.append(self.run.state.step))

    def advance(self, reports: int = 1000) -> Opened:
        while not self.run.finished and len(self.reports) < reports:
            report = self.run.advance()
            if report is not None:
                self.reports.append(report)
        return self


OPTIONS: dict[str, Any] = {
    "steps": 5,
    "accumulation": 2,
    "rank": 2,
    "checkpoint_every": 2,
    "eval_every": 2,
    "held_out": 0.2,
}


def test_the_last_step_is_evaluated_and_kept_and_epochs_count_batches(model: LoadedModel, tmp_path: Path) -> None:
    done = Opened(model, tmp_path, **OPTIONS).advance()
    assert [report.step for report in done.reports] == [1, 2, 3, 4, 5]
    assert [report.held_out_loss is not None for report in done.reports] == [False, True, False, True, True]
    assert [report.last for report in done.reports] == [False, False, False, False, True]
    assert done.kept == [2, 4, 5]
    # 4 examples to learn from in batches of 2: two batches an epoch, which one step of two takes.
    assert [report.epoch for report in done.reports] == [1.0, 2.0, 3.0, 4.0, 5.0]
    found, anchor = Checkpoints(tmp_path / carried.CHECKPOINTS, made_of(tmp_path)).newest()
    assert found is anchor
    assert found is not None
    assert found.step == 5


def made_of(run: Path) -> dict[str, Any]:
    found = carried.newest(run)
    assert found is not None
    return dict(found.made_of)


@pytest.mark.parametrize(
    ("epochs", "learned", "size", "accumulation", "steps"),
    [(1, 10, 2, 2, 3), (3, 10, 2, 2, 8), (1, 10, 2, 5, 1), (1, 3, 8, 1, 1), (2, 7, 2, 4, 2), (1, 1, 1, 8, 1)],
)
def test_epochs_are_as_many_steps_as_take_all_their_batches(
    epochs: int, learned: int, size: int, accumulation: int, steps: int
) -> None:
    asked = tiny.asking(batch_size=size, accumulation=accumulation).model_copy(update={"epochs": epochs})
    assert with_steps(asked, learned).steps == steps


def test_tokens_of_a_batch_are_those_that_predict_one() -> None:
    batch = collate(EXAMPLES[:2])
    assert (batch.tokens, batch.count) == (3 + 2, 3 + 2)


def failing_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The step that comes behind so many others diverges, once."""
    failed: list[int] = []

    def diverging(loss: float, norm: float, recent: Any, spike: float) -> str | None:
        if len(recent) == step and not failed:
            failed.append(step)
            return "a loss that rises"
        return divergence(loss, norm, recent, spike)

    monkeypatch.setattr(trainer, "divergence", diverging)


@pytest.mark.parametrize("opened_again", [False, True])
def test_a_run_that_diverges_goes_back_to_its_last_checkpoint_also_where_another_made_it(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened_again: bool
) -> None:
    run = Opened(model, tmp_path, **OPTIONS).advance(3)
    if opened_again:
        run.run.pause()
        run = Opened(model, tmp_path, **OPTIONS)
    failing_at(monkeypatch, 3)
    run.advance()
    (rolled,) = [report for report in run.reports if report.note]
    assert rolled.note is not None
    assert "diverged at step 4: a loss that rises; rolled back to step 2, learning rate times 0.5" in rolled.note
    assert [report.step for report in run.reports][-4:] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("loss", "norm", "wrong"),
    [(1.0, 1.0, False), (math.nan, 1.0, True), (1.0, math.nan, True), (math.inf, 1.0, True), (1.0, math.inf, True)],
)
def test_neither_a_loss_nor_a_gradient_that_is_no_number_is_learned(loss: float, norm: float, wrong: bool) -> None:
    assert (divergence(loss, norm, [], 0.0) is not None) is wrong


def test_only_a_step_that_is_better_than_all_before_is_kept_as_the_best(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.0, 1.0])

    def held_out_loss(self: object, weights: mx.array, inputs: mx.array, *wanted: mx.array) -> mx.array:
        return mx.sum(wanted[-1]) * next(losses)

    saved: list[int] = []
    plain = Checkpoints.save_best

    def save_best(checkpoints: Checkpoints, step: int, adapter: Any) -> None:
        saved.append(step)
        plain(checkpoints, step, adapter)

    monkeypatch.setattr(objective.Objective, "held_out_loss", held_out_loss)
    monkeypatch.setattr(Checkpoints, "save_best", save_best)
    done = Opened(model, tmp_path, **{**OPTIONS, "eval_every": 1}).advance()
    assert [report.held_out_loss for report in done.reports] == [3.0, 2.0, 2.5, 1.0, 1.0]
    assert saved == [1, 2, 4]
    assert done.run.state.best_step == 4
    homes = sorted(path.name for path in (tmp_path / carried.CHECKPOINTS).iterdir())
    assert homes == ["best-00000004", "step-00000004", "step-00000005"]


def test_bests_that_no_state_goes_back_to_are_not_kept_until_the_next_checkpoint(
    model: LoadedModel, tmp_path: Path
) -> None:
    """Each is an adapter: a run with many evaluations and few checkpoints would fill the disk."""
    options = {"steps": 40, "checkpoint_every": 30, "eval_every": 1, "held_out": 0.4}
    Opened(model, tmp_path, **options).advance(31).run.pause()
    found, homes = Opened(model, tmp_path, **options), tmp_path / "checkpoints"
    for step in range(32, 40):
        found.advance(len(found.reports) + 1)
        assert (found.run.state.step, found.run.state.best_step) == (step, step), "each is better than all before"
        assert {path.name for path in homes.glob("best-*")} == {carried.best_name(best) for best in (30, 31, step)}
    found.advance()
    assert [path.name for path in homes.glob("best-*")] == ["best-00000040"]


def test_what_people_put_next_to_checkpoints_is_neither_read_nor_deleted(model: LoadedModel, tmp_path: Path) -> None:
    """A copy of one, whole or under way: the run goes on without it, and leaves it there."""
    Opened(model, tmp_path, **OPTIONS).advance(3)
    homes = tmp_path / "checkpoints"
    shutil.copytree(homes / "step-00000002", homes / "step-00000002 copy")
    (homes / "step-00000002.partial").mkdir()
    Opened(model, tmp_path, **OPTIONS).advance()
    assert {path.name for path in homes.glob("step-*")} == {
        *("step-00000002 copy", "step-00000002.partial", "step-00000004", "step-00000005")
    }


def test_a_run_that_is_opened_again_repeats_its_last_reports(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for index in range(6):
        log.append(report(index))
    assert [found.index for found in log.tail(4)] == [2, 3, 4, 5]
    assert [found.index for found in log.tail(100)] == [0, 1, 2, 3, 4, 5]
    log.keep(3)
    assert [found.index for found in log.tail(2)] == [1, 2]


def report(index: int) -> TrainReport:
    return TrainReport(
        index=index, step=index, steps=9, loss=1.0, learning_rate=1.0, gradient_norm=1.0, tokens=1,
        tokens_per_second=1.0, memory_bytes=1,
    )  # fmt: skip


def test_what_is_carried_ends_with_the_report_of_its_checkpoint_and_has_the_best_of_both(
    model: LoadedModel, tmp_path: Path
) -> None:
    run = Opened(model, tmp_path, **{**OPTIONS, "steps": 7}).advance(5)
    run.run.pause()
    with ExitStack() as resources:
        found = carried.snapshot(tmp_path, resources)
        assert found is not None
        log = next(file for file in found.files if file.name == carried.LOG_FILE)
        assert log.read(0, log.size).count(b"\n") == found.notes.position.reports == 5
        names = [file.name.partition("/")[0] for file in found.files]
    folders = list(dict.fromkeys(names))
    assert folders[-1].startswith(carried.PAUSED)
    state, anchor = Checkpoints(tmp_path / carried.CHECKPOINTS, made_of(tmp_path)).newest()
    assert state is not None
    assert anchor is not None
    bests = {carried.best_name(one.best_step) for one in (state, anchor)}
    assert bests <= set(folders)
    assert (state.step, anchor.step) == (5, 4)


def test_of_a_paused_run_the_best_of_the_state_that_it_may_go_back_to_is_carried_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, asked())
    run.save(5, best=3)
    run.save(10, best=8)
    run.pause(14, 14, best=12)
    with ExitStack() as resources:
        found = carried.snapshot(run.path, resources)
        assert found is not None
        folders = {file.name.partition("/")[0] for file in found.files}
    assert {"best-00000008", "best-00000012"} <= folders
    assert "best-00000003" not in folders


def test_the_newest_is_that_of_the_most_reports_though_one_before_a_rollback_had_more_steps(
    model: LoadedModel, tmp_path: Path
) -> None:
    run = Opened(model, tmp_path, **OPTIONS).advance(3)
    run.run.pause()
    (paused,) = (tmp_path / carried.CHECKPOINTS).glob(f"{carried.PAUSED}*")
    notes = json.loads((paused / NOTES_FILE).read_text())
    notes["state"]["micro"] = 2
    (paused / NOTES_FILE).write_text(json.dumps(notes))
    state, anchor = Checkpoints(tmp_path / carried.CHECKPOINTS, made_of(tmp_path)).newest()
    assert state is not None
    assert anchor is not None
    assert (state.reports, state.micro, anchor.step) == (3, 2, 2)
    found = carried.newest(tmp_path)
    assert found is not None
    assert found.name == paused.name


@pytest.mark.parametrize("folder", ["best-00000003", "step-00000004"])
def test_what_this_disk_has_gives_way_to_what_comes(tmp_path: Path, folder: str) -> None:
    """A best step may be one from before a rollback, and a checkpoint damaged."""
    there = tmp_path / carried.CHECKPOINTS / folder / "adapter_model.safetensors"
    there.parent.mkdir(parents=True)
    there.write_text("old")
    carried.install(tmp_path, [f"{folder}/{there.name}"], lambda _, draft: draft.write_text("new"))
    assert there.read_text() == "new"
    assert [path.name for path in there.parent.parent.iterdir()] == [folder]

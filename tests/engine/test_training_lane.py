"""The training lane: one run, and what it makes; each fails alone. Several at once: `test_training_turns.py`."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.ticket import Ticket
from engine.training import run as run_module
from engine.training.lane import TrainLane
from engine.training.trainer import Trainer
from stoker.contract import TrainReport
from stoker.contract.dataset import Example, TrainInput
from stoker.errors import DatasetError, InvalidRequest, JobCancelled, JobFailed, WorkerUnavailable
from tests import powercut
from tests.engine import tiny

LINES = b"\n".join(Example("", tiny.text(ids)).to_line().encode() for ids in ([3, 4, 5, 6], [7, 8, 9], [9, 9, 9, 3]))


@pytest.fixture
def lane(model: LoadedModel, tmp_path: Path) -> TrainLane:
    return new_lane(model, tmp_path)


def new_lane(model: LoadedModel, home: Path) -> TrainLane:
    return TrainLane(model, AdapterPool(model, AdapterStore(home / "adapters")), home / "runs")


def admit(lane: TrainLane, job_id: str, version: int | None = None, **options: Any) -> Ticket[Any]:
    ticket: Ticket[Any] = Ticket(job_id, "train")
    lane.admit(lane.prepare(ticket, tiny.asking(**options), TrainInput(LINES, version)))
    return ticket


def turn(lane: TrainLane) -> list[tuple[str, TrainReport]]:
    """What the engine does of each of its steps; the reports of this one."""
    lane.drop_stopped()
    if not lane.busy:
        return []
    output = lane.run()
    for ticket, value in output.ended:
        ticket.resolve(value)
    return [(ticket.job_id, report) for ticket, report in output.entries if isinstance(report, TrainReport)]


def run_all(lane: TrainLane) -> list[tuple[str, int]]:
    """Run until there is nothing to do; (job, step) of every report, in order."""
    reported: list[tuple[str, int]] = []
    while lane.busy:
        reported += [(job, report.step) for job, report in turn(lane)]
    return reported


def run_until(lane: TrainLane, step: int) -> None:
    while not any(report.step == step for _, report in turn(lane)):
        pass


def test_a_run_advances_a_step_at_a_time_and_makes_its_adapter(lane: TrainLane) -> None:
    ticket = admit(lane, "a", steps=2)
    assert run_all(lane) == [("a", 1), ("a", 2)]
    result = ticket.result(0)
    assert (result.adapter, result.version, result.steps, result.best_step) == ("style", 1, 2, 2)


def test_a_turn_is_a_micro_step(lane: TrainLane) -> None:
    """So that others need not wait for a whole step, nor for a whole evaluation."""
    admit(lane, "a", steps=1, batch_size=1, accumulation=3, held_out=0.34)
    turns = [len(lane.run().entries) for _ in range(6)]
    assert turns == [0, 0, 0, 0, 1, 0], "begin, two micro-steps, the third and one of the evaluation, report, end"
    assert not lane.busy


def test_a_run_of_epochs_over_the_first_lines_is_evaluated_on_the_others(lane: TrainLane, tmp_path: Path) -> None:
    ticket = admit(lane, "a", epochs=3, steps=1, batch_size=1, held_out_lines=1)
    run_all(lane)
    said = json.loads((tmp_path / "runs/a/run.json").read_text())
    assert (said["examples"], said["held_out"]) == (2, 1)
    assert ticket.result(0).steps == 6
    assert ticket.result(0).held_out_loss is not None


def test_a_trained_adapter_is_kept_with_what_it_was_made_of(lane: TrainLane, tmp_path: Path) -> None:
    ticket = admit(lane, "a", steps=2, rank=3, version=7)
    run_all(lane)
    notes = json.loads((tmp_path / "adapters/tiny/style/7/stoker.json").read_text())
    assert notes["job"] == "a"
    assert notes["request"]["rank"] == 3
    assert notes["loss"] == ticket.result(0).last_loss
    assert ticket.result(0).version == 7
    assert lane.pool.loaded == ("style@7",)


def test_the_adapter_is_that_of_the_best_step(model: LoadedModel, lane: TrainLane, tmp_path: Path) -> None:
    options: dict[str, Any] = {"held_out": 0.34, "eval_every": 1, "learning_rate": 0.2, "spike": 0, "batch_size": 2}
    ticket = admit(lane, "a", steps=12, checkpoint_every=5, **options)
    run_all(lane)
    result = ticket.result(0)
    assert 0 < result.best_step < 12
    reports = [json.loads(line) for line in (tmp_path / "runs/a/log.jsonl").read_text().splitlines()]
    assert result.held_out_loss == min(report["held_out_loss"] for report in reports)
    # A run that ends there has the same adapter.
    shorter = admit(lane, "b", steps=result.best_step, **options)
    run_all(lane)
    assert shorter.result(0).held_out_loss == result.held_out_loss
    files = [tmp_path / f"adapters/tiny/style/{n}/adapter_model.safetensors" for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_cancelled_run_ends_at_once_and_makes_no_adapter(lane: TrainLane, tmp_path: Path) -> None:
    running = admit(lane, "a", steps=4)
    run_until(lane, 1)
    not_begun, last = (admit(lane, name, steps=4) for name in "bc")
    running.cancel()
    not_begun.cancel()
    assert run_all(lane) == [("c", step) for step in (1, 2, 3, 4)]
    for ticket in (running, not_begun):
        with pytest.raises(JobCancelled):
            ticket.result(0)
    assert last.result(0).version == 1
    assert [path.name for path in (tmp_path / "adapters/tiny/style").iterdir()] == ["1"]
    assert json.loads((tmp_path / "runs/a/run.json").read_text())["status"] == "cancelled"


def test_a_run_that_is_cancelled_on_a_full_disk_ends_and_hurts_no_other(
    lane: TrainLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = admit(lane, "a", steps=4)
    run_until(lane, 1)
    other = admit(lane, "b", steps=1)
    running.cancel()
    with powercut.refusing(1, errno.ENOSPC) as refusal:
        lane.drop_stopped()
    assert refusal.happened
    assert run_all(lane) == [("b", 1)]
    with pytest.raises(JobCancelled):
        running.result(0)
    assert other.result(0).version == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_its_worker_hands_back_goes_on_in_another(model: LoadedModel, tmp_path: Path, steps: int) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 1, "accumulation": 2, "checkpoint_every": 2}
    first, second = new_lane(model, tmp_path), new_lane(model, tmp_path)
    ticket = admit(first, "a", **options)
    run_until(first, steps)
    first.run()
    ticket.cancel(WorkerUnavailable("the worker is stopping"))
    first.drop_stopped()
    with pytest.raises(WorkerUnavailable):
        ticket.result(0)
    ticket = admit(second, "a", **options)
    reported = run_all(second)
    assert reported == [("a", step) for step in range(1, 7)], "those of before are reported again, in case nobody heard"
    calm = admit(second, "b", **options)
    run_all(second)
    assert (ticket.result(0).first_loss, ticket.result(0).last_loss) == (
        calm.result(0).first_loss,
        calm.result(0).last_loss,
    )
    files = [tmp_path / f"adapters/tiny/style/{n}/adapter_model.safetensors" for n in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_worker_that_stops_keeps_its_run(model: LoadedModel, tmp_path: Path) -> None:
    lane = new_lane(model, tmp_path)
    admit(lane, "a", steps=9)
    run_until(lane, 3)
    lane.fail_all(WorkerUnavailable("the worker is stopping"))
    assert [path.name for path in (tmp_path / "runs/a/checkpoints").iterdir()] == ["paused-00000003-00000003"]


def test_a_run_that_ended_and_is_delivered_again_ends_the_same(model: LoadedModel, tmp_path: Path) -> None:
    """Its worker died between the adapter's last byte and the acknowledgement."""
    results = []
    for _ in range(2):
        lane = new_lane(model, tmp_path)
        ticket = admit(lane, "a", steps=3, version=1)
        assert run_all(lane) == [("a", 1), ("a", 2), ("a", 3)]
        results.append(ticket.result(0).model_copy(update={"usage": None}))
    assert results[0] == results[1]
    assert [path.name for path in (tmp_path / "adapters/tiny/style").iterdir()] == ["1"]


class NanFromStep2(Trainer):
    def _micro_step(self) -> None:
        super()._micro_step()
        if self.state.step:
            self.state = replace(self.state, loss_sum=float("nan"))


def test_a_run_that_diverges_fails_alone_and_keeps_its_history(
    monkeypatch: pytest.MonkeyPatch, lane: TrainLane, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "Trainer", NanFromStep2)
        failing, other = admit(lane, "a", steps=5), admit(lane, "b", steps=1)
        while not failing.done:
            turn(lane)
    run_all(lane)
    with pytest.raises(JobFailed, match=r"diverged at step 2: loss nan.*Lower learning_rate"):
        failing.result(0)
    assert other.result(0).steps == 1
    lines = [json.loads(line) for line in (tmp_path / "runs/a/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 0, 1, 0, 1]
    assert [bool(line["note"]) for line in lines] == [False, True, False, True, False]
    assert "diverged at step 2" in json.loads((tmp_path / "runs/a/run.json").read_text())["status"]


def test_an_adapter_that_cannot_be_written_fails_its_own_run_alone(
    monkeypatch: pytest.MonkeyPatch, lane: TrainLane
) -> None:
    save = lane.pool.save

    def full(name: str, *rest: Any) -> int:
        if name == "large":
            raise OSError(28, "No space left on device")
        return save(name, *rest)

    failing, other = admit(lane, "a", steps=1, name="large"), admit(lane, "b", steps=1)
    monkeypatch.setattr(lane.pool, "save", full)
    run_all(lane)
    with pytest.raises(OSError, match="No space"):
        failing.result(0)
    assert other.result(0).steps == 1


@pytest.mark.parametrize("job_id", ["../../x", "..", "", "/tmp/x", "a/b"])
def test_a_run_whose_id_could_be_a_path_fails_alone_and_writes_nothing(
    lane: TrainLane, tmp_path: Path, job_id: str
) -> None:
    hostile, other = admit(lane, job_id, steps=1), admit(lane, "b", steps=1)
    run_all(lane)
    with pytest.raises(InvalidRequest, match="job id"):
        hostile.result(0)
    assert other.result(0).steps == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["b"]
    assert {path.name for path in tmp_path.iterdir()} == {"adapters", "runs"}


def test_what_the_model_cannot_run_is_refused_before_it_waits(lane: TrainLane) -> None:
    ticket: Ticket[Any] = Ticket("a", "train")
    with pytest.raises(DatasetError, match="gone from the broker"):
        lane.prepare(ticket, tiny.asking(), None)
    with pytest.raises(InvalidRequest, match="max_length: 2000 given; tiny takes 1024"):
        lane.prepare(ticket, tiny.asking(max_length=2000), TrainInput(LINES))
    with pytest.raises(DatasetError, match="dataset, line 2"):
        lane.prepare(ticket, tiny.asking(), TrainInput(b'{"text": "t1"}\n{"txt": "t1"}'))
    with pytest.raises(DatasetError, match="no example in it"):
        lane.prepare(ticket, tiny.asking(), TrainInput(b"\n"))


def test_a_lane_that_fails_ends_every_run(lane: TrainLane) -> None:
    tickets = [admit(lane, name) for name in "ab"]
    lane.run()
    lane.fail_all(MemoryError("no more"))
    for ticket in tickets:
        with pytest.raises(MemoryError):
            ticket.result(0)
    assert not lane.busy
    admit(lane, "c", steps=1)
    assert run_all(lane) == [("c", 1)]

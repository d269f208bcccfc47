"""Several training runs on one base: they take turns by time, and each makes what it makes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from engine import fair
from engine.checkpoints.loading import LoadedModel
from engine.ticket import Ticket
from engine.training import lane as lane_module
from engine.training import run as run_module
from engine.training import trainer as trainer_module
from engine.training.data import TokenizedExample, TrainingBatch, collate
from engine.training.lane import TrainLane
from engine.training.memory import RunMemory, kept_bytes
from engine.training.run import TrainingRun
from engine.training.trainer import Trainer
from stoker.contract import TrainReport, TrainRequest
from stoker.errors import InvalidRequest, JobCancelled, JobFailed, WorkerUnavailable
from tests.engine import tiny
from tests.engine.test_training import examples
from tests.engine.test_training_lane import admit, new_lane, run_all, run_until, turn

#: What a report says of the machine, not of the run.
NOISE = {"tokens_per_second", "memory_bytes", "published"}
#: Seed of the run that diverges once, and of one that diverges until it fails.
ONCE, ALWAYS = 77, 78
RUNS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 7, "checkpoint_every": 2},
    "dropout": {"steps": 5, "dropout": 0.3, "batch_size": 1, "accumulation": 3, "seed": 4},
    "dora": {"steps": 6, "dora": True, "rank": 3, "schedule": "cosine", "checkpoint_every": 4},
    "evaluated": {"steps": 8, "held_out": 0.34, "eval_every": 2, "batch_size": 1, "learning_rate": 0.2, "spike": 0},
    "rolled-back": {"steps": 6, "checkpoint_every": 2, "seed": ONCE},
}
Reports = dict[str, list[dict[str, Any]]]


@pytest.fixture
def lane(model: LoadedModel, tmp_path: Path) -> TrainLane:
    return new_lane(model, tmp_path)


class Diverging(Trainer):
    """Runs of two seeds diverge at their fourth step: one of them once."""

    def _micro_step(self) -> None:
        super()._micro_step()
        seed, state = self.request.seed, self.state
        if state.step == 3 and (seed == ALWAYS or (seed == ONCE and not state.rollbacks)):
            self.state = replace(state, loss_sum=float("nan"))


@pytest.fixture(autouse=True)
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "Trainer", Diverging)


def start(lane: TrainLane, *names: str) -> dict[str, Ticket[Any]]:
    return {name: admit(lane, name, version=1, name=name, **RUNS[name]) for name in names}


def listen(lane: TrainLane, reports: Reports, turns: int = 10_000) -> None:
    """Turn by turn, until there is nothing to do."""
    for _ in range(turns):
        for job, report in turn(lane):
            reports.setdefault(job, []).append(report.model_dump(exclude=NOISE))
        if not lane.busy:
            return


def made(home: Path, name: str) -> bytes:
    return (home / f"adapters/tiny/{name}/1/adapter_model.safetensors").read_bytes()


@pytest.fixture
def alone(model: LoadedModel, tmp_path: Path) -> Reports:
    """What each run reports that has the lane for itself."""
    reports: Reports = {}
    for name in RUNS:
        lane = new_lane(model, tmp_path / "alone")
        start(lane, name)
        listen(lane, reports)
    return reports


def test_runs_that_share_make_what_each_makes_alone_bit_for_bit(
    model: LoadedModel, tmp_path: Path, alone: Reports
) -> None:
    """Also next to one that is cancelled, and one that diverges until it fails."""
    lane, reports = new_lane(model, tmp_path / "shared"), Reports()
    failing, cancelled = admit(lane, "failing", steps=9, seed=ALWAYS), admit(lane, "cancelled", steps=9)
    tickets = start(lane, *RUNS)
    listen(lane, reports, turns=30)
    cancelled.cancel()
    listen(lane, reports)
    with pytest.raises(JobCancelled):
        cancelled.result(0)
    with pytest.raises(JobFailed, match="rolled back 2 times before"):
        failing.result(0)
    for name, ticket in tickets.items():
        assert reports[name] == alone[name]
        assert ticket.result(0).last_loss == [report for report in alone[name] if not report["note"]][-1]["loss"]
        assert made(tmp_path / "shared", name) == made(tmp_path / "alone", name)
    assert any(report["note"] for report in reports["rolled-back"])


def test_runs_that_shared_a_worker_which_stopped_go_on_in_the_next(
    model: LoadedModel, tmp_path: Path, alone: Reports
) -> None:
    home = tmp_path / "shared"
    lane = new_lane(model, home)
    start(lane, *RUNS)
    listen(lane, {}, turns=23)
    lane.fail_all(WorkerUnavailable("the worker is stopping"))
    assert not lane.busy
    reports: Reports = {}
    lane = new_lane(model, home)
    start(lane, *RUNS)
    listen(lane, reports)
    assert reports == alone
    assert all(made(home, name) == made(tmp_path / "alone", name) for name in RUNS)


class Timed(TrainingRun):
    """A run whose turns take the seconds that its adapter's name says, by a clock of the test."""

    now = 0.0
    used: ClassVar[Counter[str]] = Counter()

    def __init__(self, model: LoadedModel, request: TrainRequest, *rest: Any) -> None:
        super().__init__(model, request, *rest)
        self.name = request.name

    def advance(self) -> TrainReport | None:
        seconds = float(self.name)
        Timed.now += seconds
        Timed.used[self.name] += seconds  # type: ignore[assignment]
        return super().advance()


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Seconds of each run."""
    monkeypatch.setattr(lane_module, "TrainingRun", Timed)
    monkeypatch.setattr(Timed, "used", Counter())
    monkeypatch.setattr(fair, "time", SimpleNamespace(perf_counter=lambda: Timed.now))
    return Timed.used


def test_turns_are_fair_by_time_and_each_is_one_forward_pass(
    lane: TrainLane, used: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose steps take five times as long has a fifth of the turns. Streams wait for one micro-step at most."""
    passes: list[int] = []

    def counted(given: Sequence[TokenizedExample], align: int, part: slice) -> TrainingBatch:
        passes.append(len(given))
        return collate(given, align, part)

    monkeypatch.setattr(trainer_module, "collate", counted)
    for name in ("5", "1"):
        admit(lane, name, name=name, steps=40, batch_size=1, accumulation=2)
    for _ in range(100):
        before = len(passes)
        turn(lane)
        assert len(passes) - before <= 1
        assert abs(used["5"] - used["1"]) <= 5.0
    assert min(used.values()) > 60


def test_a_run_that_comes_later_shares_from_then_on_and_catches_up_with_nobody(
    lane: TrainLane, used: Counter[str]
) -> None:
    admit(lane, "a", name="1", steps=30)
    run_until(lane, 10)
    admit(lane, "b", name="01", steps=30)
    for _ in range(13):
        turn(lane)
    assert used == {"1": 16, "01": 6}


def test_a_job_that_is_here_twice_begins_again_when_its_first_delivery_has_ended(lane: TrainLane) -> None:
    """A worker that was frozen may get its own job again: both deliveries have one folder."""
    older, newer = admit(lane, "a", steps=4), admit(lane, "a", steps=4)
    run_until(lane, 2)
    assert newer.started is None
    older.cancel(WorkerUnavailable("the job runs elsewhere"))
    run_all(lane)
    assert newer.result(0).steps == 4


@pytest.mark.parametrize("options", [{}, {"dora": True, "rank": 5}, {"targets": ["q_proj", "down_proj"], "rank": 2}])
def test_what_a_run_keeps_between_its_turns_is_known_before_it_begins(
    model: LoadedModel, options: dict[str, Any]
) -> None:
    """As it is in the middle of a step behind a checkpoint, when it keeps most."""
    request = tiny.asking(steps=9, batch_size=1, accumulation=2, checkpoint_every=2, **options)
    trainer = Trainer(model.decoder, request, examples(model))
    turns = trainer.run()
    for _ in range(7):
        next(turns)
    assert trainer.state.gradient is not None
    arrays = [*trainer.state.arrays.values(), *trainer.anchor.arrays.values()]
    norms = [matrices["m"].nbytes for matrices in trainer.adapter().matrices.values() if "m" in matrices]
    kept = sum({id(array): array.nbytes for array in arrays}.values()) + sum(norms)
    assert kept == kept_bytes(model.linear_shapes, request)


def test_what_the_model_has_not_is_refused_before_memory_is_counted(model: LoadedModel) -> None:
    with pytest.raises(InvalidRequest, match="targets: nose given"):
        kept_bytes(model.linear_shapes, tiny.asking(targets=["nose"]))


def test_runs_fit_together_up_to_the_limit_and_one_that_is_alone_always() -> None:
    memory = RunMemory(100)
    assert memory.reserve("a", 300) == 0
    assert memory.reserve("b", 1) == 1
    memory.release("a")
    assert [memory.reserve(name, 50) for name in "ab"] == [0, 0]
    assert memory.reserve("c", 1) == 2
    assert memory.reserve("b", 50) == 0, "a delivery may ask again"
    assert memory.kept == 100
    for name in "abb":
        memory.release(name)
    assert memory.reserve("c", 300) == 0

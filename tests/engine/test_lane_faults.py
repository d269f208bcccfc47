"""Lanes that run one job at a time: a job that fails ends alone, and none is lost when any call fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.adapters import lane as adapter_module
from engine.adapters import peft
from engine.adapters.lane import AdapterLane
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.ticket import Ticket
from engine.training import lane as train_module
from engine.training.lane import TrainLane
from engine.training.run import TrainingRun
from stoker.contract import AdapterRequest
from stoker.contract.bundle import AdapterInput
from stoker.contract.dataset import Example, TrainInput
from stoker.errors import DeadlineExceeded, JobCancelled, ModelError, StokerError, WorkerUnavailable
from tests.engine import tiny
from tests.engine.faults import DrivenLane, Fault, check_held, failing_call

LINES = b"\n".join(Example("", tiny.text(ids)).to_line().encode() for ids in ([3, 4, 5, 6], [7, 8, 9]))


class Traffic(DrivenLane):
    module: ModuleType

    def __init__(self, model: LoadedModel, home: Path) -> None:
        super().__init__()
        self.model, self.home = model, home
        self.pool = AdapterPool(model, AdapterStore(home / "adapters"))
        self.lane = self.new_lane()

    def new_lane(self) -> Any:
        raise NotImplementedError

    def held(self) -> list[Ticket[Any]]:
        raise NotImplementedError

    def work(self, ticket: Ticket[Any]) -> Any:
        raise NotImplementedError

    def send(self, deadline: float | None = None) -> Ticket[Any]:
        ticket: Ticket[Any] = Ticket(f"job-{len(self.tickets)}", self.lane.kind, deadline)
        work = self.work(ticket)
        self.tickets.append(ticket)
        self.lane.admit(work)
        self.check()
        return ticket

    def check(self, whole: bool = True) -> None:
        check_held(self.tickets, self.held(), whole=whole)


class Training(Traffic):
    module = train_module

    def new_lane(self) -> TrainLane:
        return TrainLane(self.model, self.pool, self.home / "runs")

    def held(self) -> list[Ticket[Any]]:
        return [work.ticket for work in self.lane.held]

    def work(self, ticket: Ticket[Any]) -> Any:
        request = tiny.asking(steps=2, name=ticket.job_id, held_out=0.5, batch_size=1)
        return self.lane.prepare(ticket, request, TrainInput(LINES, 1))


class Taking(Traffic):
    module = adapter_module

    def __init__(self, model: LoadedModel, home: Path) -> None:
        super().__init__(model, home)
        self.folder = home / "given"
        self.folder.mkdir(parents=True)
        peft.write(self.folder, "tiny", tiny.adapter(model, 2, 0))

    def new_lane(self) -> AdapterLane:
        return AdapterLane(self.model, self.pool)

    def held(self) -> list[Ticket[Any]]:
        return [work.ticket for work in self.lane.held]

    def work(self, ticket: Ticket[Any]) -> Any:
        request = AdapterRequest(model="tiny", name=ticket.job_id, upload="x")
        return self.lane.prepare(ticket, request, AdapterInput(self.folder, "there", 1))


@pytest.fixture(params=[Training, Taking], ids=["train", "adapters"])
def make(request: pytest.FixtureRequest, model: LoadedModel, tmp_path: Path) -> Callable[[str], Traffic]:
    return lambda name: request.param(model, tmp_path / name)


def test_no_job_is_lost_when_any_call_fails(make: Callable[[str], Traffic]) -> None:
    """A fault in each call that the lane makes, one after the other: what is open stays held once, until all ends."""
    bad = ended = 0
    while True:
        bad += 1
        traffic = make(str(bad))
        with failing_call(traffic.module, bad) as calls:
            try:
                traffic.send()
                stopped, _ = traffic.send(), traffic.send(deadline=0.0)
                for _ in range(3):
                    traffic.step()
                stopped.cancel()
                traffic.run()
            except Fault as error:
                traffic.check(whole=False)
                traffic.lane.fail_all(error)
        traffic.check()
        assert all(ticket.done for ticket in traffic.tickets)
        ended += all(ticket.error is None for ticket in traffic.tickets[:1])
        if calls.count < bad:
            break
    assert bad > 10, "the calls are counted"
    assert ended, "the last time nothing failed"


@pytest.mark.parametrize("why", ["cancel", "deadline", "the worker stops"])
@pytest.mark.parametrize("steps", range(7))
def test_a_job_is_stopped_in_any_state(make: Callable[[str], Traffic], why: str, steps: int) -> None:
    traffic = make("home")
    ticket, other = traffic.send(), traffic.send()
    for _ in range(steps):
        traffic.step()
    ended = ticket.done
    if why == "deadline":
        ticket.deadline = 0.0
    else:
        ticket.cancel(None if why == "cancel" else WorkerUnavailable("the worker is stopping"))
    traffic.step()
    assert ticket.done
    if not ended:
        with pytest.raises((JobCancelled, DeadlineExceeded, WorkerUnavailable)):
            ticket.result(0)
    traffic.run()
    assert other.result(0).adapter == "job-1"


@pytest.mark.parametrize("reason", [None, WorkerUnavailable("the worker is stopping")], ids=["cancelled", "kept"])
def test_a_run_whose_folder_takes_nothing_any_more_is_stopped_all_the_same(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: StokerError | None
) -> None:
    """Else the engine's loop, and with it every job of the worker, would end by a full disk."""
    traffic = Training(model, tmp_path)
    stopped, other = traffic.send(), traffic.send()
    for _ in range(3):
        traffic.step()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        for name in ("end", "pause"):
            patch.setattr(TrainingRun, name, full)
        stopped.cancel(reason)
        traffic.lane.drop_stopped()
    traffic.check()
    with pytest.raises(JobCancelled if reason is None else WorkerUnavailable):
        stopped.result(0)
    traffic.run()
    assert other.result(0).adapter == "job-1"


def test_an_adapter_that_is_there_is_a_result_though_its_run_cannot_be_noted(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainingRun.end

    def full(self: TrainingRun, status: str) -> None:
        if status == "done":
            raise OSError(28, "No space left on device")
        plain(self, status)

    monkeypatch.setattr(TrainingRun, "end", full)
    traffic = Training(model, tmp_path)
    ticket = traffic.send()
    traffic.run()
    assert ticket.result(0).version == 1
    assert json.loads((tmp_path / "runs/job-0/run.json").read_text())["status"] == "running"


def test_an_adapter_that_is_there_is_a_result_though_memory_has_no_room_for_it(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> None:
        raise RuntimeError("[metal::malloc] Unable to allocate 1048576 bytes")

    traffic = Training(model, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("engine.adapters.pool.folded", full)
        ticket = traffic.send()
        traffic.run()
    assert ticket.result(0).version == 1
    assert json.loads((tmp_path / "runs/job-0/run.json").read_text())["status"] == "done"
    pool = traffic.lane.pool
    assert pool.loaded == ()
    pool.release(pool.acquire(ticket.result(0).adapter))
    assert len(pool.loaded) == 1


def test_an_adapter_that_is_damaged_fails_alone(model: LoadedModel, tmp_path: Path) -> None:
    traffic = Taking(model, tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / peft.CONFIG_FILE).write_text("{")
    whole, traffic.folder = traffic.folder, tmp_path / "broken"
    failing = traffic.send()
    traffic.folder = whole
    other = traffic.send()
    traffic.run()
    with pytest.raises(ModelError):
        failing.result(0)
    assert other.result(0).adapter == "job-1"

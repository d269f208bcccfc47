"""Flower's memory of tasks: workers' events and the ledger's word, in any order."""

from __future__ import annotations

import itertools
import logging
import random
import shelve
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import states
from flower.events import Events

from stoker.monitor.notices import Ended, Known, Progress, Started, TaskNotice, WaitsAgain
from stoker.monitor.state import JobEvents, JobMemory, MonitoredJob

NODE = "stoker-1234@mac"


def known(job_id: str = "job", **changes: Any) -> Known:
    fields: dict[str, Any] = {
        "kind": "train",
        "model": "base",
        "client": "team",
        "priority": 5,
        "adapter": "style",
        "size": "9 steps",
    }
    return Known(job_id, **{**fields, "submitted": 100.0, "crashes": 0, **changes})


def event(kind: str, **fields: Any) -> dict[str, Any]:
    times = {"timestamp": 101.0, "local_received": 101.0, "clock": 1}
    return {"type": f"task-{kind}", "uuid": "job", "hostname": NODE, **times, **fields}


def task(memory: JobMemory) -> MonitoredJob:
    found = memory.tasks["job"]
    assert isinstance(found, MonitoredJob)
    return found


def test_a_job_is_there_from_the_moment_that_it_waits() -> None:
    memory = JobMemory()
    memory.hear([known()])
    job = task(memory)
    assert (job.state, job.name, job.client, job.sent) == ("PENDING", "stoker.train", "team", 100.0)
    assert job.kwargs == (
        "{'model': 'base', 'adapter': 'style', 'kind': 'train', 'client': 'team', 'priority': 5, 'size': '9 steps'}"
    )
    assert memory.search_engine.matching_ids("kwargs:client=team") == {"job"}
    memory.hear([known(crashes=2)])
    assert task(memory).retries == 2, "its owners that went silent"


def test_neither_prompts_nor_results_are_taken_from_events() -> None:
    memory = JobMemory()
    memory.hear([known()])
    memory.event(event("received", name="stoker.train", args="('secret',)", kwargs="{'prompt': 'secret'}"))
    memory.event(event("succeeded", result="{'text': 'secret'}", runtime=1.0))
    assert "secret" not in repr(task(memory).as_dict())
    assert task(memory).args == "(base)"
    assert "secret" not in memory.search_engine.documents["job"].all_text


def test_progress_is_words_and_no_state_of_its_own() -> None:
    memory = JobMemory()
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0)])
    memory.event(event("progress", progress=0.42))
    assert (task(memory).state, task(memory).progress) == ("STARTED", "42%")
    memory.hear([Progress("job", "step 42/100 · loss 1.23 · 61 tokens/s")])
    memory.event(event("revoked", terminated=True))
    assert task(memory).state == "REVOKED"
    assert task(memory).as_dict()["progress"] == "step 42/100 · loss 1.23 · 61 tokens/s"


LIFE = [
    event("received", name="stoker.train"),
    event("started"),
    event("progress", progress=0.5),
    known(),
    Started("job", f"{NODE}/aa", 101.0),
]


@pytest.mark.parametrize("end", [event("succeeded", runtime=1.0), event("revoked"), Ended("job", "REVOKED", 102.0)])
def test_an_end_stays_the_end_of_all_that_comes_late(end: Any) -> None:
    expected = {"task-succeeded": "SUCCESS"}.get(end["type"] if isinstance(end, dict) else "", "REVOKED")
    for order in itertools.islice(itertools.permutations(LIFE), 0, None, 7):
        for cut in range(len(order) + 1):
            memory = JobMemory()
            for thing in [*order[:cut], end, *order[cut:]]:
                memory.event(dict(thing)) if isinstance(thing, dict) else memory.hear([thing])
            late = [thing for thing in order[cut:] if isinstance(thing, Started)]
            # The watch of the ledger reports no start of a job that it saw end; so only its word before the end counts.
            if not late:
                assert task(memory).state == expected, (order, cut)
                assert task(memory).ready


def test_a_job_that_goes_on_elsewhere_keeps_the_time_of_its_first_start() -> None:
    memory = JobMemory()
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0), WaitsAgain("job", 150.0, 1)])
    memory.hear([Started("job", f"{NODE}/bb", 200.0), Ended("job", "SUCCESS", 210.0)])
    assert (task(memory).started, task(memory).runtime) == (101.0, 109.0)


def test_the_first_end_that_is_heard_of_stays_though_the_broker_has_forgotten_it() -> None:
    """A result that has expired says of a job that succeeded that nothing is known of it."""
    for first in (event("succeeded", runtime=1.0), Ended("job", "SUCCESS", 102.0)):
        memory = JobMemory()
        memory.hear([known()])
        memory.event(first) if isinstance(first, dict) else memory.hear([first])
        memory.hear([Ended("job", "FAILURE", 900.0, "JobLost: the broker has no result of it")])
        assert (task(memory).state, task(memory).exception) == ("SUCCESS", None)


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_each_end_of_the_ledger_is_a_state_of_celerys(state: str) -> None:
    memory = JobMemory()
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0), Ended("job", state, 104.0, "JobDead")])
    job = task(memory)
    assert job.state in states.READY_STATES
    assert (job.state, job.runtime, job.exception) == (state, 3.0, "JobDead")


def test_a_job_that_waits_again_is_retried_and_a_dead_letter_begins_anew() -> None:
    memory = JobMemory()
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0), WaitsAgain("job", 102.0, 1)])
    assert (task(memory).state, task(memory).retries) == ("RETRY", 1)
    memory.event(event("started"))
    assert task(memory).state == "STARTED"
    memory.hear([Ended("job", "FAILURE", 103.0, "JobDead"), known(crashes=1)])
    assert task(memory).state == "FAILURE", "the same record again: it has ended"
    memory.hear([known(submitted=110.0)])
    assert (task(memory).state, task(memory).exception) == ("RETRY", None)
    memory.event(event("received", name="stoker.train"))
    memory.event(event("started"))
    memory.event(event("succeeded", runtime=1.0))
    assert task(memory).state == "SUCCESS"


def test_a_worker_keeps_its_row_over_a_restart() -> None:
    memory = JobMemory()
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0), WaitsAgain("job", 102.0, 1)])
    memory.hear([Started("job", f"{NODE}/bb", 103.0)])
    assert list(memory.workers) == [NODE]
    assert task(memory).worker.hostname == NODE


def test_a_task_whose_events_came_first_is_asked_for_once() -> None:
    memory = JobMemory()
    memory.event(event("started"))
    assert memory.meet_strangers(10) == ["job"]
    assert memory.meet_strangers(10) == []
    memory.hear([known()])
    assert (task(memory).name, task(memory).state) == ("stoker.train", "STARTED")


@pytest.mark.parametrize(
    "spoiled",
    [{}, {"type": "task-started"}, {"type": 7}, event("started", uuid=["a"]), {"type": "worker-online"},
     event("progress", progress="half"), None, "text", event("received", timestamp="x")],
)  # fmt: skip
def test_an_event_that_cannot_be_read_costs_nobody_anything(spoiled: Any, caplog: pytest.LogCaptureFixture) -> None:
    memory = JobMemory()
    with caplog.at_level(logging.WARNING):
        memory.event(spoiled)
        memory.hear([known()])
        memory.event(event("started"))
    assert task(memory).state == "STARTED"


def test_the_history_survives_a_restart_of_the_monitor(tmp_path: Path) -> None:
    memory = JobMemory(max_tasks_in_memory=50)
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0), Progress("job", "step 1/9")])
    memory.hear([known("other"), Ended("other", "REVOKED", 104.0)])
    # As Flower keeps it.
    with shelve.open(str(tmp_path / "history")) as kept:  # noqa: S301
        kept["events"] = memory
        again = kept["events"]
    assert (task(again).state, task(again).progress, task(again).sent) == ("STARTED", "step 1/9", 100.0)
    assert again.tasks["other"].state == "REVOKED"
    assert again.unfinished() == {"job"}
    again.hear([Ended("job", "SUCCESS", 105.0)])
    assert task(again).state == "SUCCESS"


def test_memory_and_index_stay_bounded() -> None:
    memory, draw = JobMemory(max_tasks_in_memory=20), random.Random(1)
    for number in range(200):
        name = f"job-{number}"
        notices: list[TaskNotice] = [known(name)]
        memory.hear(notices)
        memory.event(event("started", uuid=f"job-{draw.randrange(number + 1)}"))
    assert len(memory.tasks) <= 20
    assert set(memory.search_engine.documents) == set(memory.tasks)


def test_only_a_task_that_the_ledger_has_not_described_is_a_stranger() -> None:
    memory = JobMemory()
    memory.hear([known()])
    memory.event(event("started"))
    memory.event({**event("online", uuid=""), "type": "worker-online"})
    assert memory.strangers == set()
    memory.event(event("started", uuid="other"))
    assert memory.strangers == {"other"}


@pytest.mark.parametrize("share", [1, True, "half", None, [0.5]])
def test_progress_that_is_no_share_changes_nothing(share: Any) -> None:
    memory = JobMemory()
    memory.hear([known(), Progress("job", "step 1/9")])
    memory.event(event("progress", progress=share))
    assert task(memory).progress == "step 1/9"


@pytest.mark.parametrize(("state", "moment"), [("SUCCESS", "succeeded"), ("FAILURE", "failed"), ("REVOKED", "revoked")])
def test_an_end_has_the_moment_of_its_kind_and_no_other(state: str, moment: str) -> None:
    memory = JobMemory()
    memory.hear([known(), Ended("job", state, 104.0)])
    found = {name: getattr(task(memory), name) for name in ("succeeded", "failed", "revoked")}
    assert found == {**dict.fromkeys(("succeeded", "failed", "revoked")), moment: 104.0}


def test_how_long_a_job_ran_its_worker_knows_best() -> None:
    memory = JobMemory()
    memory.hear([known(), Started("job", f"{NODE}/aa", 101.0)])
    memory.event(event("succeeded", runtime=1.5))
    memory.hear([known(submitted=110.0)])
    memory.hear([Ended("job", "SUCCESS", 400.0)])
    assert task(memory).runtime is not None
    other = JobMemory()
    other.hear([known(), Started("job", f"{NODE}/aa", 101.0)])
    task(other).runtime = 1.5
    other.hear([Ended("job", "SUCCESS", 400.0)])
    assert task(other).runtime == 1.5


def test_events_are_asked_of_workers_at_once_and_of_each_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's send none unless they are asked to."""
    asked: list[str] = []
    monkeypatch.setattr(Events, "start", lambda self: None)
    monkeypatch.setattr(Events, "on_event", lambda self, event: None)
    monkeypatch.setattr(Events, "on_enable_events", lambda self: asked.append("asked"))
    events: Any = JobEvents.__new__(JobEvents)
    events.io_loop = SimpleNamespace(add_callback=lambda call: call())
    events.start()
    assert asked == ["asked"]
    for kind in ("worker-online", "worker-heartbeat", "worker-offline", "task-started", None):
        events.on_event({"type": kind})
    assert asked == ["asked"] * 2


def test_what_the_ledger_says_and_what_workers_say_come_one_after_the_other() -> None:
    """From two threads."""
    memory = JobMemory()
    held = memory._mutex  # noqa: SLF001  Celery's own lock, which `event` takes
    heard = threading.Thread(target=memory.hear, args=([known()],), daemon=True)
    with held:
        heard.start()
        heard.join(0.1)
        assert heard.is_alive()
    heard.join(30)
    assert task(memory).sent == 100.0


@pytest.mark.parametrize("most", [1, 3])
def test_the_oldest_tasks_make_way_where_there_are_more_than_are_remembered(most: int) -> None:
    capp = SimpleNamespace()
    events = JobEvents(capp, SimpleNamespace(), max_tasks_in_memory=most, max_workers_in_memory=9)
    for number in range(5):
        events.state.hear([known(f"job-{number}")])
    assert list(events.state.tasks) == [f"job-{number}" for number in range(5 - most, 5)]
    assert isinstance(events.state, JobMemory)


def test_strangers_are_described_so_many_at_a_time_and_each_once() -> None:
    memory = JobMemory()
    memory.strangers = {"c", "a", "b"}
    assert [memory.meet_strangers(2) for _ in range(3)] == [["a", "b"], ["c"], []]
    memory.hear([known("a"), known("b"), Ended("b", "SUCCESS", 500.0)])
    assert memory.unfinished() == {"a"}

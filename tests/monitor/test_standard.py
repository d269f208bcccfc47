"""Flower's own requests as Stoker answers them, without a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from flower.views import monitor as flower_monitor
from flower.views.tasks import TasksDataTable
from tornado.web import HTTPError

from stoker.errors import BrokerUnavailable
from stoker.monitor import exposition, metrics
from stoker.monitor.mirror import Mirror
from stoker.monitor.numbers import MetricsReport, Numbers
from stoker.monitor.standard import Broker, Metrics, QueueLengths, RefusedRequest, TaskTable
from tests.monitor.scraped import Scrape
from tests.monitor.test_overview import QUEUE, WORKER, card, mirror, presence, said


def handler(kind: Any, **of: Any) -> Any:
    """A request's handler that has no request: what it writes is in `written`."""
    made = kind.__new__(kind)
    made.written = []
    made.write = made.written.append
    made.__dict__.update(of)
    return made


def busy() -> Mirror:
    """A queue with two jobs that wait and one that runs."""
    seen = mirror()
    for name, worker in (("one", None), ("two", None), ("three", WORKER)):
        seen.hear(QUEUE, name, said(worker=worker))
    return seen


@pytest.mark.parametrize("method", ["get", "post"])
def test_what_stoker_has_no_such_thing_as_is_refused_with_its_reason(method: str) -> None:
    asked = handler(RefusedRequest, _current_user="stoker")
    asked.initialize("workers have no pools: start another")
    with pytest.raises(HTTPError) as refusal:
        getattr(asked, method)("any")
    assert (refusal.value.status_code, refusal.value.log_message) == (403, "workers have no pools: start another")


def test_a_queue_is_counted_with_what_waits_what_runs_and_who_takes_from_it() -> None:
    """Workers that hold the model, and can do this kind of job."""
    able, other = card(), card(model="other")
    workers = [
        presence(models=(able, other)),
        presence(worker="w@two/1", models=(able,)),
        presence(worker="w@three/1", models=(card(kinds=("embed",)),)),
        presence(worker="w@four/1", models=(other,)),
    ]
    shown: list[Any] = []
    asked = handler(
        Broker, _watch=SimpleNamespace(workers=workers, mirror=busy()), _shown="", _current_user="stoker",
        render=lambda page, broker_url, queues: shown.extend(queues),
    )  # fmt: skip
    asked.get()
    assert next(row for row in shown if row["name"] == QUEUE) == {
        "name": QUEUE, "messages": 3, "messages_unacknowledged": 1, "messages_ready": 2, "consumers": 2,
    }  # fmt: skip


def test_a_queues_length_is_of_jobs_that_wait() -> None:
    seen = mirror()
    for name, worker in (("one", None), ("two", WORKER), ("three", WORKER)):
        seen.hear(QUEUE, name, said(worker=worker))
    asked = handler(QueueLengths, _watch=SimpleNamespace(mirror=seen), _current_user="stoker")
    asked.get()
    lengths = {queue["name"]: queue["messages"] for queue in asked.written[0]["active_queues"]}
    assert lengths == {QUEUE: 1, "stoker.base.train": 0}


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_times_are_those_of_all_machines_and_the_memory_keeps_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TasksDataTable, "format_task", lambda self, task: task)
    task, never = SimpleNamespace(sent=86_400.0, name="x"), SimpleNamespace(sent=None)
    shown = handler(TaskTable)
    assert shown.format_task(("job", task))[1].sent == "1970-01-02 00:00:00"
    assert task.sent == 86_400.0
    assert shown.format_task(("job", never))[1].sent is None


class Reported:
    """A watch whose broker answers, or does not."""

    def __init__(self, reports: list[MetricsReport] | None, trouble: str = "") -> None:
        self.mirror, self.workers, self.dead, self.trouble = mirror(), [presence()], dict[str, Any](), trouble
        self._reports = reports

    async def reports(self) -> list[MetricsReport]:
        if self._reports is None:
            raise BrokerUnavailable("it is away")
        return self._reports


def scraped(watch: Reported, monkeypatch: pytest.MonkeyPatch) -> Scrape:
    async def theirs(self: Any) -> None:
        self.write(b"")

    monkeypatch.setattr(flower_monitor.Metrics, "get", theirs)
    asked = handler(Metrics, _watch=watch, _workers=exposition.WorkersText())
    asyncio.run(asked.get())
    return Scrape.of(b"".join(asked.written).decode())


def test_a_scrape_says_whether_the_broker_answers_and_is_answered_itself_in_any_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = Numbers()
    numbers.of(metrics.MEMORY).set(7)
    found = scraped(Reported([numbers.report("w@here/1")]), monkeypatch)
    assert (found.value("stoker_broker_up"), found.value("stoker_memory_bytes")) == (1, 7)
    # It goes away during the very scrape, or was away at the last look.
    for watch in (Reported(None), Reported([], "it is away")):
        found = scraped(watch, monkeypatch)
        assert found.value("stoker_broker_up") == 0
        assert found.value("stoker_workers", model="base") == 1, "what was seen last"

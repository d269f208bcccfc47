"""The monitor's application: what it answers to requests that the gate refuses, and what it lets go of at its end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from flower.app import Flower
from tornado.httputil import HTTPHeaders

from stoker.monitor import app
from stoker.monitor.access import Refusal
from stoker.monitor.app import Closed, Monitor, Refuse, celery_app
from stoker.monitor.watch import Watch
from stoker.settings import Settings


class Connected:
    closed = 0

    async def close(self) -> None:
        self.closed += 1


def test_a_monitor_that_ends_stops_watching_before_it_lets_go_of_the_broker() -> None:
    order: list[str] = []

    async def watches() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            order.append("watched no more")

    async def session() -> None:
        client = Connected()
        watching = asyncio.ensure_future(watches())
        await asyncio.sleep(0)
        monitor: Any = SimpleNamespace(_watching=watching, _client=client)
        await Monitor.leave(monitor)
        assert watching.cancelled()
        assert order == ["watched no more"]
        assert client.closed == 1
        # One that is ended before it has begun to watch.
        monitor = SimpleNamespace(_watching=None, _client=client)
        await Monitor.leave(monitor)
        assert client.closed == 2

    asyncio.run(session())


def test_a_refusal_is_answered_with_its_own_status_headers_and_words() -> None:
    said: list[Any] = []
    answer: Any = Refuse.__new__(Refuse)
    answer.set_status, answer.finish = said.append, said.append
    answer.set_header = lambda name, value: said.append((name, value))
    answer.initialize(Refusal(421, "another name", {"WWW-Authenticate": "Basic"}))
    answer.prepare()
    assert said == [
        421, ("Content-Type", "text/plain; charset=UTF-8"), ("WWW-Authenticate", "Basic"), "another name",
    ]  # fmt: skip


def test_no_page_elsewhere_shows_one_of_the_monitors_or_learns_where_a_link_was() -> None:
    headers = Closed.transform_first_chunk(object.__new__(Closed), 200, HTTPHeaders(), b"", True)[1]
    assert (headers["X-Frame-Options"], headers["Referrer-Policy"]) == ("DENY", "same-origin")


def test_the_app_that_asks_workers_has_their_settings_and_is_nobodys_current_one() -> None:
    app = celery_app(Settings(url="redis://127.0.0.1:6379/3"))
    assert app.conf.broker_url.endswith("/3")
    assert app.conf.broker_transport_options["global_keyprefix"] == "stoker:"


def test_the_monitor_remembers_so_many_tasks_and_workers_and_has_a_gate_before_each_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remembered: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    added: list[Any] = []

    def events(capp: Any, io_loop: Any, **named: Any) -> Any:
        remembered.update(named, url=capp.conf.broker_url, loop=io_loop)
        return SimpleNamespace(state="memory")

    monkeypatch.setattr(app, "JobEvents", events)
    monkeypatch.setattr(Flower, "__init__", lambda self, **named: shown.update(named))
    monkeypatch.setattr(Flower, "add_handlers", lambda self, hosts, handlers: added.extend([hosts, *handlers]))
    monkeypatch.setattr(Monitor, "events", SimpleNamespace(state="memory"), raising=False)
    refusals = [Refusal(421, "another name", {}), None]
    gate: Any = SimpleNamespace(refusal=lambda *request: refusals.pop(0))
    settings, loop = Settings(url="redis://h:5/2"), object()
    monitor = Monitor(settings, gate, loop, db="x", persistent=True)
    assert remembered == {
        "max_tasks_in_memory": app.TASKS, "max_workers_in_memory": app.WORKERS, "db": "x", "persistent": True,
        "url": "redis://h:5/2", "loop": loop,
    }  # fmt: skip
    assert (app.TASKS, app.WORKERS) == (10_000, 1000)
    assert (shown["io_loop"], shown["transforms"], shown["events"].state) == (loop, [Closed], "memory")
    assert isinstance(monitor.watch, Watch)
    assert added[0] == ".*"
    assert len(added) > 10
    delegated: list[Any] = []
    monkeypatch.setattr(Flower, "get_handler_delegate", lambda self, *found: delegated.append(found))
    monkeypatch.setattr(Flower, "find_handler", lambda self, request, **named: "its own")
    request: Any = SimpleNamespace(method="GET", path="/", headers={})
    monitor.find_handler(request)
    ((found, handler, named),) = delegated
    assert (found, handler, named["refusal"].status) == (request, Refuse, 421)
    assert monitor.find_handler(request) == "its own"

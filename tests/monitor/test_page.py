"""Stoker's own page in Flower: its data and its buttons, without a server."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from tornado import web
from tornado.web import StaticFileHandler

from stoker.broker.registry import AdapterEntry
from stoker.errors import BrokerUnavailable, InvalidRequest
from stoker.monitor import page, standard
from stoker.monitor.page import Act, Data
from stoker.settings import Settings
from tests.monitor.test_overview import mirror, presence
from tests.monitor.test_standard import handler


class Watched:
    """`asked`: whether adapters were to be looked at anew, each time."""

    def __init__(self, error: Exception | None = None, trouble: str = "") -> None:
        self.mirror, self.workers, self.dead = mirror(), [presence()], dict[str, Any]()
        self.trouble, self.error, self.asked = trouble, error, list[bool]()

    async def adapters(self, *, anew: bool = False) -> list[AdapterEntry]:
        self.asked.append(anew)
        if self.error is not None:
            raise self.error
        return []


def data(watch: Watched) -> dict[str, Any]:
    asked = handler(Data, _watch=watch, _current_user="stoker")
    asyncio.run(asked.get())
    found: dict[str, Any] = asked.written[0]
    return found


def test_the_page_is_shown_with_the_first_reason_why_the_broker_is_not_seen() -> None:
    assert data(Watched())["trouble"] == ""
    away = BrokerUnavailable("no adapters")
    assert data(Watched(away))["trouble"] == "no adapters"
    found = data(Watched(away, "the jobs cannot be seen"))
    assert (found["trouble"], found["adapters"], len(found["workers"])) == ("the jobs cannot be seen", (), 1)


class Changed:
    """A client whose adapters are changed."""

    def __init__(self, error: Exception | None = None) -> None:
        self.done: list[tuple[str, ...]] = []
        self.adapters, self.error = self, error

    async def job(self, job_id: str) -> Any:
        async def cancel() -> None:
            self.done.append(("cancel", job_id))

        return SimpleNamespace(cancel=cancel)

    async def retry(self, job_id: str) -> Any:
        self.done.append(("retry", job_id))
        return SimpleNamespace(id=job_id)

    async def promote(self, name: str, model: str | None = None) -> Any:
        return self._changed("promote", name, model)

    async def rollback(self, name: str, model: str | None = None) -> Any:
        return self._changed("rollback", name, model)

    def _changed(self, verb: str, name: str, model: str | None) -> Any:
        if self.error is not None:
            raise self.error
        self.done.append((verb, name, str(model)))
        return SimpleNamespace(name=name, serving=2)


def pressed(client: Changed, watch: Watched, verb: str, **body: str) -> str:
    act = handler(Act, _client=client, _watch=watch, _current_user="stoker")
    act.get_body_argument = lambda name, default="": body.get(name, default)
    asyncio.run(act.post(verb))
    return str(act.written[0]["message"])


def test_a_button_does_what_it_says_to_the_very_adapter_or_job() -> None:
    client, watch = Changed(), Watched()
    assert pressed(client, watch, "cancel", target="job") == "job: asked to stop"
    assert pressed(client, watch, "retry", target="job") == "job: sent again"
    assert watch.asked == []
    for verb in ("promote", "rollback"):
        assert pressed(client, watch, verb, target="style", model="base") == "style: version 2 serves"
    assert client.done == [
        ("cancel", "job"), ("retry", "job"), ("promote", "style", "base"), ("rollback", "style", "base"),
    ]  # fmt: skip
    assert watch.asked == [True, True], "who has pressed it sees what it did"


def test_a_button_that_cannot_do_it_is_answered_with_the_reason() -> None:
    with pytest.raises(web.HTTPError) as refused:
        pressed(Changed(InvalidRequest("it serves now")), Watched(), "promote", target="style")
    assert (refused.value.status_code, refused.value.log_message) == (409, "it serves now")


def test_every_request_of_stokers_own_needs_a_login_except_numbers() -> None:
    """The gate asks for it too; neither relies on the other."""
    client: Any = SimpleNamespace(settings=Settings(url="redis://127.0.0.1:6379/0"))
    watch: Any = None
    open_ = {standard.Metrics, standard.TaskTable, StaticFileHandler}
    rules: list[Any] = [*page.handlers(client, watch), *standard.handlers(client, watch)]
    methods = [
        vars(rule.target)[name]
        for rule in rules if rule.target not in open_
        for name in ("get", "post") if name in vars(rule.target)
    ]  # fmt: skip
    assert len(methods) >= 8
    assert all("__wrapped__" in vars(method) for method in methods), "tornado.web.authenticated"


def test_the_page_loads_sends_and_is_shown_nowhere_else() -> None:
    said = dict(part.strip().split(" ", 1) for part in page.POLICY.split(";"))
    assert said["default-src"] == said["frame-ancestors"] == said["base-uri"] == "'none'"
    assert said["script-src"] == said["connect-src"] == said["form-action"] == said["font-src"] == "'self'"

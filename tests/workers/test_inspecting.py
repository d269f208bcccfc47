"""What a worker says of itself to those who watch: they learn where its broker is, and no login."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker.consumer.connection import Connection
from celery.worker.control import Panel
from kombu.utils.json import dumps

from stoker.celery_config import shared_config
from stoker.settings import Settings
from workers.celery import control, transport
from workers.celery.transport import WorkerConnection
from workers.context import WorkerContext
from workers.deliveries import Deliveries, Health

URLS = {
    "redis://me:hunter2@host:7000/1": "redis://me:***@host:7000/1",
    "redis://hunter2@host:7000/1": "redis://***@host:7000/1",
    "redis+sentinel://me:hunter2@one:1,two:2/queue/0?sentinel_username=asking&sentinel_password=hunter2": (
        "redis+sentinel://me:***@one:1,two:2/queue/0"
    ),
}


def worker_at(url: str) -> Any:
    """What a control message finds in a worker that has been connected."""
    settings = Settings(url=url)
    app = Celery("stoker", set_as_current=False)
    app.conf.update(shared_config(settings), result_backend=settings.address.celery)
    app.context = WorkerContext(settings)
    options = app.conf.broker_transport_options
    with WorkerConnection(
        settings.address.celery, transport_options=options, deliveries=Deliveries(Health(1))
    ) as connection:
        consumer: Any = SimpleNamespace(connection=connection)
        said = Connection(consumer).info(consumer)
    consumer.controller = SimpleNamespace(stats=lambda: {"pid": 7, **said})
    return SimpleNamespace(app=app, consumer=consumer)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", ["stats", "conf"])
def test_a_worker_that_is_inspected_answers_with_its_brokers_address_and_no_login(url: str, command: str) -> None:
    transport.install()
    control.install()
    reply = Panel.data[command](worker_at(url))
    sent = dumps(reply)
    assert "hunter2" not in sent
    assert URLS[url] in sent
    assert reply.get("pid" if command == "stats" else "task_serializer"), "the rest is Celery's"


@pytest.mark.parametrize("url", URLS)
def test_celerys_report_of_a_worker_holds_no_login(url: str) -> None:
    control.install()
    text = Panel.data["report"](worker_at(url))["ok"]
    assert "hunter2" not in text
    assert re.search("broker_url: .*//[*]{3}@", text)

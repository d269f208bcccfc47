"""Flower's own requests that mean something else here, or nothing: the same addresses, answered by Stoker.

Jobs are cancelled through the ledger, which knows those that wait too. Queues are counted with their backlogs. What
Celery's other pools and queues can do and Stoker's cannot is refused, with what to do instead.
"""

from __future__ import annotations

from copy import copy
from datetime import UTC, datetime
from typing import Any, NoReturn

from flower.api import BaseApiHandler
from flower.views import BaseHandler
from flower.views import monitor as flower_monitor
from flower.views.tasks import TasksDataTable
from tornado import web
from tornado.routing import Rule
from tornado.web import url

from stoker import AsyncClient
from stoker.errors import BrokerUnavailable, StokerError
from stoker.monitor import exposition
from stoker.monitor.fleet import fleet
from stoker.monitor.numbers import MetricsReport
from stoker.monitor.overview import Queue, queues
from stoker.monitor.watch import Watch


def refuse(error: StokerError) -> NoReturn:
    """An error of Stoker's as an answer that says all of it."""
    raise web.HTTPError(503 if isinstance(error, BrokerUnavailable) else 409, str(error))


class Revoke(BaseApiHandler):
    """Flower's buttons Revoke and Terminate: a job stops, whether it waits or runs."""

    def initialize(self, client: AsyncClient) -> None:
        self._client = client

    @web.authenticated
    async def post(self, job_id: str) -> None:
        try:
            await (await self._client.job(job_id)).cancel()
        except StokerError as error:
            refuse(error)
        self.write({"message": f"Revoked '{job_id}'"})


class QueueLengths(BaseApiHandler):
    def initialize(self, watch: Watch) -> None:
        self._watch = watch

    @web.authenticated
    def get(self) -> None:
        found = [{"name": queue.name, "messages": queue.waiting} for queue in queues(self._watch.mirror)]
        self.write({"active_queues": found})


class Broker(BaseHandler):
    """Every queue of the fleet's models, also where lanes are full just now."""

    def initialize(self, watch: Watch, shown: str) -> None:
        self._watch, self._shown = watch, shown

    @web.authenticated
    def get(self) -> None:
        rows = [self._row(queue) for queue in queues(self._watch.mirror)]
        self.render("broker.html", broker_url=self._shown, queues=rows)

    def _row(self, queue: Queue) -> dict[str, Any]:
        cards = [card for worker in self._watch.workers for card in worker.models if card.model == queue.model]
        consumers = sum(queue.kind in card.kinds for card in cards)
        return {
            "name": queue.name,
            "messages": queue.waiting + queue.running,
            "messages_unacknowledged": queue.running,
            "messages_ready": queue.waiting,
            "consumers": consumers,
        }


class TaskTable(TasksDataTable):
    """The rows of the page Tasks; when a job was sent, as people read it."""

    def format_task(self, task: Any) -> Any:
        job_id, shown = super().format_task(task)
        if shown.sent is not None:
            shown = copy(shown)
            shown.sent = datetime.fromtimestamp(shown.sent, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")
        return job_id, shown


class Metrics(flower_monitor.Metrics):
    """Flower's own metrics, and behind them those of the fleet and of each worker."""

    def initialize(self, watch: Watch, workers: exposition.WorkersText) -> None:
        self._watch, self._workers = watch, workers

    async def get(self) -> None:
        await super().get()
        watch, reports = self._watch, list[MetricsReport]()
        try:
            reports = await watch.reports()
            trouble = watch.trouble
        except StokerError as error:
            trouble = str(error)
        seen = fleet(watch.mirror, watch.workers, watch.dead, up=not trouble)
        self.write(exposition.text(exposition.of_fleet(seen)) + self._workers.of(reports))


class RefusedRequest(BaseApiHandler):
    """`reason`: why, and what to do instead."""

    def initialize(self, reason: str) -> None:
        self._reason = reason

    @web.authenticated
    def post(self, *_: str) -> None:
        raise web.HTTPError(403, self._reason)

    @web.authenticated
    def get(self, *_: str) -> None:
        raise web.HTTPError(403, self._reason)


_POOL = (
    "a worker holds as many jobs as its lanes have room for. Set STOKER_GENERATE_SLOTS, STOKER_EMBED_JOBS or "
    "STOKER_TRAIN_RUNS, and start it again."
)
_QUEUES = "a worker takes from the queues of its models: start it with STOKER_MODELS, or `stoker worker --model NAME`."
_LIMITS = "a job has a deadline of its own (`deadline=` of the call), and a queue has limits (`stoker jobs policy`)."
_SENDING = "jobs are sent by Stoker's client or the command `stoker`: a message alone is no job."
_RESULTS = "results are their clients' own: Client.job(ID).result()."
REFUSED = (
    (r"/api/worker/pool/(?:restart|grow|shrink|autoscale)/(.+)", _POOL),
    (r"/api/worker/queue/(?:add|cancel)-consumer/(.+)", _QUEUES),
    (r"/api/task/(?:timeout|rate-limit)/(.+)", _LIMITS),
    (r"/api/task/(?:apply|async-apply|send-task)/(.+)", _SENDING),
    (r"/api/task/abort/(.+)", "a job is cancelled by POST /api/task/revoke/ID."),
    (r"/api/task/result/(.+)", _RESULTS),
)


def handlers(client: AsyncClient, watch: Watch) -> list[Rule]:
    """They stand before Flower's own."""
    shown = client.settings.address.shown
    return [
        url(r"/api/task/revoke/(.+)", Revoke, {"client": client}),
        url(r"/api/queues/length", QueueLengths, {"watch": watch}),
        url(r"/tasks/datatable", TaskTable),
        url(r"/metrics", Metrics, {"watch": watch, "workers": exposition.WorkersText()}),
        url(r"/broker", Broker, {"watch": watch, "shown": shown}),
        *(url(pattern, RefusedRequest, {"reason": reason}) for pattern, reason in REFUSED),
    ]

"""Flower, with Stoker's handlers before its own, a gate before all of them, and the watch of the ledger."""

from __future__ import annotations

import asyncio
from typing import Any

from celery import Celery
from flower.app import Flower
from flower.options import options
from flower.urls import settings as flower_settings
from flower.views import tasks as task_views
from tornado import web
from tornado.httputil import HTTPHeaders, HTTPServerRequest

from stoker import AsyncClient
from stoker.celery_config import shared_config
from stoker.monitor import page, standard
from stoker.monitor.access import Gate, Refusal
from stoker.monitor.state import JobEvents, JobMemory
from stoker.monitor.templating import Loader
from stoker.monitor.watch import Watch
from stoker.settings import Settings

#: Tasks and workers that Flower remembers.
TASKS = 10_000
WORKERS = 1000
#: Seconds that a worker which has gone keeps its row.
GONE = 24 * 3600
#: Columns of the page Tasks. The first one is what they are ordered by.
COLUMNS = "sent,uuid,name,state,kwargs,progress,started,runtime,worker"
task_views.TASK_COLUMNS.update(sent="Sent", progress="Progress")


class Refuse(web.RequestHandler):
    """The answer to a request that the gate refuses."""

    def initialize(self, refusal: Refusal) -> None:
        self._refusal = refusal

    def check_xsrf_cookie(self) -> None:
        """What is refused changes nothing."""

    def prepare(self) -> None:
        self.set_status(self._refusal.status)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        for name, value in self._refusal.headers.items():
            self.set_header(name, value)
        self.finish(self._refusal.text)


class Closed(web.OutputTransform):
    """No page elsewhere shows one of these in a frame, under a button of its own; none learns where a link was."""

    def transform_first_chunk(
        self, status_code: int, headers: HTTPHeaders, chunk: bytes, finishing: bool
    ) -> tuple[int, HTTPHeaders, bytes]:
        headers["X-Frame-Options"], headers["Referrer-Policy"] = "DENY", "same-origin"
        return status_code, headers, chunk


class Monitor(Flower):
    """`options` of Flower's own are set before, by `command.configure`."""

    def __init__(self, settings: Settings, gate: Gate, io_loop: Any, **events: Any) -> None:
        self._gate, self._client = gate, AsyncClient(settings=settings)
        capp = celery_app(settings)
        memory = JobEvents(capp, io_loop, max_tasks_in_memory=TASKS, max_workers_in_memory=WORKERS, **events)
        shown = {**flower_settings, "template_loader": Loader(), "transforms": [Closed]}
        super().__init__(options=options, capp=capp, events=memory, io_loop=io_loop, **shown)
        self.watch = Watch(self._client, self._memory)
        self.add_handlers(
            ".*", [*page.handlers(self._client, self.watch), *standard.handlers(self._client, self.watch)]
        )
        self._watching: asyncio.Task[None] | None = None

    def _memory(self) -> JobMemory:
        return self.events.state  # type: ignore[no-any-return]

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> Any:
        refusal = self._gate.refusal(request.method or "", request.path, request.headers)
        if refusal is not None:
            return self.get_handler_delegate(request, Refuse, {"refusal": refusal})
        return super().find_handler(request, **kwargs)

    def start(self) -> None:
        """Run until the loop is stopped."""
        self.io_loop.add_callback(self._start_watching)
        super().start()

    def _start_watching(self) -> None:
        self._watching = asyncio.ensure_future(self.watch.run())

    async def leave(self) -> None:
        """Let go of the broker."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        await self._client.close()


def celery_app(settings: Settings) -> Celery:
    """The app that Flower asks workers by: it names no task, because it sends none."""
    app = Celery("stoker", set_as_current=False)
    app.conf.update(shared_config(settings))
    return app

"""Stoker's own page in Flower: what it shows, as JSON, and its buttons."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado import web
from tornado.routing import Rule
from tornado.web import StaticFileHandler, url

from stoker import AsyncClient
from stoker.errors import StokerError
from stoker.monitor.overview import overview
from stoker.monitor.standard import refuse
from stoker.monitor.watch import Watch

STATIC = Path(__file__).parent / "static"
#: What the page may load: nothing from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)


class Page(BaseHandler):
    @web.authenticated
    def get(self) -> None:
        self.set_header("Content-Security-Policy", POLICY)
        self.render("stoker.html")


class Data(BaseApiHandler):
    def initialize(self, watch: Watch) -> None:
        self._watch = watch

    @web.authenticated
    async def get(self) -> None:
        watch, trouble = self._watch, self._watch.trouble
        try:
            adapters = await watch.adapters()
        except StokerError as error:
            adapters, trouble = [], trouble or str(error)
        self.write(asdict(overview(watch.mirror, watch.workers, adapters, watch.dead, trouble)))


#: A button: what it does with its argument, and what is said when it is done.
Action = Callable[[AsyncClient, str, str | None], Awaitable[str]]


async def _cancel(client: AsyncClient, job_id: str, _: str | None) -> str:
    await (await client.job(job_id)).cancel()
    return f"{job_id}: asked to stop"


async def _retry(client: AsyncClient, job_id: str, _: str | None) -> str:
    return f"{(await client.retry(job_id)).id}: sent again"


async def _promote(client: AsyncClient, adapter: str, model: str | None) -> str:
    entry = await client.adapters.promote(adapter, model)
    return f"{entry.name}: version {entry.serving} serves"


async def _roll_back(client: AsyncClient, adapter: str, model: str | None) -> str:
    entry = await client.adapters.rollback(adapter, model)
    return f"{entry.name}: version {entry.serving} serves"


ACTIONS: dict[str, Action] = {"cancel": _cancel, "retry": _retry, "promote": _promote, "rollback": _roll_back}


class Act(BaseApiHandler):
    """A button of the page: `target` is a job's id, or an adapter of `model`."""

    def initialize(self, client: AsyncClient, watch: Watch) -> None:
        self._client, self._watch = client, watch

    @web.authenticated
    async def post(self, verb: str) -> None:
        target, model = self.get_body_argument("target"), self.get_body_argument("model", None)
        try:
            said = await ACTIONS[verb](self._client, target, model)
            if verb in ("promote", "rollback"):
                await self._watch.adapters(anew=True)
        except StokerError as error:
            refuse(error)
        self.write({"message": said})


def handlers(client: AsyncClient, watch: Watch) -> list[Rule]:
    return [
        url(r"/stoker", Page, name="stoker"),
        url(r"/stoker/data", Data, {"watch": watch}),
        url(rf"/stoker/({'|'.join(ACTIONS)})", Act, {"client": client, "watch": watch}),
        url(r"/stoker/static/([a-z.]+)", StaticFileHandler, {"path": str(STATIC)}, name="stoker-static"),
    ]

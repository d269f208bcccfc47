"""The gateway's ASGI application: its paths, and what a request meets on its way to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from stoker.client._async.broker_link import AsyncBrokerLink
from stoker.client._async.client import AsyncClient
from stoker.gateway import anthropic, chat, completions, embeddings, listing, rerank, responses
from stoker.gateway.access import Access, AnyCaller
from stoker.gateway.answers import Generation, answered
from stoker.gateway.batch_runner import Runner
from stoker.gateway.batches import BatchEndpoints
from stoker.gateway.bodies import read_body
from stoker.gateway.calls import Call, Caller, Models, NamedJob, keeps
from stoker.gateway.files import Files
from stoker.gateway.fine_tuning import FineTuning
from stoker.gateway.front import Front
from stoker.gateway.health import Health
from stoker.gateway.stored import Store
from stoker.gateway.sweeping import sweep_for_ever
from stoker.gateway.tasks import ended
from stoker.gateway.waiting import Waiting
from stoker.monitor.numbers import Numbers

#: What an endpoint asks for, from its request.
Reader: TypeAlias = Callable[[Call], Awaitable[Generation]]
Answerer: TypeAlias = Callable[[Request], Awaitable[ASGIApp]]
#: The same, of an endpoint that goes by who asks: the client key.
Owned: TypeAlias = Callable[[Request, str], Awaitable[ASGIApp]]


def _methods(routes: Sequence[Route], scope: Scope) -> list[str]:
    """Those that the path of a request takes."""
    taking = (route for route in routes if route.matches(scope)[0] is not Match.NONE)
    return sorted({method for route in taking for method in route.methods or ()})


class Endpoint:
    """An ASGI application of one path."""

    def __init__(self, answer: Answerer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive, send))
        await response(scope, receive, send)


@dataclass(frozen=True)
class Gateway:
    """What all requests share. `names`: what the gateway is reached under, except addresses and `localhost`."""

    client: AsyncClient
    names: frozenset[str] = frozenset()
    access: Access = field(default_factory=AnyCaller)
    #: Whose broker keeps files and batches; None: that of `client`.
    broker: AsyncClient | None = None
    waiting: Waiting = field(init=False, default_factory=Waiting)
    models: Models = field(init=False)
    store: Store = field(init=False)
    fine_tuning: FineTuning = field(init=False)
    runner: Runner = field(init=False)
    batches: BatchEndpoints = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", Models(self.client))
        object.__setattr__(self, "store", Store(self.keeper))
        object.__setattr__(self, "fine_tuning", FineTuning(self.client, self.store))
        object.__setattr__(self, "runner", Runner(self.client, self.keeper, self.store, self.models))
        object.__setattr__(self, "batches", BatchEndpoints(self.keeper, self.store, self.runner.wake))

    @property
    def keeper(self) -> AsyncClient:
        return self.broker or self.client

    def application(self) -> ASGIApp:
        posted = {
            "/v1/chat/completions": self.generating(chat.asked),
            "/v1/completions": self.generating(completions.asked),
            "/v1/embeddings": self.embedding,
            "/v1/rerank": self.reranking,
            "/v1/messages": self.generating(anthropic.asked),
            "/v1/responses": self.generating(responses.asked),
            "/v1/fine_tuning/jobs": self.fine_tune,
            "/v1/batches": self.batch,
        }
        numbers = Numbers()
        health = Health(self.client, numbers)
        shown: dict[str, Answerer] = {"/v1/models": self.list_models, "/v1/models/{name:path}": self.show_model}
        shown |= {"/healthz": health.alive, "/readyz": health.ready, "/metrics": health.metrics}
        routes = [Route(path, Endpoint(answerer), methods=["POST"]) for path, answerer in posted.items()]
        routes += [Route(path, Endpoint(answerer), methods=["GET"]) for path, answerer in shown.items()]
        kept = [*self._of_files(), *self._of_fine_tuning()]
        routes += [Route(path, Endpoint(self.owned(answer)), methods=[method]) for method, path, answer in kept]
        paths = (*posted, *shown, *(path for _, path, _ in kept))
        # A client would be sent on over plain HTTP, also from behind TLS: its key and its body would go in the open.
        router = Router(routes, redirect_slashes=False, lifespan=self._lifespan)
        return Front(router, self.names, numbers, paths, partial(_methods, routes))

    def _of_files(self) -> list[tuple[str, str, Owned]]:
        files = Files(self.store)
        return [
            ("POST", "/v1/files", files.upload),
            ("GET", "/v1/files", files.list),
            ("GET", "/v1/files/{file_id}", files.retrieve),
            ("GET", "/v1/files/{file_id}/content", files.content),
            ("DELETE", "/v1/files/{file_id}", files.delete),
            ("GET", "/v1/batches", self.batches.list),
            ("GET", "/v1/batches/{batch_id}", self.batches.retrieve),
            ("POST", "/v1/batches/{batch_id}/cancel", self.batches.cancel),
        ]

    def _of_fine_tuning(self) -> list[tuple[str, str, Owned]]:
        runs, path = self.fine_tuning, "/v1/fine_tuning/jobs"
        return [
            ("GET", path, runs.list),
            ("GET", path + "/{job_id}", runs.retrieve),
            ("POST", path + "/{job_id}/cancel", runs.cancel),
            ("GET", path + "/{job_id}/events", runs.events),
            ("GET", path + "/{job_id}/checkpoints", runs.checkpoints),
        ]

    @asynccontextmanager
    async def _lifespan(self, app: object) -> AsyncIterator[None]:
        async with self.background():
            yield
        await self.client.close()

    @asynccontextmanager
    async def background(self) -> AsyncIterator[None]:
        """What goes on inside besides requests: batches run, and what is gone is deleted."""
        tasks = {asyncio.ensure_future(task) for task in self._tasks()}
        try:
            yield
        finally:
            await ended(tasks)
            await self.waiting.end()

    def _tasks(self) -> Iterator[Coroutine[Any, Any, None]]:
        if isinstance(self.keeper.link, AsyncBrokerLink):
            yield sweep_for_ever(self.store)
            yield self.runner.run_for_ever()

    async def caller(self, request: Request) -> Caller:
        """Who asks. Raises `Refused`."""
        return await self.access.caller(request.headers)

    async def call(self, request: Request) -> Call:
        """Raises `Refused` for a request that is not even read."""
        named: NamedJob = request.state.named
        caller = await self.caller(request)
        client = self.client if caller.key is None else self.client.with_key(caller.key)
        keep, body = keeps(request.headers), await read_body(request)
        return Call(client, caller, self.models, body, named, keep, request.receive, self.access.spend, self.waiting)

    async def list_models(self, request: Request) -> Response:
        return await listing.models(self.client, (await self.caller(request)).models)

    async def show_model(self, request: Request) -> Response:
        allowed = (await self.caller(request)).models
        return await listing.model(self.client, request.path_params["name"], allowed)

    def generating(self, read: Reader) -> Answerer:
        async def answer(request: Request) -> ASGIApp:
            call = await self.call(request)
            return await answered(call, await read(call))

        return answer

    def owned(self, answer: Owned) -> Answerer:
        """What belongs to a client is asked for under its key; where there are no keys, under the gateway's own."""

        async def answered(request: Request) -> ASGIApp:
            caller = await self.caller(request)
            return await answer(request, caller.key or self.client.settings.client_key)

        return answered

    async def fine_tune(self, request: Request) -> Response:
        return await self.fine_tuning.create(await self.call(request))

    async def batch(self, request: Request) -> Response:
        return await self.batches.create(await self.call(request))

    async def embedding(self, request: Request) -> Response:
        return await embeddings.answered(await self.call(request))

    async def reranking(self, request: Request) -> Response:
        return await rerank.answered(await self.call(request))

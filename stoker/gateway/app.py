"""The gateway's ASGI application: its paths, and what a request meets on its way to one of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from stoker.client._async.client import AsyncClient
from stoker.gateway import anthropic, chat, completions, embeddings, listing, responses
from stoker.gateway.access import Access, Anybody
from stoker.gateway.answers import Generation, answered
from stoker.gateway.bodies import read_body
from stoker.gateway.calls import Call, Caller, Models, NamedJob, keeps
from stoker.gateway.events import EventResponse
from stoker.gateway.front import Front
from stoker.gateway.health import Health
from stoker.monitor.numbers import Numbers

#: What an endpoint asks for, from its request.
Reader: TypeAlias = Callable[[Call], Awaitable[Generation]]
Answerer: TypeAlias = Callable[[Request], Awaitable[Response | EventResponse]]


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
    access: Access = field(default_factory=Anybody)
    models: Models = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", Models(self.client))

    def application(self) -> ASGIApp:
        posted = {
            "/v1/chat/completions": self.generating(chat.asked),
            "/v1/completions": self.generating(completions.asked),
            "/v1/embeddings": self.embedding,
            "/v1/messages": self.generating(anthropic.asked),
            "/v1/responses": self.generating(responses.asked),
        }
        numbers = Numbers()
        health = Health(self.client, numbers)
        shown: dict[str, Answerer] = {"/v1/models": self.list_models, "/v1/models/{name:path}": self.show_model}
        shown |= {"/healthz": health.alive, "/readyz": health.ready, "/metrics": health.metrics}
        routes = [Route(path, Endpoint(answerer), methods=["POST"]) for path, answerer in posted.items()]
        routes += [Route(path, Endpoint(answerer), methods=["GET"]) for path, answerer in shown.items()]
        return Front(Router(routes, lifespan=self._lifespan), self.names, numbers, (*posted, *shown))

    @asynccontextmanager
    async def _lifespan(self, app: object) -> AsyncIterator[None]:
        yield
        await self.client.close()

    async def caller(self, request: Request) -> Caller:
        """Who asks. Raises `Refused`."""
        return await self.access.caller(request.headers)

    async def call(self, request: Request) -> Call:
        """Raises `Refused` for a request that is not even read."""
        named: NamedJob = request.state.named
        caller = await self.caller(request)
        client = self.client if caller.key is None else self.client.with_key(caller.key)
        keep, body = keeps(request.headers), await read_body(request)
        return Call(client, caller, self.models, body, named, keep, request.receive, self.access.spend)

    async def list_models(self, request: Request) -> Response:
        return await listing.models(self.client, (await self.caller(request)).models)

    async def show_model(self, request: Request) -> Response:
        allowed = (await self.caller(request)).models
        return await listing.model(self.client, request.path_params["name"], allowed)

    def generating(self, read: Reader) -> Answerer:
        async def answer(request: Request) -> Response | EventResponse:
            call = await self.call(request)
            return await answered(call, await read(call))

        return answer

    async def embedding(self, request: Request) -> Response:
        return await embeddings.answered(await self.call(request))

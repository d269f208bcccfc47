"""What supervisors, load balancers and Prometheus ask, without a key."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stoker.client._async.client import AsyncClient
from stoker.client.asynchronously import Joint
from stoker.contract.codec import CONTRACT
from stoker.errors import StokerError
from stoker.monitor import exposition
from stoker.monitor.numbers import Numbers

#: Seconds for which an answer of `/readyz` holds: every program may ask, and the broker is asked for them once.
HOLDS = 1.0
#: Seconds that the broker has for its answer.
WITHIN = 2.0


class Health:
    """`numbers`: what this process has counted."""

    def __init__(self, client: AsyncClient, numbers: Numbers) -> None:
        self._client, self._numbers = client, numbers
        self._ready, self._until = Response(status_code=503), 0.0
        self._asking: Joint[Response] = Joint()

    async def alive(self, request: Request) -> Response:
        """The process answers."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """The broker answers, and some model is warm."""
        if time.monotonic() >= self._until:
            self._ready = await self._asking.ask("ready", self._asked)
            self._until = time.monotonic() + HOLDS
        return self._ready

    async def _asked(self) -> Response:
        try:
            async with asyncio.timeout(WITHIN):
                workers = await self._client.workers()
        except (StokerError, TimeoutError) as error:
            why = str(error) or f"the broker did not answer within {WITHIN:g} s."
            return JSONResponse({"status": "the broker is away", "reason": why}, 503)
        warm = sorted({card.model for worker in workers for card in worker.models if card.contract == CONTRACT})
        return JSONResponse({"status": "ok" if warm else "no model is warm", "models": warm}, 200 if warm else 503)

    async def metrics(self, request: Request) -> Response:
        """As Prometheus reads them."""
        families = exposition.of_gateway(self._numbers.report())
        return Response(exposition.text(families), media_type="text/plain; version=0.0.4; charset=utf-8")

"""What every request passes on its way in and out: its host, its id, and the form of its errors."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stoker.contract.shown import brief, printable
from stoker.errors import StokerError
from stoker.gateway.calls import job_of
from stoker.gateway.errors import Names, Refused
from stoker.monitor import metrics
from stoker.monitor.access import host_name, is_address
from stoker.monitor.metrics import OTHER
from stoker.monitor.numbers import Numbers

log = logging.getLogger(__name__)

#: Paths that answer in Anthropic's form.
ANTHROPIC = "/v1/messages"


class Front:
    """ASGI middleware. `names`: hosts that it answers to, except addresses and `localhost`: a page of another site can
    point its own name at this machine."""

    def __init__(
        self,
        app: ASGIApp,
        names: frozenset[str],
        numbers: Numbers,
        paths: Iterable[str],
        methods: Callable[[Scope], Sequence[str]] = lambda scope: (),
    ) -> None:
        """`numbers`: where requests are counted, by those of `paths`. `methods`: those that a request's path takes."""
        self._app, self._names, self._numbers, self._paths = app, names, numbers, tuple(paths)
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = next((path for path in self._paths if path == scope["path"]), OTHER)
        exchange = Exchange(scope, send, Meter(self._numbers, endpoint))
        try:
            self._check_host(exchange.headers)
            named = job_of(exchange.headers, exchange.id)
            exchange.id = named.id
            # Starlette's router raises what it answers with only within an application.
            inner = {**scope, "app": self, "state": {**scope.get("state", {}), "named": named}}
            await self._app(inner, receive, exchange.send)
        except Refused as refused:
            await exchange.refuse(refused)
        except HTTPException as error:
            await exchange.refuse(_no_such(error, scope, self._methods(scope)))
        except StokerError as error:
            await exchange.refuse(Names().refusal(error))
        except asyncio.CancelledError:
            message = f"the gateway ends, and the job goes on: ask another one with Idempotency-Key: {exchange.id}."
            await exchange.refuse(Refused(503, message, code="gateway_ends", again=1.0))
            raise
        except Exception:
            log.exception("request %s failed by a defect of the gateway", exchange.id)
            message = f"the gateway failed; its log has the reason, under request {exchange.id}."
            await exchange.refuse(Refused(500, message, code="gateway_error"))
        finally:
            exchange.end()

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host_name(host)
        if name == "localhost" or name in self._names or is_address(name):
            return
        allowed = "".join(f", {name}" for name in sorted(self._names))
        raise Refused(
            421, f"Host: {brief(host, 100)} given; allowed: an address, localhost{allowed}. "
            "Another name has to be allowed at the start: stoker serve --host NAME.",
        )  # fmt: skip


def _no_such(error: HTTPException, scope: Scope, methods: Sequence[str]) -> Refused:
    """For a path or a method that there is not. `methods`: those that the path takes."""
    asked = f"{scope['method']} {brief(scope['path'], 100)}"
    if error.status_code == 405:
        allowed = ", ".join(methods)
        message = f"{asked}: another method given; this path takes {allowed}."
        return Refused(405, message, code="unknown_url", further={"allow": allowed})
    return Refused(
        error.status_code, f"{asked}: not supported by Stoker. docs/gateway.md lists what is.", code="unknown_url"
    )


class Meter:
    """Counts one request."""

    def __init__(self, numbers: Numbers, endpoint: str) -> None:
        self._numbers, self._endpoint, self._began = numbers, endpoint, time.monotonic()
        numbers.of(metrics.HTTP_OPEN, endpoint).add()

    def answered(self) -> None:
        self._numbers.of(metrics.HTTP_FIRST, self._endpoint).observe(time.monotonic() - self._began)

    def ended(self, status: int) -> float:
        """Seconds that it took."""
        took = time.monotonic() - self._began
        self._numbers.of(metrics.HTTP_OPEN, self._endpoint).add(-1)
        self._numbers.of(metrics.HTTP_REQUESTS, self._endpoint, str(status)).add()
        self._numbers.of(metrics.HTTP_DURATION, self._endpoint).observe(took)
        return took


class Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send, meter: Meter) -> None:
        self.headers = Headers(scope=scope)
        self.status = 0
        self._scope, self._send, self._meter = scope, send, meter
        #: The id of the request, and of its job.
        self.id = str(uuid.uuid4())

    @property
    def _of_anthropic(self) -> bool:
        """Whether it is answered as Anthropic's clients read it."""
        return bool(self._scope["path"].startswith(ANTHROPIC))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._meter.answered()
            names = (b"x-request-id", b"request-id") if self._of_anthropic else (b"x-request-id",)
            headers = [*message.get("headers", []), *((name, self.id.encode()) for name in names)]
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """Answer with an error; nothing, where an answer has begun or nobody is there for one."""
        if self.status or refused.status == 499:
            self.status = self.status or refused.status
            return
        body = json.dumps(refused.anthropic(self.id) if self._of_anthropic else refused.openai()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
        sent = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": sent})
        await self.send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """One line, without anything of what was asked or answered."""
        path, took = printable(self._scope["path"][:80]), self._meter.ended(self.status)
        log.info("%s %s %d in %.3f s, request %s", self._scope["method"], path, self.status, took, self.id)

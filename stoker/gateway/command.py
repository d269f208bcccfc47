"""Running the gateway, until it is asked to end."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from contextlib import closing

import uvicorn
from starlette.types import ASGIApp

from stoker.broker import api_keys
from stoker.broker.connection import connect, translated
from stoker.client._async.client import AsyncClient
from stoker.errors import ConfigError
from stoker.gateway.access import Keyed
from stoker.gateway.app import Gateway
from stoker.gateway.protocol import TimedProtocol
from stoker.logs import setup as logs
from stoker.settings import Settings

#: Bytes of the headers of one request.
MOST_HEADERS = 32 * 1024
#: Connections, and requests, that one process serves at once; further ones are answered with 503.
MOST_CONNECTIONS = 4096
#: Seconds that running requests get when the gateway is asked to end; then clients go on with another gateway.
GRACE = 5
#: Seconds for which a connection without a request is kept.
IDLE = 60


def serve(settings: Settings, address: str, port: int, names: frozenset[str], say: Callable[[str], None]) -> None:
    """Serve until a signal ends it. Raises `ConfigError`."""
    # Where none was chosen, nothing is begun.
    broker = settings.address.shown
    logs.configure(settings)
    for name in ("uvicorn.error", "uvicorn.access", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = AsyncClient(settings=settings)
    required = not is_loopback(address)
    if required and not _has_keys(settings):
        raise ConfigError(
            f"--address {address}: every program that reaches it could send jobs. Without keys loopback alone may be "
            "served: 127.0.0.1 or ::1. Make a key first: stoker keys create NAME."
        )
    gateway = Gateway(client, names, Keyed(client, required=required))
    with listening(address, port) as listener:
        where = listener.getsockname()[1]
        shown = f"[{address}]" if ":" in address else address
        say(f"gateway  http://{shown}:{where}/v1")
        say(f"broker   {broker}")
        asyncio.run(server(gateway.application()).serve(sockets=[listener]))


def _has_keys(settings: Settings) -> bool:
    with translated(settings), closing(connect(settings)) as redis:
        return bool(api_keys.listed(redis))


def server(app: ASGIApp) -> uvicorn.Server:
    """uvicorn with Stoker's limits, and none of its own lines of requests."""
    return uvicorn.Server(
        uvicorn.Config(
            app, http=TimedProtocol, ws="none", interface="asgi3", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, h11_max_incomplete_event_size=MOST_HEADERS,
            limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=IDLE, timeout_graceful_shutdown=GRACE,
        )
    )  # fmt: skip


def listening(address: str, port: int) -> socket.socket:
    """Raises `ConfigError` where it cannot be listened."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"--address {address} --port {port}: cannot be listened on ({why}).") from None


def is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False

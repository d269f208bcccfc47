"""`stoker serve`: the gateway."""

from __future__ import annotations

from typing import Annotated

import typer

from stoker.cli.options import Url
from stoker.errors import ConfigError
from stoker.settings import Settings, load_settings

PORT = 8000


def serve(
    port: Annotated[int, typer.Option(help="Port; 0: a free one.", min=0, max=65535)] = PORT,
    address: Annotated[str, typer.Option(help="Address to listen on; without keys one of loopback.")] = "127.0.0.1",
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name that programs reach it by, in addition to addresses and localhost; may be repeated."),
    ] = None,
    url: Url = None,
) -> None:
    """Run the gateway in the foreground: OpenAI's HTTP interface over the queue. Any number may run."""
    _serve(load_settings(url=url), address, port, host or [])


def _serve(settings: Settings, address: str, port: int, hosts: list[str]) -> None:
    try:
        from stoker.gateway.command import serve
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        raise ConfigError(
            f"{name} is missing, which the gateway needs: pip install '.[gateway]', from a checkout."
        ) from None
    serve(settings, address, port, frozenset(name.lower() for name in hosts), lambda text: print(text, flush=True))

"""`stoker keys`: who may ask the gateway, and for how much."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from stoker.broker import api_keys, policy
from stoker.broker.api_keys import ApiKey
from stoker.broker.connection import translated
from stoker.cli.options import Json, Url, connect, print_json


def create(
    name: Annotated[str, typer.Argument(help="Client key of its jobs: shares and limits go by it.")],
    requests: Annotated[int | None, typer.Option(help="Requests that it may send a minute; default: any.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens that it may take a minute; default: any.")] = None,
    open_jobs: Annotated[int | None, typer.Option(help="Open jobs that NAME may have in one queue.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Base model that it may use; may be repeated; default: all.")
    ] = None,
    url: Url = None,
) -> None:
    """Make a key for the gateway. It is printed once; the broker keeps its SHA-256 alone."""
    key = ApiKey(
        client=name, created=time.time(), requests=requests, tokens=tokens, models=tuple(model) if model else None
    )
    with connect(url) as client, translated(client.settings):
        if open_jobs is not None:
            policy.decide(client.redis, f"{policy.OF_CLIENT}{name}", open_jobs)
        print(api_keys.create(client.redis, key))


def list_keys(as_json: Json = False, url: Url = None) -> None:
    """List the keys by name, client and limits; none of them can be shown again."""
    with connect(url) as client, translated(client.settings):
        found = api_keys.listed(client.redis)
    if as_json:
        print_json([{"id": name, **key.model_dump()} for name, key in found.items()])
        return
    for name, key in found.items():
        made = time.strftime("%Y-%m-%d", time.gmtime(key.created))
        limits = f"{_shown(key.requests)} requests, {_shown(key.tokens)} tokens a minute"
        print(f"{name}  {key.client:24} {made}  {limits}; models: {', '.join(key.models or ()) or 'all'}")


def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `stoker keys list` shows it.")], url: Url = None
) -> None:
    """Let a key count no more, from the next request on."""
    with connect(url) as client, translated(client.settings):
        api_keys.revoke(client.redis, key)
    print(f"{key}: revoked")


def _shown(limit: int | None) -> str:
    return "any" if limit is None else str(limit)

"""`stoker jobs policy`: limits and ageing, for all clients of a broker."""

from __future__ import annotations

from typing import Annotated

import typer

from stoker.broker import policy
from stoker.broker.connection import translated
from stoker.cli.options import Json, Url, connect, print_json
from stoker.contract.shown import brief
from stoker.errors import InvalidRequest


def show_or_set(
    name: Annotated[
        str | None, typer.Argument(help="As the list without arguments shows; client_limit:KEY too.")
    ] = None,
    value: Annotated[str | None, typer.Argument(help="A number, or 'default'.")] = None,
    as_json: Json = False,
    url: Url = None,
) -> None:
    """Show how much may wait and how fast waiting lifts a job; with NAME and VALUE, change it for all clients."""
    if (name is None) != (value is None):
        raise InvalidRequest("policy: a name without a value given; give both to change a rule, none to see all.")
    with connect(url) as client, translated(client.settings):
        if name is not None and value is not None:
            policy.decide(client.redis, name, _number(name, value))
        found = policy.read(client.redis)
    if as_json:
        print_json(found)
        return
    for rule, number in found.items():
        print(f"{rule:24} {number:>9}  {policy.RULES[rule.partition(':')[0]].says}")


def _number(name: str, value: str) -> int | None:
    if value == "default":
        return None
    if not (value.isdecimal() and len(value) <= 20):
        raise InvalidRequest(f"{name}: {brief(value)} given; expected a whole number, or 'default'.")
    return int(value)

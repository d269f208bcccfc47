"""Options that several commands share, and printing."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from stoker.client import Client

Url = Annotated[str | None, typer.Option(help="Broker; default: STOKER_URL, else the one of `stoker up`.")]
Model = Annotated[str | None, typer.Option(help="Model; default: the one that is warm.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

#: People's output; what a program would read goes to standard output by `print`.
console = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False, soft_wrap=True)


def connect(url: str | None) -> Client:
    return Client(url)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def is_terminal() -> bool:
    return sys.stdout.isatty()

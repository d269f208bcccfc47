"""Options that several commands share, and printing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stoker.address import Address
from stoker.client import Client
from stoker.contract.shown import harmless

if TYPE_CHECKING:
    from rich.console import Console


def readable(url: str | None) -> str | None:
    """The broker that `--url` names. Raises `ConfigError` for what is no address, before the command does anything: as
    a setting it would be called by the name that a program has for it."""
    if url:
        Address.parse(url, "--url")
    return url


Url = Annotated[
    str | None, typer.Option(callback=readable, help="Broker; default: STOKER_URL, else the one of `stoker up`.")
]
Model = Annotated[str | None, typer.Option(help="Model; default: the one that is warm.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

#: Seconds between two lines about what is waited for.
REPORT_EVERY = 5.0


@cache
def console() -> Console:
    """People's output; what a program would read goes to standard output by `print`."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


@cache
def notes() -> Console:
    """What is said to people on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def connect(url: str | None) -> Client:
    return Client(url)


def print_json(value: Any) -> None:
    """One line of JSON; only in UTF-8 is every character its own."""
    utf8 = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not utf8))


@contextmanager
def progress_shown(first: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is waited for. Elsewhere, as in a service's log, a line every few seconds."""
    if console().is_terminal:
        with console().status(first) as status:
            yield status.update
        return
    said = -REPORT_EVERY

    def report(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= REPORT_EVERY:
            said = time.monotonic()
            notes().print(text)

    yield report


def is_terminal() -> bool:
    return sys.stdout.isatty()


def for_output(text: str) -> str:
    """A model's text as it is; on a terminal without what would drive that."""
    return harmless(text) if is_terminal() else text

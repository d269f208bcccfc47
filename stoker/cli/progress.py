"""How far a file has come that grows row by row."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from stoker.cli.options import notes

#: Seconds between two lines of progress where there is no terminal.
REPORT_EVERY = 10.0


class Growing(Protocol):
    """`done`: the rows that are there."""

    done: int


@contextmanager
def progress(output: Growing, rows: int, what: str) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, a line now and then elsewhere; yields what to call when rows came."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=notes()) as progress:
            bar = progress.add_task("waiting for a worker", total=rows, completed=output.done)
            speed = _Speed(output)
            yield lambda: progress.update(bar, completed=output.done, description=f"{speed():,.0f} {what}/s")
    else:
        yield _Lines(output, rows, what)


class _Speed:
    """Rows a second since the beginning of this run."""

    def __init__(self, output: Growing) -> None:
        self._output, self._before, self._began = output, output.done, time.monotonic()

    def __call__(self) -> float:
        return (self._output.done - self._before) / max(1e-9, time.monotonic() - self._began)


class _Lines:
    def __init__(self, output: Growing, rows: int, what: str) -> None:
        self._output, self._rows, self._what, self._speed = output, rows, what, _Speed(output)
        self._reported = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._reported < REPORT_EVERY:
            return
        self._reported = time.monotonic()
        speed, done = self._speed(), self._output.done
        left = (self._rows - done) / max(speed, 1e-9)
        said = f"{done:,} of {self._rows:,} {self._what}, {speed:,.1f} {self._what}/s, {left:.0f} s left"
        print(said, file=sys.stderr, flush=True)

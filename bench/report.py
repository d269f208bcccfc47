"""Rows: what was measured by turns, on what, with which spread, and whether its aim is met."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.aims import aim_of

RESULTS = Path(__file__).parent / "results"
#: The commit of a copy of the checkout that has no git: the runner sets it for each benchmark.
COMMIT = "BENCH_COMMIT"
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One measurement: percentiles of its samples, in `unit`. `launches` of a step, and the milliseconds of it that the
    device works, stand where they are known."""

    name: str
    unit: str
    p20: float
    p50: float
    p80: float
    samples: int
    launches: int | None = None
    device_ms: float | None = None


def row(name: str, unit: str, samples: Sequence[float]) -> Row:
    p20, p50, p80 = (float(np.percentile(samples, q)) for q in (20, 50, 80))
    return Row(name, unit, p20, p50, p80, len(samples))


def by_turns(sides: Mapping[str, Callable[[], T]], rounds: int, warm: int = 1) -> dict[str, list[T]]:
    """What each side made, round by round: neighbours in time, each of them first as often as last, so that what the
    machine does otherwise meets all alike. `warm` rounds before them do not count."""
    found: dict[str, list[T]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name in list(sides) if number % 2 == 0 else reversed(list(sides)):
            made = sides[name]()
            if number >= warm:
                found[name].append(made)
    return found


def ratio(name: str, ours: Sequence[float], other: Sequence[float]) -> Row:
    """Each sample of `ours` as a multiple of the one of `other` that was made in the same turn."""
    return row(name, "times", [one / two for one, two in zip(ours, other, strict=True)])


def against(name: str, unit: str, ours: Sequence[float], than: str, other: Sequence[float]) -> list[Row]:
    """Both sides, and their ratio."""
    return [row(name, unit, ours), row(f"{name}: {than}", unit, other), ratio(f"{name}, against {than}", ours, other)]


def number(value: float) -> str:
    """With as many digits as matter."""
    size = abs(value)
    if 0 < size < 0.01:
        return f"{value:.2g}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def shown(bench: str, entry: Row) -> str:
    """A line for people. A value whose spread crosses its aim is not said: another run could say the opposite."""
    aim, spread = aim_of(bench, entry.name), f"({number(entry.p20)} to {number(entry.p80)})"
    met = aim and aim.met(entry.p20, entry.p80)
    value = "not said" if aim and met is None else number(entry.p50)
    judged = f"  {aim}: {'met' if met else 'the spread crosses it' if met is None else 'MISSED'}" if aim else ""
    counted = f"  {entry.launches} launches" if entry.launches is not None else ""
    counted += f"  device {number(entry.device_ms)} ms" if entry.device_ms is not None else ""
    return f"{entry.name:78} {value:>10} {entry.unit:10} {spread}{counted}{judged}"


class Record:
    """The file `NAME.json` of a benchmark, in `folder`: what it was measured on, `head`, and its rows with their aims.

    It is written whole after each part: a run that is cut off loses nothing before it.
    """

    def __init__(self, name: str, folder: Path = RESULTS, **head: Any) -> None:
        self.name, self.path = name, folder / f"{name}.json"
        self._rows: list[dict[str, Any]] = []
        self.fields: dict[str, Any] = {**machine(), **head, "rows": self._rows}

    def add(self, rows: Sequence[Row]) -> None:
        """Print the rows, and keep them."""
        for entry in rows:
            print(shown(self.name, entry), flush=True)
            aim = aim_of(self.name, entry.name)
            judged = {"aim": str(aim), "met": aim.met(entry.p20, entry.p80)} if aim else {}
            self._rows.append({key: value for key, value in asdict(entry).items() if value is not None} | judged)
        self.keep()

    def part(self, name: str, measure: Callable[[], Sequence[Row]]) -> None:
        """One that fails is a row that says so, and the others still run."""
        began = time.perf_counter()
        try:
            self.add(measure())
        except Exception as error:
            traceback.print_exc()
            self._rows.append({"name": name, "error": f"{type(error).__name__}: {error}"[:2000]})
            self.keep()
        print(f"# {name}: {time.perf_counter() - began:.1f} s", flush=True)

    def keep(self, **fields: Any) -> None:
        self.fields |= fields
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.fields, indent=1) + "\n", "utf-8")

    @property
    def failed(self) -> bool:
        return any("error" in entry for entry in self._rows)


def write(name: str, rows: Sequence[Row], folder: Path = RESULTS) -> Path:
    """Print the rows and keep them with what they were measured on."""
    record = Record(name, folder)
    record.add(rows)
    return record.path


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="fewer rounds, whose spreads are wider")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    return made


def machine() -> dict[str, Any]:
    """Machine, versions, commit and time. The commit of a checkout with changes that are in none ends in `+dirty`."""
    return {
        "machine": f"{platform.processor() or platform.machine()} {platform.system()}",
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "commit": os.environ.get(COMMIT) or commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> str:
    """Of this checkout; a copy of its files alone has none."""
    found = git("rev-parse", "--short", "HEAD")
    return (found + ("+dirty" if git("status", "--porcelain") else "")) if found else "unknown"


def git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()

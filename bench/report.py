"""Rows: what was measured, on what, with which spread."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measurement: percentiles of its samples, in `unit`."""

    name: str
    unit: str
    p20: float
    p50: float
    p80: float
    samples: int


def row(name: str, unit: str, samples: Sequence[float]) -> Row:
    p20, p50, p80 = (float(np.percentile(samples, q)) for q in (20, 50, 80))
    return Row(name, unit, p20, p50, p80, len(samples))


def repeat(action: Callable[[], float], times: int) -> list[float]:
    """Run `action` once to warm up and `times` for the record; it returns one sample."""
    action()
    return [action() for _ in range(times)]


class Record:
    """The file `NAME.json` of a benchmark, in `folder`: what it was measured on, `head`, and what was measured.

    `keep` writes it whole: called after each part, a run that is cut off loses nothing before it.
    """

    def __init__(self, name: str, folder: Path = RESULTS, **head: Any) -> None:
        self.path = folder / f"{name}.json"
        self.fields: dict[str, Any] = {
            "machine": f"{platform.processor() or platform.machine()} {platform.system()}",
            "cores": os.cpu_count() or 1,
            "mlx": version("mlx"),
            "commit": _commit(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **head,
        }

    def keep(self, **fields: Any) -> None:
        self.fields |= fields
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.fields, indent=1) + "\n", "utf-8")


def show(rows: Sequence[Row]) -> None:
    for entry in rows:
        print(f"{entry.name:44} {entry.p50:10.2f} {entry.unit:12} (p20 {entry.p20:.2f}, p80 {entry.p80:.2f})")


def write(name: str, rows: Sequence[Row]) -> Path:
    """Print the rows and keep them with what they were measured on."""
    show(rows)
    record = Record(name)
    record.keep(rows=[asdict(entry) for entry in rows])
    return record.path


def _commit() -> str:
    """Of this checkout; a copy of its files alone has none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"

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


def write(name: str, rows: Sequence[Row]) -> Path:
    """Print the rows and keep them with what they were measured on."""
    for entry in rows:
        print(f"{entry.name:44} {entry.p50:10.2f} {entry.unit:12} (p20 {entry.p20:.2f}, p80 {entry.p80:.2f})")
    record = {
        "machine": f"{platform.processor() or platform.machine()} {platform.system()}",
        "cores": _cores(),
        "mlx": version("mlx"),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": [asdict(entry) for entry in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _cores() -> int:
    return os.cpu_count() or 1


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"

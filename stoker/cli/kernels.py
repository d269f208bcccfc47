"""`stoker kernels`: the fused kernels of this machine, checked and timed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def check(
    report: Annotated[Path, typer.Option(help="Where the JSON report is written.")] = Path("stoker-kernels.json"),
    kernel: Annotated[list[str] | None, typer.Option(help="This one alone; may be repeated.")] = None,
    timings: Annotated[bool, typer.Option(help="Time them as well, where there is a GPU.")] = True,
    hard: Annotated[bool, typer.Option("--hard", help="Also inputs at which mistakes would be expected.")] = False,
) -> None:
    """Run every fused kernel of this machine's back-end against its reference."""
    # A report that cannot be written is an error now, and not after an hour of work.
    report.open("a", encoding="utf-8").close()
    chosen = [part for name in kernel or () for part in ("--kernel", name)]
    caches = os.environ.get("XDG_CACHE_HOME")
    cache = ["--cache", str(Path(caches, "stoker", "kernels"))] if caches else []
    flags = [*([] if timings else ["--no-timings"]), *(["--hard"] if hard else []), *cache]
    _run_module("kernels.check", "--report", str(report), *chosen, *flags)


def bench(
    out: Annotated[Path | None, typer.Option(help="Folder for the JSON rows.")] = None,
) -> None:
    """Time every fused kernel against MLX's own way: bytes, bandwidth, and the ratio to a plain copy."""
    _run_module("bench.kernels", *([] if out is None else ["--out", str(out)]))


def _run_module(module: str, *arguments: str) -> None:
    """In a process of its own: this one must not import MLX."""
    from stoker.local.stack import require_workers

    require_workers()
    sys.exit(subprocess.call([sys.executable, "-m", module, *arguments]))

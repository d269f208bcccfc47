"""Every fused kernel against MLX's own way, on the GPU at hand: medians, bytes, bandwidth, the ratio to a plain copy.

`python -m bench.kernels --gpu`. What they are worth in a model: `bench.decode_step`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from bench.report import RESULTS, Record
from kernels import check
from kernels.backend import Backend, of_machine, using
from kernels.kernel import Kernel, Timing
from kernels.measure import copy_bandwidth, measure
from kernels.registry import KERNELS

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}

Rows = list[dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.kernels", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="fail where MLX's default device is no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for kernels.json")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS), help="this one alone; may be repeated")
    options = parser.parse_args(arguments)
    backend = of_machine()
    if backend == "reference":
        print("No GPU that MLX knows: a fused kernel has nothing to be timed on here.", file=sys.stderr)
        return 1 if options.gpu else 0
    chosen = [KERNELS[name] for name in options.kernel or KERNELS]
    copy = copy_bandwidth()
    record = Record("kernels", options.out, device=check.device(), backend=backend, copy=copy)
    print(f"{record.fields['device']}, MLX {record.fields['mlx']}, a plain copy moves {copy / 1e9:.0f} GB/s\n")
    checks = start_checks(chosen)
    phases: dict[str, Callable[[], Rows]] = {
        "checked": lambda: collect(checks),
        "rows": lambda: timings(chosen, backend, copy),
    }
    for phase, run in phases.items():
        record.keep(**{phase: run()})
    print(f"\nrows in {record.path}")
    return 0 if all(row.get("passed") for row in record.fields["checked"]) else 1


def start_checks(chosen: Sequence[Kernel]) -> list[tuple[str, Path, subprocess.Popen[bytes]]]:
    """The check of each kernel and dtype, before the timings: a fast kernel that is wrong is worth nothing."""
    folder, running = Path(tempfile.mkdtemp()), []
    for kernel in chosen:
        for dtype in kernel.dtypes:
            name = str(dtype).rpartition(".")[2]
            report = folder / f"{kernel.name}-{name}.json"
            command = [sys.executable, "-m", "kernels.check", "--kernel", kernel.name, "--dtype", name]
            command += ["--no-timings", "--report", str(report)]
            running.append((f"{kernel.name} {name}", report, subprocess.Popen(command, stdout=subprocess.DEVNULL)))
    return running


def collect(running: Sequence[tuple[str, Path, subprocess.Popen[bytes]]]) -> Rows:
    """What they found, when they are done."""
    found: Rows = []
    for what, report, process in running:
        process.wait()
        rows = json.loads(report.read_text("utf-8"))["checked"] if report.exists() else [{"failed": what}]
        report.unlink(missing_ok=True)
        found += rows
        for row in rows:
            print(f"{what:24} {row.get('shapes', 0):3} runs, error {row.get('error')}, passed {row.get('passed')}")
    return found


def timings(chosen: Sequence[Kernel], backend: Backend, copy: float) -> Rows:
    """Every shape in the dtype of a model; the sampler in that of its logits before and after they are float32."""
    found: Rows = []
    with using(backend):
        for kernel in chosen:
            for name in ("bfloat16", "float32") if kernel.name == "sample" else ("bfloat16",):
                found += [_timed(kernel, timing, name, copy) for timing in kernel.timings(DTYPES[name])]
    return found


def _timed(kernel: Kernel, timing: Timing, name: str, copy: float) -> dict[str, Any]:
    """The row of one shape, or one with its error: one failure does not lose the rest."""
    try:
        row = measure(kernel, timing, name, copy=copy)
    except Exception as error:
        what = f"{kernel.name} {name} {timing.label}"
        print(f"{what}: {error}", file=sys.stderr)
        return {"failed": what, "error": str(error)[:2000]}
    print(row.line, flush=True)
    return asdict(row)


if __name__ == "__main__":
    sys.exit(main())

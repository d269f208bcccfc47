"""Every fused kernel beside MLX's own way, on the GPU at hand: medians, bytes, bandwidth, the ratio to a plain copy.

`python -m bench.kernels --gpu --out DIR` needs MLX and numpy alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from kernels import check
from kernels.backend import of_machine, using
from kernels.kernel import Kernel, Timing
from kernels.measure import copy_bandwidth, measure
from kernels.registry import KERNELS

RESULTS = Path(__file__).parent / "results"
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
    with using(backend):
        record: dict[str, Any] = {"device": check.device(), "backend": backend, "mlx": version("mlx")}
        record["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record["copy"] = copy_bandwidth()
        print(f"{record['device']}, MLX {record['mlx']}, a plain copy moves {record['copy'] / 1e9:.0f} GB/s\n")
        record["checked"] = numbers(chosen)
        record["rows"] = timings(chosen, record["copy"])
        record["fallbacks"] = {kernel.name: dict(kernel.fallbacks) for kernel in chosen if kernel.fallbacks}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nrows in {path}")
    return 0 if all(row.get("passed") for row in record["checked"]) else 1


def numbers(chosen: Sequence[Kernel]) -> Rows:
    """The check before the timings: a fast kernel that is wrong is worth nothing."""
    found: Rows = []
    for kernel in chosen:
        for dtype in kernel.dtypes:
            row = check.check(kernel, dtype, of_machine())
            check.show(row)
            found.append(asdict(row))
    return found


def timings(chosen: Sequence[Kernel], copy: float) -> Rows:
    return [
        _timed(kernel, timing, name, copy)
        for kernel in chosen
        for name, dtype in DTYPES.items()
        for timing in kernel.timings(dtype)
    ]


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

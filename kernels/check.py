"""`stoker kernels check`: every fused kernel of this machine's back-end against its reference, dtype by dtype.

On a Mac the bodies run on Metal, on an NVIDIA machine on CUDA. Elsewhere the emulator runs the Metal text, with its
checks for races, bounds and outputs left unwritten; it needs g++. The report is for an issue.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from kernels.backend import Backend, of_machine, using
from kernels.emulator import build, observe
from kernels.emulator.run import KernelDefect
from kernels.emulator.trace import Launch
from kernels.kernel import Case, Kernel
from kernels.measure import Measured, measure
from kernels.registry import KERNELS

#: Every case is run with inputs, and on the emulator with schedules, of so many seeds.
SEEDS = (1, 2)


@dataclass(frozen=True)
class Checked:
    """A kernel in one dtype. `error` is the worst of its shapes, None where it did not run to its end."""

    kernel: str
    dtype: str
    shapes: int
    error: float | None
    tolerance: float
    passed: bool
    #: The shape of the worst error, or what went wrong.
    detail: str


def cases(kernel: Kernel, dtype: mx.Dtype, seed: int) -> list[Case]:
    return list(kernel.cases(dtype, np.random.default_rng(seed)))


def check(kernel: Kernel, dtype: mx.Dtype, backend: Backend, seeds: Sequence[int] = SEEDS) -> Checked:
    """Run all shapes of `kernel` in `dtype` on `backend`; nothing is raised."""
    worst, where, count = 0.0, "", 0
    tolerance = kernel.tolerances[dtype]

    def checked(error: float | None, detail: str) -> Checked:
        return Checked(
            kernel.name, _name(dtype), count, error, tolerance, error is not None and error <= tolerance, detail
        )

    for seed in seeds:
        for case in cases(kernel, dtype, seed):
            count += 1
            try:
                error = run_case(kernel, case, backend, seed)
            except (KernelDefect, build.CompileError, ValueError, RuntimeError) as problem:
                return checked(None, f"{case.label}: {str(problem)[:2000]}")
            if error >= worst:
                worst, where = error, case.label
    return checked(worst, where)


def check_hard(kernel: Kernel, dtype: mx.Dtype, backend: Backend) -> Iterator[Checked]:
    """The hard inputs of `kernel`, if it has any, one result each; nothing is raised.

    The case's name is printed before it runs: should a device not come back from one, it is known which.
    """
    tolerance = kernel.tolerances[dtype]
    for case in kernel.hard(dtype, np.random.default_rng(SEEDS[0])) if kernel.hard else ():
        print(f"{kernel.name:16} {_name(dtype):9} {case.label:46} ", end="", flush=True)
        try:
            error, detail = run_case(kernel, case, backend, SEEDS[0]), case.label
        except (KernelDefect, build.CompileError, ValueError, RuntimeError) as problem:
            error, detail = None, f"{case.label}: {str(problem)[:2000]}"
        rows = case.arguments[0].shape[0]
        passed = error is not None and error <= tolerance
        yield Checked(kernel.name, _name(dtype), rows, error, tolerance, passed, detail)


def run_case(kernel: Kernel, case: Case, backend: Backend, seed: int) -> float:
    """The error of one case. Raises `ValueError` where the kernel would fall back, and what the emulator found."""
    if reason := kernel.refuse(*case.arguments):
        raise ValueError(f"the kernel does not take a shape that it says it takes: {reason}")
    with using(backend), observe.observing(seed=seed, checked=not case.large):
        results = kernel(*case.arguments)
        mx.eval(results)
    return kernel.error_of(case.arguments, results)


def prepare(kernels: Iterable[Kernel], dtypes: Iterable[mx.Dtype] | None = None) -> None:
    """Compile what the emulator will run, on all cores at once."""
    checked: list[Launch] = []
    unchecked: list[Launch] = []
    for kernel in kernels:
        for dtype in dtypes or kernel.dtypes:
            for case in cases(kernel, dtype, 1):
                with using("emulator"), observe.observing(dry=True) as launches:
                    kernel(*case.arguments)
                (unchecked if case.large else checked).extend(launches)
    build.build_all(checked)
    build.build_all(unchecked, checked=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and write the report; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.cache:
        build.keep_in(options.cache)
    chosen = [KERNELS[name] for name in options.kernel or KERNELS]
    backend = of_machine()
    if backend == "reference":
        if not build.available():
            print(
                "No GPU that MLX knows, and no g++ for the emulator: install g++, or run this on a Mac.",
                file=sys.stderr,
            )
            return 2
        backend = "emulator"
        print("No GPU that MLX knows: the Metal text runs on the emulator. It says nothing of speed.")
        prepare(chosen)
    print(f"MLX {version('mlx')}, {device()}, back-end {backend}\n")
    rows = []
    for kernel in chosen:
        for dtype in kernel.dtypes:
            if options.dtype and _name(dtype) not in options.dtype:
                continue
            rows.append(check(kernel, dtype, backend))
            show(rows[-1])
            for hard in check_hard(kernel, dtype, backend) if options.hard else ():
                rows.append(hard)
                print(f"{hard.shapes:3} rows  {_verdict(hard)}", flush=True)
    timings = [] if backend == "emulator" or options.no_timings else _timings(chosen)
    path = _write(options.report, backend, rows, timings)
    failed = [row for row in rows if not row.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} passed; the report is in {path}")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stoker kernels check", description="Fused kernels against their references.")
    parser.add_argument("--report", type=Path, default=Path("stoker-kernels.json"), help="where the report is written")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS), help="this one alone; may be repeated")
    parser.add_argument("--dtype", action="append", help="float32, float16 or bfloat16 alone; may be repeated")
    parser.add_argument("--hard", action="store_true", help="inputs at which mistakes would be expected, one by one")
    parser.add_argument("--cache", type=Path, help="where the emulator keeps what it compiles")
    parser.add_argument("--no-timings", action="store_true", help="numbers alone")
    return parser


def show(row: Checked) -> None:
    """Print it."""
    print(f"{row.kernel:16} {row.dtype:9} {row.shapes:3} runs  {_verdict(row)}", flush=True)


def _verdict(row: Checked) -> str:
    error = "-" if row.error is None else f"{row.error:.1e}"
    verdict = "ok" if row.passed else f"FAILED\n    {row.detail}"
    return f"error {error:>8} of {row.tolerance:.0e}  {verdict}"


def _timings(chosen: Sequence[Kernel]) -> list[Measured]:
    """One shape of each kernel in 16 bits, against MLX's own way; `stoker kernels bench` has them all."""
    print()
    found = []
    for kernel in chosen:
        timing = next(iter(kernel.timings(mx.float16)))
        found.append(measure(kernel, timing, "float16", times=20))
        print(found[-1].line, flush=True)
    return found


def _write(path: Path, backend: Backend, rows: Sequence[Checked], timings: Sequence[Measured]) -> Path:
    report = {
        "backend": backend,
        "device": device(),
        "mlx": version("mlx"),
        "machine": f"{platform.machine()} {platform.system()} {platform.release()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checked": [asdict(row) for row in rows],
        "timings": [asdict(row) for row in timings],
    }
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return path


def device() -> str:
    """The name of the processor that MLX uses."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return platform.processor() or platform.machine()
    return str(mx.device_info().get("device_name", mx.default_device()))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main())

"""`stoker verify`: whether Stoker works on this machine, and one file to attach to an issue if it does not."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.cli.demo import demo_worker
from stoker.cli.doctor import machine_checks
from stoker.cli.options import Url
from stoker.cli.verification import Golden, Rate, Tour
from stoker.errors import StokerError
from stoker.local.checks import Check
from stoker.local.process import how_it_ended

#: Packages whose versions decide what a machine computes.
PACKAGES = ("mlx", "mlx-lm", "celery", "kombu", "redis", "numpy", "tokenizers")
#: Seconds: every kernel is compiled for the first time.
KERNELS_WITHIN = 1800.0


def verify(
    report: Annotated[Path, typer.Option(help="Where the report is written.")] = Path("stoker-verify.json"),
    kernels: Annotated[bool, typer.Option(help="Check the fused kernels too, where there is a GPU.")] = True,
    url: Url = None,
) -> None:
    """Check that Stoker computes the right thing on this machine, and write a report for an issue: the machine, every
    kind of job against torch's results, its speed, and the fused kernels. Starts its own broker and worker, and stops
    them; STOKER_DTYPE, STOKER_QUANTIZE and STOKER_KV_BITS do not count here. Exit code 1 if something is wrong."""
    # A report that cannot be written is an error now, and not after minutes of work.
    report.open("a", encoding="utf-8").close()
    began = time.monotonic()
    checks = list(_shown(machine_checks(url)))
    rates: list[Rate] = []
    device, found = "", dict[str, Any]()
    # Without an engine, or a broker, nothing further can be tried.
    if all(check.ok for check in checks):
        try:
            with demo_worker(url, exact=True) as (client, worker):
                device = worker.device
                tour = Tour(client, Golden.read())
                checks += _shown(tour.checks())
                rates = tour.rates
        except StokerError as error:
            # The report matters most where no worker comes up.
            said = f"{type(error).__name__}: {error}"
            checks += _shown([Check("worker", False, said, "open an issue with the report")])
        if kernels and device not in ("", "cpu"):
            found = kernels_report()
            checks += _shown([_of_kernels(found)])
    for rate in rates:
        print(f"      {rate.name}: {rate.value:.0f} {rate.unit}")
    written = {"device": device, "seconds": round(time.monotonic() - began, 1), **_versions()}
    written |= {"checks": [asdict(check) for check in checks], "rates": [asdict(rate) for rate in rates]}
    report.write_text(json.dumps(written | {"kernels": found}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    failed = [check.name for check in checks if not check.ok]
    print(f"{len(checks) - len(failed)} of {len(checks)} hold; the report is in {report}")
    if failed:
        raise typer.Exit(1)


def _shown(checks: Iterable[Check]) -> Iterator[Check]:
    for check in checks:
        print(check.text, flush=True)
        yield check


def _versions() -> dict[str, Any]:
    found = {}
    for name in ("stoker", *PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    where = {"machine": platform.platform(), "python": platform.python_version()}
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **where, "versions": found}


def kernels_report() -> dict[str, Any]:
    """The report of `stoker kernels check`, made in another process: this one must not import MLX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernels.json")
        command = [sys.executable, "-m", "kernels.check", "--report", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=KERNELS_WITHIN)
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {KERNELS_WITHIN:.0f} s"}
        if not path.exists():
            return {"error": f"{how_it_ended(done.returncode)}: {done.stderr.strip()[-2000:]}"}
        read: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return read


def _of_kernels(found: dict[str, Any]) -> Check:
    remedy = "STOKER_KERNELS=off serves without them; open an issue with the report"
    if "error" in found:
        return Check("kernels", False, found["error"], remedy)
    failed = [f"{row['kernel']} {row['dtype']}" for row in found["checked"] if not row["passed"]]
    detail = f"{len(found['checked'])} kernels and dtypes on {found['backend']}"
    if failed:
        return Check("kernels", False, f"{detail}; wrong: {', '.join(failed)}", remedy)
    return Check("kernels", True, detail)

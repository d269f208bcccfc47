"""`python -m tests.covered`: what the tests ran of the five packages, from the data of `make coverage`.

Lines and branches of each package and of all; exits with 1 below the least share of lines.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("stoker", "tasks", "workers", "engine", "kernels")
#: Percent of all lines that the tests have to run.
LEAST = 90.0


@dataclass(frozen=True)
class Share:
    """Statements and branches: how many there are, how many were run."""

    lines: int = 0
    run: int = 0
    branches: int = 0
    taken: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.lines + other.lines, self.run + other.run, self.branches + other.branches, self.taken + other.taken
        )

    @property
    def percent(self) -> float:
        return 100 * self.run / self.lines if self.lines else 100.0

    def shown(self, name: str) -> str:
        branches = 100 * self.taken / self.branches if self.branches else 100.0
        return f"{name:10} {self.lines:7} lines {self.percent:6.1f} %   {self.branches:6} branches {branches:6.1f} %"


def shares(report: Mapping[str, Any]) -> dict[str, Share]:
    """Package → share, from coverage's JSON report."""
    found = dict.fromkeys(PACKAGES, Share())
    for name, file in report["files"].items():
        package, numbers = _relative(name).parts[0], file["summary"]
        if package in found:
            found[package] += Share(
                numbers["num_statements"], numbers["covered_lines"],
                numbers["num_branches"], numbers["covered_branches"],
            )  # fmt: skip
    return found


def _relative(name: str) -> Path:
    """A file's path within the checkout: a process in another folder names it from the root."""
    path = Path(name)
    return path.relative_to(ROOT) if path.is_absolute() else path


def weakest(report: Mapping[str, Any], count: int = 12) -> list[str]:
    """The files with the most lines that no test ran."""
    files = sorted(report["files"].items(), key=lambda item: -item[1]["summary"]["missing_lines"])
    return [
        f"    {numbers['summary']['missing_lines']:4} lines of {_relative(name)}"
        for name, numbers in files[:count]
        if numbers["summary"]["missing_lines"]
    ]


def read(data: str | None = None) -> dict[str, Any]:
    """Coverage's JSON report, of all processes' data."""
    measured = coverage.Coverage(config_file=str(ROOT / "pyproject.toml"), data_file=data or str(ROOT / ".coverage"))
    measured.combine(strict=False, keep=False)
    measured.save()
    with tempfile.TemporaryDirectory() as folder:
        outfile = Path(folder) / "report.json"
        measured.json_report(outfile=str(outfile), show_contexts=False)
        report: dict[str, Any] = json.loads(outfile.read_text(encoding="utf-8"))
    return report


def main() -> None:
    report = read()
    found = shares(report)
    for name, share in found.items():
        print(share.shown(name))
    whole = sum(found.values(), Share())
    print(whole.shown("all"))
    print("most is missing in:", *weakest(report), sep="\n")
    if whole.percent < LEAST:
        sys.exit(f"coverage: {whole.percent:.1f} % of the lines were run; at least {LEAST:g} % are wanted.")


if __name__ == "__main__":
    main()

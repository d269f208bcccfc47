"""The table of architectures in docs/models.md, which `make test-models` writes and reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by `make test-models WRITE=1` -->", "<!-- the end of what it writes -->"
CHECKS = ("generate", "batched", "adapters", "training")


@dataclass(frozen=True)
class Row:
    """One model file: the checks that hold, and what is to be said of it."""

    name: str
    passed: frozenset[str]
    note: str

    def line(self) -> str:
        cells = ["yes" if check in self.passed else "–" for check in CHECKS]
        return f"| {' | '.join([f'`{self.name}`', *cells, self.note])} |"

    @classmethod
    def of(cls, line: str) -> Row:
        name, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        passed = frozenset(check for check, cell in zip(CHECKS, cells, strict=False) if cell == "yes")
        return cls(name.strip("`"), passed, cells[len(CHECKS)])


def totals(rows: Iterable[Row]) -> str:
    found = list(rows)
    counts = ", ".join(f"{sum(check in row.passed for row in found)} {check}" for check in CHECKS)
    return f"Of {len(found)} model files: {counts}."


def read() -> dict[str, Row]:
    """The rows that the page has."""
    lines = _parts()[1].splitlines()
    return {row.name: row for row in (Row.of(line) for line in lines if line.startswith("| `"))}


def write(rows: Iterable[Row]) -> None:
    """Put rows into the page; those of other names stay."""
    merged = {**read(), **{row.name: row for row in rows}}
    ordered = [merged[name] for name in sorted(merged)]
    before, _, after = _parts()
    head = f"| model file | {' | '.join(CHECKS)} | |\n|{'---|' * (len(CHECKS) + 2)}"
    body = "\n".join(row.line() for row in ordered)
    PAGE.write_text(f"{before}{BEGIN}\n{totals(ordered)}\n\n{head}\n{body}\n{END}{after}", encoding="utf-8")


def _parts() -> tuple[str, str, str]:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    inside, after = rest.split(END)
    return before, inside, after

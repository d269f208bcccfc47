"""The list of mistakes: `*.jsonl` in this folder, one JSON object a line."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One mistake: in `file`, `new` stands for `old`, which occurs there once. `tests`: the node ids that own the
    place. `equivalent`: why no test can notice it; such a one is listed and not run."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def fault(self, checkout: Path) -> str:
        """What is wrong with the entry itself; "" if it can be planted."""
        path = checkout / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        found = path.read_text().count(self.old)
        if found != 1:
            return f"`old` occurs {found} times in {self.file}; it has to occur once"
        if self.old == self.new:
            return "`new` is `old`"
        if not self.tests and not self.equivalent:
            return "no test is named"
        return next((f"no such test: {node}" for node in self.tests if not _exists(checkout, node)), "")

    def plant(self, checkout: Path) -> None:
        path = checkout / self.file
        path.write_text(path.read_text().replace(self.old, self.new))


def _exists(checkout: Path, node: str) -> bool:
    file, _, name = node.partition("::")
    path = checkout / file
    return path.is_file() and (not name or name.partition("[")[0].rpartition("::")[2] in _functions(path))


@cache
def _functions(path: Path) -> set[str]:
    return {item.name for item in ast.walk(ast.parse(path.read_text())) if isinstance(item, ast.FunctionDef)}


def mutants() -> list[Mutant]:
    """All of them. A line that is no mutant raises `ValueError` with its place."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                fields = json.loads(line)
                found.append(Mutant(**fields | {"tests": tuple(fields["tests"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path.name}, line {number}: no mutant ({error})") from None
    return found

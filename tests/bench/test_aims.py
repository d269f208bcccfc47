"""The page's tables quote the aims as the one place has them, all of them and no other."""

from __future__ import annotations

import re

import pytest

from bench.aims import AIMS
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "performance.md"


def quoted() -> dict[str, dict[str, str]]:
    """The aims in the tables that have such a column, by row, of the benchmark whose rows are linked last before."""
    found: dict[str, dict[str, str]] = {}
    bench, inside = "", False
    for line in PAGE.read_text("utf-8").splitlines():
        if links := re.findall(r"bench/results/([a-z-]+)\.json", line):
            bench = links[-1]
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif cells[-1] == "aim":
            inside = True
        elif inside and not set(line) <= set("|- ") and cells[-1]:
            found.setdefault(bench, {})[cells[0]] = cells[-1]
    return found


@pytest.mark.parametrize("bench", list(AIMS))
def test_the_page_has_the_aims_of_the_scripts(bench: str) -> None:
    assert quoted()[bench] == {name: str(aim) for name, aim in AIMS[bench].items()}


def test_the_page_has_aims_of_no_other_benchmark() -> None:
    assert set(quoted()) <= set(AIMS)

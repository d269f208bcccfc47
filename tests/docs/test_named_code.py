"""Files, functions, keys and pages that a text names in passing are there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from stoker.settings import ENV_PREFIX, Settings
from tests.docs.pages import PAGES, ROOT, anchors, code, rows

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
PACKAGES = ("stoker", "tasks", "workers", "engine", "kernels")
#: Those that a reader makes have a part in capitals.
FILE = re.compile(rf"(?:{'|'.join(PACKAGES)}|tests|bench|examples)/[a-z0-9_/]+\.(?:py|lua|cc|h|metal)")
PLACED = re.compile(rf"((?:`[\w.]+`(?:, | and ))*`[\w.]+`) in `({FILE.pattern})`")
#: Sections in which every name in code is that of a file, of what these files define, of a key, a setting or a command.
SECTIONS = ("A step of the generation lane", "A message of the queue")


@cache
def defined(file: str) -> frozenset[str]:
    text = (ROOT / file).read_text("utf-8")
    if file.endswith(".py"):
        return frozenset(_names(ast.parse(text).body))
    return frozenset(re.findall(r"\bfunction (\w+)", text))


def _names(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from _names(node.body, f"{node.name}.")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_a_page_names_is_there_and_defines_what_the_page_finds_in_it(page: str) -> None:
    for name in code(TEXTS[page]):
        assert not FILE.fullmatch(name) or (ROOT / name).is_file(), name
    for names, file in PLACED.findall(TEXTS[page]):
        assert set(code(names)) <= defined(file), file


@pytest.mark.parametrize("title", SECTIONS)
def test_every_name_of_a_section_about_the_code_is_one_of_the_code(title: str) -> None:
    _, found, rest = TEXTS["docs/architecture.md"].partition(f"\n## {title}\n")
    assert found
    names = code(rest.partition("\n## ")[0])
    there = {code(row[0])[0] for row in rows("docs/redis.md", "key")}
    there |= {code(row[0])[0] for row in rows("README.md", "command")}
    there |= {ENV_PREFIX + field.upper() for field in Settings.model_fields}
    files = {name for name in names if FILE.fullmatch(name)}
    for file in files:
        there |= {file, *defined(file), *(name.rpartition(".")[2] for name in defined(file))}
    assert len(files) > 5
    assert set(names) <= there


def test_every_page_that_a_docstring_names_is_there_with_the_section() -> None:
    found: set[tuple[Path, str]] = set()
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            found |= {(ROOT / page, anchor) for page, anchor in _named_pages(file.read_text("utf-8"))}
    assert {(ROOT / "docs/architecture.md", title.lower().replace(" ", "-")) for title in SECTIONS} <= found
    for page, anchor in found:
        assert page.is_file(), page
        assert not anchor or anchor in anchors(page), (page, anchor)


def _named_pages(text: str) -> list[tuple[str, str]]:
    return re.findall(r"(?<![/\w])(docs/[a-z]+\.md)(?:#([a-z0-9-]+))?", text)

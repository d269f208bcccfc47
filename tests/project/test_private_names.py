"""Tests and benchmarks name no private attribute of another object, in a string neither; SLF001 sees the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for folder in ("tests", "bench", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
#: Functions that take an object and the name of an attribute of it.
BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "object"}


def reaches(source: str) -> list[str]:
    """Each place that names a private attribute in a string, and what it names."""
    return [f"line {call.lineno}: {name}" for call, name in _named(ast.parse(source)) if _is_private(name)]


def _named(tree: ast.Module) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in BY_NAME:
            texts = [text.value for text in node.args[:2] if isinstance(text, ast.Constant)]
            yield from ((node, text) for text in texts if isinstance(text, str))


def _called(node: ast.Call) -> str:
    called = node.func
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def test_no_string_names_a_private_attribute() -> None:
    found = {str(path.relative_to(ROOT)): reaches(path.read_text(encoding="utf-8")) for path in FILES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("monkeypatch.setattr(engine, '_publish', None)", ["_publish"]),
        ("monkeypatch.setattr('engine.engine._limits', None)", ["engine.engine._limits"]),
        ("getattr(x, '_y', 3)", ["_y"]),
        ("mock.patch.object(x, '_y')", ["_y"]),
        ("getattr(x, '__dict__')", []),
        ("monkeypatch.setattr(time, 'sleep', '_x')", []),
        ("print('_x')", []),
    ],
)
def test_a_private_name_is_found_in_each_form(source: str, found: list[str]) -> None:
    assert [line.partition(": ")[2] for line in reaches(source)] == found

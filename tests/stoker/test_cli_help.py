"""What `--help` shows, on terminals of any width."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from stoker.cli import app

NARROW, USUAL = "40", "80"


def every_command(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from every_command(child, (*words, name))


COMMANDS = dict(every_command(typer.main.get_command(app)))


def shown(words: tuple[str, ...], width: str) -> str:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": width})
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("width", [NARROW, USUAL])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_names_every_option_whole_at_any_width(words: tuple[str, ...], width: str) -> None:
    named = set(re.findall(r"--[a-z][a-z-]*(?![a-z-])", shown(words, width)))
    options = {name for option in COMMANDS[words].params for name in (*option.opts, *option.secondary_opts)}
    assert {name for name in options if name.startswith("--")} <= named


@pytest.mark.parametrize("words", [words for words, found in COMMANDS.items() if hasattr(found, "commands")], ids=str)
def test_the_list_of_commands_says_a_whole_sentence_of_each(words: tuple[str, ...]) -> None:
    listed = " ".join(shown(words, USUAL).split())
    for name, command in COMMANDS[words].commands.items():
        sentence = " ".join((command.help or "").split()).partition(". ")[0].removesuffix(".")
        assert f" {name} {sentence}." in listed

"""What the documentation says of commands, settings, keys, errors, tests and files is what there is."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from stoker import errors
from stoker.broker import keys
from stoker.catalogue import parse_model
from stoker.cli import app
from stoker.client.options import RerankOptions
from stoker.contract import EmbedRequest, GenerateRequest, TrainRequest
from stoker.contract.base import Message
from stoker.contract.dataset import iterate_lines
from stoker.local.interrupts import INTERRUPTED
from stoker.local.service import LABEL, UNIT
from stoker.settings import ENV_PREFIX, Settings
from tests.docs.pages import EXAMPLES, PAGES, ROOT, Block, anchors, blocks, code, rows

SHELL = blocks("sh", "console", "bash")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
SETTINGS = {ENV_PREFIX + name.upper(): field for name, field in Settings.model_fields.items()}


def command_lines() -> list[tuple[str, list[str]]]:
    """(place, words) of every command in a shell block, and of every `stoker …` in running text."""
    found = []
    for block in SHELL:
        for line in block.text.splitlines():
            for part in re.split(r"\s(?:\||&&)\s", line):
                found.append((str(block), shlex.split(part, comments=True)))
    return [(place, words) for place, words in found if words]


COMMANDS = [(place, words) for place, words in command_lines() if any(word.endswith("stoker") for word in words)]


def from_a_checkout() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    return {".", *(f"'.[{extra}]'" for extra in extras)}


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_what_is_installed_comes_from_a_checkout_as_the_readme_says(page: str) -> None:
    assert set(re.findall(r"pip install ([^\s`]+)", TEXTS[page])) <= from_a_checkout()


def test_so_does_what_errors_ask_for() -> None:
    found = {
        (file.relative_to(ROOT).as_posix(), installed)
        for file in (ROOT / "stoker").rglob("*.py")
        for installed in re.findall(r"pip install ('[^\s`]+')", file.read_text("utf-8"))
    }
    assert len(found) >= 6
    assert {installed for _, installed in found} <= from_a_checkout(), found


def test_a_worker_is_ended_before_the_environment_that_it_runs_in_is_made_anew() -> None:
    assert "-m venv --clear $(VENV)" in (ROOT / "Makefile").read_text("utf-8")
    upgrading = TEXTS["docs/deploy.md"].partition("## Upgrading")[2].partition("\n## ")[0]
    steps = [upgrading.index(text) for text in ("End each first", "Then `git pull`, `make venv`", "start it anew")]
    assert steps == sorted(steps)
    assert UNIT.removesuffix(".service") in upgrading
    assert f"gui/$(id -u)/{LABEL}" in upgrading


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` (after `stoker`) name, and its own words."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if command.invoke_without_command and (not rest or rest[0].startswith("-")):
            break
        name = rest.pop(0)
        assert name in command.commands, f"stoker has no command {name!r}"
        command = command.commands[name]
    return command, rest


def all_commands(command: Any = None, name: str = "stoker") -> dict[str, Any]:
    command = command or typer.main.get_command(app)
    if not hasattr(command, "commands"):
        return {name: command}
    children = (all_commands(child, f"{name} {word}") for word, child in command.commands.items())
    own = {name: command} if command.invoke_without_command else {}
    return own | {name: command for found in children for name, command in found.items()}


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_a_command_that_is_shown_can_be_given(place: str, words: list[str]) -> None:
    if words[0] == "mlx.launch":
        words = words[words.index("--") + 1 :]
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert name in SETTINGS, f"{place}: {name} is no setting"
    command, rest = find_command(words[1:])
    context = command.make_context(command.name, rest)  # parses, and runs nothing
    for model in context.params.get("model") or [] if isinstance(context.params.get("model"), list) else []:
        parse_model(model)


def test_every_make_target_that_is_shown_exists() -> None:
    shown = {words[1] for _, words in command_lines() if words[0] == "make"}
    shown |= {target for text in TEXTS.values() for target in re.findall(r"`make ([a-z-]+)", text)}
    assert {"demo", "test", "venv"} <= shown
    assert shown <= TARGETS


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_listed() -> None:
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"({page.name})" in TEXTS["docs/index.md"], page.name
        assert page.name == "index.md" or f"(docs/{page.name})" in TEXTS["README.md"], page.name


def test_a_block_that_is_not_run_says_why() -> None:
    skipped = [block for block in blocks("python", "sh") if block.skip]
    assert len(skipped) <= 2, "skipping is for the rare block that cannot run"
    assert all(len(block.skip) > 10 for block in skipped)


def test_every_block_has_a_language_or_is_output() -> None:
    known = {"python", "sh", "json", ""}
    assert {block.language for block in blocks(*known, "console", "bash", "text", "xml", "toml")} <= known
    plain: list[Block] = blocks("")
    assert [block.page.name for block in plain] == ["README.md"], "only the README shows bare output"


def test_every_json_line_that_is_shown_is_an_example_of_a_dataset() -> None:
    for block in blocks("json"):
        assert list(iterate_lines([block.text.encode()], str(block)))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_what_it_shows(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(ast.parse(text))
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported <= {"asyncio", "numpy", "openai", "os", "stoker", "time"}, (
        "the public client, and nothing behind it"
    )


def test_the_table_of_settings_is_that_of_the_code() -> None:
    table = {code(row[0])[0]: row for row in rows("docs/configuration.md", "variable")}
    assert table.keys() == SETTINGS.keys()
    for name, field in SETTINGS.items():
        default = field.get_default(call_default_factory=True)
        if name == "STOKER_HOME":
            default = "~/.stoker"
        elif isinstance(default, tuple):
            default = ",".join(default)
        wanted = "unset" if default in (None, "") else f"`{default}`"
        assert table[name][1] == wanted, name
        low = next((rule.ge for rule in field.metadata if hasattr(rule, "ge")), None)
        high = next((rule.le for rule in field.metadata if hasattr(rule, "le")), None)
        if low is not None:
            assert table[name][2] == f"{low} to {high}", name


def test_the_table_of_commands_is_that_of_the_code() -> None:
    table = {}
    for row in rows("docs/cli.md", "command"):
        name = re.sub(r" [A-Z].*", "", code(row[0])[0])
        table[name] = {option for cell in row[1:] for text in code(cell) for option in text.split(" / ")}
    commands = all_commands()
    assert table.keys() == commands.keys()
    for name, command in commands.items():
        options = {text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)}
        assert table[name] == {text for text in options if text.startswith("--")} - {"--help"}, name


def test_the_readme_lists_every_command() -> None:
    assert {code(row[0])[0] for row in rows("README.md", "command")} == all_commands().keys()


def test_the_table_of_exit_codes_is_that_of_the_code() -> None:
    codes = {int(row[0]) for row in rows("docs/cli.md", "code")}
    tree = [error for error in vars(errors).values() if isinstance(error, type) and hasattr(error, "exit_code")]
    assert codes == {0, INTERRUPTED, *(error.exit_code for error in tree)}


PLACES = ("<id>", "<name>", "<version>", "<job>", "<worker>", "<model>", "<kind>", "<exchange>", "<key>", "<place>")
LIVES = {
    "24 hours": keys.RESULT_TTL,
    "7 days": keys.PENDING_TTL,
    "30 days": keys.MODEL_TTL,
    "31 days": keys.FILES_TTL,
    "10 seconds": keys.PRESENCE_TTL,
    "20 seconds": keys.RUNNER_TTL,
    "60 seconds": keys.PLACED_TTL,
    "60 minutes": keys.RATE_TTL,
    "10 minutes": keys.COMMAND_TTL,
}
#: Lives as long as a setting says.
BY_SETTING = {"two leases": keys.JANITOR}
SECONDS = {"minutes": 60, "hours": 3600, "days": 86400, "seconds": 1}


#: Redis' names of types, in the words of the page.
TYPES = {"sorted set": "zset", "any": keys.ANY}


def test_the_types_of_keys_are_those_of_the_code() -> None:
    for row in rows("docs/redis.md", "key"):
        kind = keys.kind_of(_example(code(row[0])[0]))
        assert kind is not None
        assert kind.type in (TYPES.get(row[1], row[1]), keys.ANY), row[0]


def test_the_table_of_keys_is_that_of_the_code() -> None:
    table = {code(row[0])[0]: row[2] for row in rows("docs/redis.md", "key")}
    made = {make("<job>") for make in (keys.job, keys.result, keys.stream, keys.cancel)}
    made |= {
        keys.blob("dataset:<job>"),
        keys.blob("vectors:<job>"),
        keys.blob("adapter:<job>"),
        keys.worker("<worker>"),
        keys.metrics("<worker>"),
        keys.commands("<worker>"),
        keys.command("<id>"),
        keys.loading("<model>"),
        keys.open_jobs("<queue>"),
        keys.placed("stoker.<model>.generate", "<worker>"),
        keys.beginning("<name>"),
    }
    made |= {make("<queue>") for make in (keys.turns, keys.dispatched, keys.pace, keys.sizes)}
    made |= {keys.backlog("<queue>", 7).replace("7", "<priority>"), keys.client("<key>", "<queue>")}
    made |= {keys.rate("<key>"), keys.file("<id>"), keys.files("<key>"), keys.file_contents("<place>")}
    made |= {keys.checkpoint("<job>"), keys.fine_tune("<job>"), keys.fine_tunes("<key>")}
    made |= {keys.batch("<id>"), keys.batches("<key>"), keys.open_batches("<place>"), keys.batch_runner("<place>")}
    made |= {keys.WORKERS, keys.MODELS, keys.DEAD, keys.JANITOR, keys.spoiled("<key>")}
    made |= {keys.VECTORS_UNFETCHED, keys.VECTORS_FETCHED, keys.VECTORS_SIZES}
    durable = {key for key, lives in table.items() if lives == "durable"}
    assert table.keys() - durable == made
    for key, lives in table.items():
        kind = keys.kind_of(_example(key))
        assert kind is not None, key
        if key not in BY_SETTING.values():
            assert kind.lifetime == max((LIVES[text] for text in LIVES if text in lives), default=None), key
    assert len({keys.kind_of(_example(key)) for key in table} | {keys.kind_of(keys.UNACKED)}) == len(keys.KINDS)
    assert keys.PREFIX + keys.queue("<model>", "<kind>") in durable
    for key in made:
        assert any(text in table[key] for text in LIVES) or BY_SETTING.get(table[key]) == key, key
    for channel in (keys.channel("<job>"), keys.CANCELS):
        assert f"`{channel}`" in TEXTS["docs/redis.md"]


def _example(key: str) -> str:
    key = (
        key.replace(keys.beginning("<name>"), keys.beginning("0" * 32))
        .replace("<queue>", keys.queue("x", "embed"))
        .replace("<priority>", "0")
    )
    for place in PLACES:
        key = key.replace(place, "x")
    return key


def test_lifetimes_are_what_the_pages_say() -> None:
    for text, seconds in LIVES.items():
        number, unit = text.split()
        assert int(number) * SECONDS[unit] == seconds


def limits(field: Any) -> str:
    names = ("ge", "gt", "le", "lt")
    rules = {name: getattr(rule, name) for rule in field.metadata for name in names if hasattr(rule, name)}
    low = f"above {rules['gt']:g}, to" if "gt" in rules else f"{rules['ge']:g} to"
    if rules.get("lt") == 2**63:
        return f"{low} 2^63 − 1"
    return f"{low} {int(rules['le']):,}" if rules["le"] >= 10_000 else f"{low} {rules['le']:g}"


@pytest.mark.parametrize(
    ("page", "request_class"),
    [("embed", EmbedRequest), ("generate", GenerateRequest), ("train", TrainRequest)],
    ids=["embed", "generate", "train"],
)
def test_the_table_of_options_is_that_of_the_contract(page: str, request_class: type[Message]) -> None:
    table = {code(row[0])[0]: row for row in rows(f"docs/{page}.md", "option")}
    # `job_id` is the client's: it travels as the message's id.
    assert table.keys() == request_class.model_fields.keys() | {"job_id"}
    for name, field in request_class.model_fields.items():
        numeric = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        if not numeric:
            continue
        if name != "seed" or page == "train":
            assert table[name][1] == f"{field.default:.10g}", name
        assert table[name][2].startswith(limits(field)), (name, limits(field))


def test_the_table_of_reranking_is_that_of_the_client() -> None:
    table = {code(row[0])[0]: row for row in rows("docs/rerank.md", "option")}
    assert table.keys() == RerankOptions.__annotations__.keys() - {"truncate"} | {"query", "texts", "model", "job_id"}
    embedding = {code(row[0])[0]: row for row in rows("docs/embed.md", "option")}
    assert all(table[name] == embedding[name] for name in ("priority", "deadline", "job_id"))


def test_every_error_that_a_page_names_exists() -> None:
    for page in ("embed", "rerank", "generate", "train"):
        for row in rows(f"docs/{page}.md", "error"):
            for name in code(row[0]):
                assert issubclass(getattr(errors, name), errors.StokerError), name


@pytest.mark.parametrize(("page", "what"), [("guarantees", "guarantee"), ("security", "threat")])
def test_every_guarantee_and_every_threat_names_a_test_that_exists(page: str, what: str) -> None:
    for guarantee, mechanism, shown in rows(f"docs/{page}.md", what):
        assert guarantee
        assert mechanism
        assert code(shown), guarantee
        for name in code(shown):
            file, separator, function = name.partition("::")
            if separator:
                assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_every_module_that_the_architecture_names_exists_and_none_is_missing() -> None:
    named = {name for row in rows("docs/architecture.md", "module") for name in code(row[0])}
    for name in named:
        assert (ROOT / name).exists(), name
    for folder in ("stoker", "tasks", "workers"):
        for file in (ROOT / folder).rglob("*.py"):
            path = file.relative_to(ROOT)
            covered = {path.as_posix(), *(f"{parent.as_posix()}/" for parent in path.parents)}
            assert path.name == "__init__.py" or covered & named, path


def test_every_make_target_is_in_the_development_page() -> None:
    shown = {code(row[0])[0].removeprefix("make ") for row in rows("docs/development.md", "target")}
    assert shown == TARGETS - {"help", "clean", "distclean"}

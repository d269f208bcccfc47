"""Each option of a command that sends a job arrives in the request, as that and as nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from stoker.cli import app, embed, generate, rerank, train
from stoker.testing import FakeClient

MODULES: dict[str, ModuleType] = {"generate": generate, "embed": embed, "rerank": rerank, "train": train}
#: What each command is given first.
WORDS = {
    "generate": ("hi", "--raw"),
    "embed": ("one",),
    "rerank": ("query", "one"),
    "train": ("style", "--dataset", "worker:a.jsonl", "--held-out", "0.5"),
}
SCHEMA = {"type": "object"}
#: Command → parameter → the words of its option → the field of the request, and what it is then.
OPTIONS: dict[str, dict[str, tuple[tuple[str, ...], str, Any]]] = {
    "generate": {
        "adapter": (("--adapter", "style"), "adapter", "style"),
        "max_tokens": (("--max-tokens", "7"), "max_tokens", 7),
        "temperature": (("--temperature", "0.5"), "temperature", 0.5),
        "top_k": (("--top-k", "3"), "top_k", 3),
        "top_p": (("--top-p", "0.5"), "top_p", 0.5),
        "min_p": (("--min-p", "0.25"), "min_p", 0.25),
        "lookup": (("--lookup",), "lookup", True),
        "repetition_penalty": (("--repetition-penalty", "1.5"), "repetition_penalty", 1.5),
        "stop": (("--stop", "a", "--stop", "b"), "stop", ("a", "b")),
        "n": (("--n", "2"), "n", 2),
        "json_schema": (("--json-schema", "schema.json"), "json_schema", SCHEMA),
        "regex": (("--regex", "a+"), "regex", "a+"),
        "seed": (("--seed", "6"), "seed", 6),
        "priority": (("--priority", "2"), "priority", 2),
    },
    "embed": {
        "truncate": (("--truncate",), "truncation", "end"),
        "prompt": (("--prompt", "query"), "prompt", "query"),
        "normalize": (("--no-normalize",), "normalize", False),
        "dimensions": (("--dimensions", "4"), "dimensions", 4),
        "dtype": (("--dtype", "float16"), "dtype", "float16"),
    },
    "rerank": {
        "truncate": (("--truncate",), "truncation", "end"),
        "prompt": (("--prompt", "an instruction"), "prompt", "an instruction"),
        "normalize": (("--normalize",), "normalize", True),
    },
    "train": {
        "steps": (("--steps", "7"), "steps", 7),
        "rank": (("--rank", "4"), "rank", 4),
        "alpha": (("--alpha", "3.5"), "alpha", 3.5),
        "targets": (("--targets", "q_proj, v_proj"), "targets", ("q_proj", "v_proj")),
        "rslora": (("--rslora",), "rslora", True),
        "dora": (("--dora",), "dora", True),
        "dropout": (("--dropout", "0.25"), "dropout", 0.25),
        "batch_size": (("--batch-size", "3"), "batch_size", 3),
        "accumulation": (("--accumulation", "5"), "accumulation", 5),
        "max_length": (("--max-length", "77"), "max_length", 77),
        "learn_prompts": (("--learn-prompts",), "learn_prompts", True),
        "learning_rate": (("--learning-rate", "0.25"), "learning_rate", 0.25),
        "schedule": (("--schedule", "cosine"), "schedule", "cosine"),
        "warmup_steps": (("--warmup-steps", "2"), "warmup_steps", 2),
        "weight_decay": (("--weight-decay", "0.125"), "weight_decay", 0.125),
        "clip": (("--clip", "2.5"), "clip", 2.5),
        "label_smoothing": (("--label-smoothing", "0.125"), "label_smoothing", 0.125),
        "gradient_checkpointing": (("--gradient-checkpointing",), "gradient_checkpointing", True),
        "held_out": (("--held-out", "0.25"), "held_out", 0.25),
        "held_out_lines": (("--held-out-lines", "3"), "held_out_lines", 3),
        "eval_every": (("--eval-every", "4"), "eval_every", 4),
        "stop_after": (("--stop-after", "3"), "stop_after", 3),
        "spike": (("--spike", "7.5"), "spike", 7.5),
        "checkpoint_every": (("--checkpoint-every", "9"), "checkpoint_every", 9),
        "promote": (("--no-promote",), "promote", False),
        "seed": (("--seed", "6"), "seed", 6),
    },
}
#: What an option is refused without.
NEEDS = {"stop_after": ("--eval-every", "2"), "held_out_lines": ("--held-out", "0")}
#: Those that say what is asked, who is, or what becomes of the answer; other tests are about them.
OTHERS = {
    "generate": {"prompt", "chat", "output", "in_flight", "overwrite"},
    "embed": {"texts", "output", "field", "batch", "in_flight", "overwrite"},
    "rerank": {"query", "texts", "top", "field"},
    "train": {"name", "dataset", "epochs", "dry_run"},
}
EVERYWHERE = {"model", "as_json", "url"}
CASES = [(command, name) for command, options in OPTIONS.items() for name in options]

Send = Callable[..., dict[str, Any]]


@pytest.fixture
def send(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Send:
    """Give a command; the fields of the request that it sent."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))

    def run(command: str, *words: str) -> dict[str, Any]:
        kinds = {"m": ["generate", "train"], "other": ["generate", "train"], "mini": ["embed"], "judge": ["rerank"]}
        kinds |= {"maxi": ["embed"], "jury": ["rerank"]}
        client = FakeClient(models=kinds, adapters=["style"])
        client.script.generate("an answer")
        client.script.train([2.0, 1.0])
        monkeypatch.setattr(MODULES[command], "connect", lambda url: client)
        model = {"embed": "mini", "rerank": "judge"}.get(command, "m")
        given = () if "--model" in words else ("--model", model)
        done = CliRunner().invoke(app, [command, *WORDS[command], *given, *words])
        assert len(client.sent.jobs) == 1, (done.output, done.exception)
        return client.sent.jobs[0].request.model_dump()

    return run


@pytest.mark.parametrize("command", MODULES)
def test_every_option_of_a_command_is_known_here(command: str) -> None:
    known = OPTIONS[command].keys() | OTHERS[command] | EVERYWHERE
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert {parameter.name for parameter in parameters} == known


@pytest.mark.parametrize(("command", "name"), CASES)
def test_an_option_changes_its_own_field_of_the_request(send: Send, command: str, name: str) -> None:
    words, field, value = OPTIONS[command][name]
    seed = ("--seed", "5") if command == "generate" and name != "seed" else ()
    needs = (*seed, *NEEDS.get(name, ()))
    plain, asked = send(command, *needs), send(command, *needs, *words)
    # A field that travels only where it is given has no default to show.
    assert plain.get(field) != value, "the default would show nothing"
    assert asked[field] == value
    same = {"seed"} if name == "seed" else set()
    differing = {each for each in asked if asked[each] != plain.get(each)} - same
    assert differing <= {field, "job_id"}, "and no other"


@pytest.mark.parametrize("command", MODULES)
def test_the_model_that_is_named_is_asked(send: Send, command: str) -> None:
    models = {"embed": ("mini", "maxi"), "rerank": ("judge", "jury")}.get(command, ("m", "other"))
    for model in models:
        assert send(command, "--model", model)["model"] == model


def test_epochs_take_the_place_of_steps(send: Send) -> None:
    plain = send("train")
    asked = send("train", "--epochs", "2")
    assert asked["epochs"] == 2
    assert {name for name in asked if asked[name] != plain[name]} <= {"epochs", "steps"}

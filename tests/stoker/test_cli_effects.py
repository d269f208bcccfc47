"""What commands show and do, on a client in memory or a real broker: each option's effect, and not just its name."""

from __future__ import annotations

import builtins
import io
import json
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stoker import Client
from stoker.broker import api_keys, keys, ledger, policy
from stoker.cli import app, doctor, engine_tool, inputs, options
from stoker.cli import embed as embed_command
from stoker.cli import train as train_command
from stoker.cli.generate import describe
from stoker.cli.init import conversations
from stoker.contract import GenerateResult, TrainReport, TrainResult, Usage
from stoker.contract.requests import MAX_TEXT_CHARS
from stoker.errors import ConfigError, DatasetError, InvalidRequest, JobFailed, ModelError
from stoker.files import output as output_module
from stoker.files.durable import DRAFT
from stoker.files.source import Source
from stoker.local import storage
from stoker.local.backup import FORMAT
from stoker.local.checks import Check
from stoker.settings import load_settings
from stoker.testing import FakeClient
from tests.stoker.test_client_core import fake, server
from tests.stoker.test_housekeeping import DAY, invoke, make_run

__all__ = ["fake", "server"]


def test_a_speed_is_that_of_the_tokens_behind_the_first() -> None:
    usage = Usage(worker="w1", completion_tokens=11, run_seconds=3.0, first_token_seconds=1.0)
    result = GenerateResult(text="", token_ids=(), finish_reason="length", model="m", adapter=None, usage=usage)
    assert describe(result) == "11 tokens, 5.0 tokens/s, first after 1.00 s, length, on w1"
    at_once = usage.model_copy(update={"run_seconds": 1.0})
    assert describe(result.model_copy(update={"usage": at_once})).startswith("11 tokens, first after")


def test_jobs_are_listed_with_what_they_do(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        runs, waits = client.embed(["a"], model="mini"), client.embed(["b"], model="mini", priority=3)
        ledger.claim(server, runs.id, keys.queue("mini", "embed"), "token", "tag", "worker-1")
        shown = {line.split()[0]: line for line in invoke("jobs", "list").splitlines()}
    assert "running on worker-1" in shown[runs.id]
    assert "priority 3, waiting" in shown[waits.id]
    assert {line.split()[2] for line in shown.values()} == {"mini"}


@pytest.mark.usefixtures("fake")
def test_a_rule_is_set_shown_and_goes_back_to_its_default(fake: Callable[[], Client]) -> None:
    fake()
    before = json.loads(invoke("jobs", "policy", "--json"))
    largest = json.loads(invoke("jobs", "policy", "queue_bytes", f"{2**40}", "--json"))
    assert largest == before | {"queue_bytes": 2**40}
    invoke("jobs", "policy", "queue_bytes", "default")
    assert json.loads(invoke("jobs", "policy", "ageing", "60", "--json")) == before | {"ageing": 60}
    assert json.loads(invoke("jobs", "policy", "--json"))["ageing"] == 60
    assert json.loads(invoke("jobs", "policy", "ageing", "default", "--json")) == before
    with pytest.raises(InvalidRequest, match=r"'1\.5' given; expected a whole number, or 'default'"):
        invoke("jobs", "policy", "ageing", "1.5")
    with pytest.raises(InvalidRequest, match="a name without a value"):
        invoke("jobs", "policy", "ageing")


@pytest.mark.usefixtures("fake")
def test_the_limit_of_one_client_is_shown_with_what_it_limits(server: Any) -> None:
    shown = invoke("jobs", "policy", "client_limit:alice", "7").splitlines()
    assert f"{'client_limit:alice':24} {7:>9}  {policy.RULES['client_limit'].says}" in shown
    assert len(shown) == len(policy.RULES) + 1
    for rule, known in policy.RULES.items():
        assert f"{rule:24} {known.default:>9}  {known.says}" in shown
    assert json.loads(invoke("jobs", "policy", "client_limit:alice", "default", "--json")).keys() == policy.RULES.keys()


@pytest.mark.parametrize("value", ["9" * 21, "9" * 5000, "-1", "1.5", "", "x"])
def test_what_is_no_number_of_a_rule_is_refused_in_a_few_words(server: Any, value: str) -> None:
    done = CliRunner().invoke(app, ["jobs", "policy", "--", "ageing", value])
    assert type(done.exception) is InvalidRequest
    assert "expected a whole number, or 'default'" in str(done.exception)
    assert len(str(done.exception)) < 200


def test_a_file_that_was_interrupted_goes_on_behind_its_last_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each text's vector is its number, so that one in a wrong row is seen."""
    client = FakeClient(models={"m": ["embed"]})
    monkeypatch.setattr(embed_command, "connect", lambda url: client)
    monkeypatch.setattr(output_module, "SAFE_EVERY", 0.0)
    (tmp_path / "in.txt").write_text("".join(f"{number}\n" for number in range(10)))
    words = ("embed", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy"), "--batch", "2", "--in-flight", "1")
    client.script.embed(lambda request: [[float(text)] * 4 for text in request.texts], times=3)
    client.script.embed(error=JobFailed("away"), times=3)
    with pytest.raises(JobFailed):
        invoke(*words)
    with pytest.raises(InvalidRequest, match="with another truncation"):
        invoke(*words, "--truncate")
    client.script.embed(lambda request: [[float(text)] * 4 for text in request.texts], times=None)
    said = json.loads(invoke(*words, "--json"))
    assert (said["rows"], said["resumed"], said["dim"]) == (10, 6, 4)
    assert np.load(tmp_path / "out.npy")[:, 0].tolist() == [float(number) for number in range(10)]
    with pytest.raises(InvalidRequest, match="is there already"):
        invoke(*words)


def test_vectors_are_kept_though_their_file_grows_meanwhile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = FakeClient(models={"m": ["embed"]})
    client.script.embed(lambda request: [[float(text)] * 4 for text in request.texts], times=None)
    texts, survey = tmp_path / "in.txt", Source.survey
    texts.write_text("0\n1\n2\n")
    words = ("embed", str(texts), "-o", str(tmp_path / "out.npy"))

    def grows(source: Source) -> tuple[int, str]:
        found = survey(source)
        texts.write_text("0\n1\n2\n3\n")
        return found

    monkeypatch.setattr(embed_command, "connect", lambda url: client)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "survey", grows)
        with pytest.raises(DatasetError, match=r"more than the 3 rows .* Those are done"):
            invoke(*words)
    texts.write_text("0\n1\n2\n")
    assert json.loads(invoke(*words, "--json"))["resumed"] == 3
    assert np.load(tmp_path / "out.npy")[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_runs_are_listed_newest_first() -> None:
    for run, age in (("aa", 3), ("bb", 1), ("cc", 2)):
        make_run(run, age=age * DAY)
    assert [line.split()[0] for line in invoke("runs", "list").splitlines()] == ["bb", "cc", "aa"]
    assert [run["run"] for run in json.loads(invoke("runs", "list", "--json"))] == ["bb", "cc", "aa"]


def test_a_dry_run_counts_drafts_and_keeps_them() -> None:
    folder = load_settings().home / "adapters"
    folder.mkdir(parents=True)
    draft = folder / f"{DRAFT}left-by-a-dead-writer"
    draft.write_text("half")
    assert json.loads(invoke("clean", "--dry-run", "--json"))["drafts"] == 1
    assert draft.exists()
    assert json.loads(invoke("clean", "--json"))["drafts"] == 1
    assert not draft.exists()


def test_what_a_link_among_the_logs_names_is_no_log(tmp_path: Path) -> None:
    logs = load_settings().logs
    logs.mkdir(parents=True)
    (tmp_path / "own.txt").write_text("mine")
    (logs / "link.log").symlink_to(tmp_path / "own.txt")
    (logs / "old.log").write_text("old")
    far = 10**10
    assert [left.path.name for left in storage.old_logs(load_settings(), far)] == ["old.log"]


def test_a_prompt_of_standard_input_has_no_byte_order_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "stdin", lambda: io.BytesIO(b"\xef\xbb\xbfOnce"))
    assert inputs.read_text("prompt") == "Once"


@pytest.mark.parametrize(("more", "taken"), [(0, True), (1, False)])
def test_a_text_of_standard_input_may_have_the_bytes_of_the_longest_text_and_no_more(
    more: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "stdin", lambda: io.BytesIO(b"x" * (4 * MAX_TEXT_CHARS + more)))
    if taken:
        assert len(inputs.read_text("prompt")) == 4 * MAX_TEXT_CHARS
    else:
        with pytest.raises(InvalidRequest, match="prompt: standard input has more than 4000000 bytes; at most 1000000"):
            inputs.read_text("prompt")


def test_what_is_waited_for_is_a_line_every_few_seconds_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with options.progress_shown("first") as report:
        for second in range(int(2 * options.REPORT_EVERY)):
            now = float(second)
            report(f"second {second}")
    assert capsys.readouterr().err.split("\n")[:-1] == ["second 0", f"second {options.REPORT_EVERY:.0f}"]


@pytest.mark.parametrize(("words", "models"), [((), None), (("--model", "a", "--model", "b"), ("a", "b"))])
def test_a_key_may_use_the_models_that_are_named_and_else_all(
    words: tuple[str, ...], models: tuple[str, ...] | None, fake: Callable[[], Client], server: Any
) -> None:
    invoke("keys", "create", "app", "--open-jobs", "7", *words)
    (key,) = api_keys.listed(server).values()
    assert (key.client, key.models) == ("app", models)
    assert policy.read(server)[f"{policy.OF_CLIENT}app"] == 7


def test_targets_are_names_without_the_spaces_between_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = FakeClient(models={"m": ["train"]})
    client.script.train([2.0, 1.0])
    monkeypatch.setattr(train_command, "connect", lambda url: client)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    invoke("train", "style", "--dataset", str(tmp_path / "x.jsonl"), "--steps", "2", "--targets", "q_proj, v_proj")
    assert client.sent.train[0].targets == ("q_proj", "v_proj")


def test_a_run_without_a_terminal_prints_its_tenths_its_notes_and_its_last_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that stops early ends between two tenths."""

    class Run:
        def progress(self) -> Iterator[TrainReport]:
            fields: dict[str, Any] = {
                "loss": 1.0,
                "learning_rate": 1e-3,
                "gradient_norm": 1.0,
                "tokens": 9,
                "tokens_per_second": 5.0,
            }
            for step in range(1, 24):
                note = "rolled back" if step == 13 else ""
                yield TrainReport(index=step - 1, step=step, steps=100, note=note, last=step == 23, **fields)

        def result(self) -> str:
            return "the result"

    job: Any = Run()
    assert train_command.follow(job) == "the result"  # type: ignore[comparison-overlap]
    shown = [line if line == "rolled back" else line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["10/100", "rolled back", "20/100", "23/100"]


@pytest.mark.parametrize(("faults", "code"), [((True, True), 0), ((True, False), 1), ((False, False), 1)])
def test_one_fault_of_the_machine_is_an_exit_code_for_programs(
    faults: tuple[bool, bool], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, engine = (
        Check(name, ok, "said", "" if ok else "more") for name, ok in zip(("disk", "engine"), faults, strict=True)
    )
    of_engine = subprocess.CompletedProcess([], 0, json.dumps([asdict(engine)]))
    monkeypatch.setattr(doctor, "of_machine", lambda settings: [disk])
    monkeypatch.setattr(doctor, "check_compiler", lambda: Check("compiler", True, "said", ""))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: of_engine)
    said = {}
    for form in ("", "--json"):
        done = CliRunner().invoke(app, ["doctor", *form.split()])
        assert done.exit_code == code
        said[form] = done.stdout
    assert [found["name"] for found in json.loads(said["--json"])] == ["disk", "engine", "compiler"]
    named = [line.split()[1] for line in said[""].splitlines() if line.startswith(("ok", "FAIL"))]
    assert named == ["disk", "engine", "compiler"]


@pytest.mark.parametrize(
    ("command", "module", "named"),
    [
        ("serve", "stoker.gateway.command", "stoker"),
        ("serve", "uvicorn.protocols.http.httptools_impl", "uvicorn"),
        ("flower", "stoker.monitor.command", "stoker"),
        ("flower", "flower.utils.template", "flower"),
    ],
)
def test_of_a_missing_module_the_package_is_named(
    command: str, module: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *arguments: Any) -> Any:
        if name.endswith(".command"):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return found(name, *arguments)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=f"^{named} is missing, which the (gateway|monitor) needs"):
        CliRunner().invoke(app, [command], catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize("name", ["style.jsonl", "texts.txt"])
def test_what_is_written_to_begin_with_never_replaces_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidRequest, match="is there already"):
        invoke("init", str(tmp_path))
    assert (tmp_path / name).read_text() == "mine"


def test_the_conversations_to_begin_with_have_no_marks_of_a_plain_prompt() -> None:
    spoken = [json.loads(line)["messages"] for line in conversations().splitlines()]
    assert all([message["role"] for message in messages] == ["user", "assistant"] for messages in spoken)
    marks = [
        message["content"]
        for messages in spoken
        for message in messages
        if re.search(r"\b[QA]:|\n$", message["content"])
    ]
    assert marks == []


def test_an_error_of_the_engines_tool_keeps_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(text: str) -> None:
        done = subprocess.CompletedProcess([], 1, text)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)

    answers('{"error": {"name": "ModelError", "message": "no weights there"}}')
    with pytest.raises(ModelError, match="no weights there"):
        engine_tool.ask_engine("verify", sources=["x"])
    answers("Killed")
    with pytest.raises(JobFailed, match=r"models_tool verify` ended with exit code 1\. What it said is above"):
        engine_tool.ask_engine("verify", sources=["x"])


def test_a_held_out_loss_of_nothing_is_one(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "model": "m",
        "adapter": "style",
        "version": 1,
        "steps": 3,
        "tokens": 30,
        "usage": Usage(),
    }
    result = TrainResult(first_loss=2.0, last_loss=1.0, best_step=2, held_out_loss=0.0, **fields)
    assert train_command.outcome(result) == "loss 2.000 → 1.000, on held-out examples 0.000 at step 2"
    assert train_command.outcome(result.model_copy(update={"held_out_loss": None})) == "loss 2.000 → 1.000"


def test_a_backup_has_no_drafts_in_it(server: Any, tmp_path: Path) -> None:
    run = make_run("job-1")
    (run / f"{DRAFT}half").write_text("half")
    invoke("backup", str(tmp_path / "b.tgz"))
    with tarfile.open(tmp_path / "b.tgz") as archive:
        names = archive.getnames()
    assert "runs/job-1/run.json" in names
    assert not [name for name in names if DRAFT in name]


def test_a_restore_leaves_the_rules_that_were_decided_since(server: Any, tmp_path: Path) -> None:
    policy.decide(server, "queue_limit", 77)
    invoke("backup", str(tmp_path / "b.tgz"))
    policy.decide(server, "queue_limit", 5)
    assert "0 keys of the broker restored; 1 were there already" in invoke("restore", str(tmp_path / "b.tgz"))
    assert server.hgetall(keys.POLICY) == {b"queue_limit": b"5"}


def test_a_backup_of_another_format_is_refused_with_both(server: Any, tmp_path: Path) -> None:
    make_run("job-1")
    invoke("backup", str(tmp_path / "good.tgz"))
    with tarfile.open(tmp_path / "good.tgz") as source, tarfile.open(tmp_path / "next.tgz", "w:gz") as target:
        for member in source:
            file = source.extractfile(member)
            content = b"" if file is None else file.read()
            if member is source.getmembers()[0]:
                content = json.dumps({"format": FORMAT + 1}).encode()
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    with pytest.raises(InvalidRequest, match=f"format {FORMAT + 1} given; this release reads format {FORMAT}"):
        invoke("restore", str(tmp_path / "next.tgz"))

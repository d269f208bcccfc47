"""What commands print, whole, and the one error of each that cannot be: on a client in memory."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker.broker import letters
from stoker.cli import adapters as adapters_command
from stoker.cli import app, doctor, inputs, jobs, machine, runs, serve
from stoker.cli import embed as embed_command
from stoker.cli import generate as generate_command
from stoker.cli import init as init_command
from stoker.cli import models as models_command
from stoker.cli import train as train_command
from stoker.contract import ModelCard, Presence
from stoker.contract.control import ModelReport
from stoker.contract.requests import MAX_TEXT_CHARS
from stoker.errors import ConfigError, InvalidRequest, JobDead, JobLost, StokerError
from stoker.gateway import command as gateway_command
from stoker.local import backup
from stoker.local import stack as stacks
from stoker.monitor.access import USER
from stoker.settings import load_settings
from stoker.testing import FakeClient
from tests.stoker.test_housekeeping import make_run

LLM = "smollm2-135m-instruct"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeClient:
    """What every command here is over."""
    monkeypatch.chdir(tmp_path)
    made = FakeClient(key="alice", adapters=["style"])
    for module in (adapters_command, jobs, runs, embed_command, generate_command, models_command, train_command):
        monkeypatch.setattr(module, "connect", lambda url: made)
    return made


def said(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def refused(*words: str, error: type[StokerError] = InvalidRequest) -> str:
    done = CliRunner().invoke(app, list(words))
    assert type(done.exception) is error, (done.output, done.exception)
    return str(done.exception)


# Jobs


def test_jobs_that_wait_and_run_are_a_line_each(client: FakeClient) -> None:
    client.script.generate("one two")
    client.embed(["a"], job_id="waits", priority=3)
    job = client.generate("x", job_id="runs")
    next(job.stream(cancel_on_close=False))
    embeds = f"embed    {'all-minilm-l6-v2':24} alice, priority 3, waiting, 0 s old"
    assert said("jobs", "list").splitlines() == [
        f"waits  {embeds}",
        f"runs  generate {LLM:24} alice, priority 5, running on in-memory, 0 s old",
    ]
    found = json.loads(said("jobs", "list", "--json"))
    assert (found["runs"]["worker"], found["waits"]["priority"]) == ("in-memory", 3)


def dead(client: FakeClient) -> None:
    client.script.generate(error=JobDead("it crashed three workers"))
    client.script.generate("a")
    with pytest.raises(JobDead):
        client.generate("x", job_id="lost").result()


def test_a_dead_letter_is_shown_and_its_job_sent_again(client: FakeClient) -> None:
    dead(client)
    assert said("jobs", "dead") == f"lost  generate {LLM:24} dead-lettered after in-memory\n"
    assert json.loads(said("jobs", "dead", "--json"))["lost"]["client"] == "alice"
    assert said("jobs", "retry", "lost") == "lost: sent again\n"
    assert said("jobs", "dead") == ""
    assert "no dead letter of that id" in refused("jobs", "retry", "lost", error=JobLost)


def test_a_letter_that_is_no_jobs_shows_its_bytes_and_the_troubles_of_owners(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = [{"worker": "a", "time": 1.0}, {"worker": "b\x1b[2K", "time": 2.0, "trouble": "a full disk"}]
    job = {"kind": "train", "model": "m", "request": "{}", "client": "c", "history": history}
    found = {"job": job, "broken": letters.spoiled(b"\xff\x00"), "odd": {**job, "history": []}}
    monkeypatch.setattr(client, "dead", lambda: found)
    assert said("jobs", "dead").splitlines() == [
        f"job  train    {'m':24} dead-lettered after a, b\ufffd[2K (a full disk)",
        f"broken  message  {'':24} cannot be read, says its letter",
        "    2 bytes, base64: /wA=",
        f"odd  train    {'m':24} dead-lettered after its letter",
    ]


# Adapters and models


def make_adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    return folder


@pytest.mark.parametrize(("words", "serves"), [((), 2), (("--promote",), 2), (("--no-promote",), 1)])
def test_an_adapter_that_was_made_elsewhere_is_loaded(client: FakeClient, words: tuple[str, ...], serves: int) -> None:
    folder = make_adapter(Path("made"))
    assert said("adapters", "load", "style", str(folder), *words) == "adapter style@2: lora, rank 8\n"
    assert client.adapters.get("style").serving == serves
    assert json.loads(said("adapters", "load", "style", str(folder), "--json"))["version"] == 3
    with pytest.raises(InvalidRequest):
        CliRunner().invoke(app, ["adapters", "load", "style", "nowhere"], catch_exceptions=False)


def test_an_adapter_whose_folder_cannot_be_deleted_has_left_the_registry(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = load_settings().adapters / LLM / "style"
    (folder / "1").mkdir(parents=True)

    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(adapters_command, "remove_folder", refuse)
    error = refused("adapters", "remove", "style", error=ConfigError)
    assert error.startswith(f"{folder}: cannot be deleted")
    assert "The registry has let go of it" in error
    assert client.adapters.list() == [] or not client.adapters.list()[0].versions


@pytest.mark.parametrize(
    ("verb", "done"), [("load", "warm"), ("unload", "unloaded"), ("pin", "pinned"), ("unpin", "not pinned")]
)
def test_a_worker_that_was_asked_about_a_model_says_what_it_has_now(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch, verb: str, done: str
) -> None:
    asked: list[Any] = []
    report = ModelReport(
        id="x", worker="w@h/1", verb="load", model="m=/path", phase="done", seconds=2.25, memory_bytes=3_500_000_000,
        made_way=("a", "b"),
    )  # fmt: skip

    def ask(name: str, **options: Any) -> ModelReport:
        asked.append((name, options))
        return report

    monkeypatch.setattr(client.models, verb, ask)
    words = ("models", verb, "m", "--worker", "w", "--timeout", "7.5")
    line = f"m: {done} at w@h/1 after 2.2 s, which has 3.50 GB in memory now; made way: a, b\n"
    assert said(*words) == line
    assert json.loads(said(*words, "--json"))["seconds"] == 2.25
    assert asked == [("m", {"worker": "w", "timeout": 7.5})] * 2
    assert said("models", verb, "m") == line
    assert asked[-1] == ("m", {"worker": None, "timeout": None})
    report = report.model_copy(update={"was_warm": True})
    assert said(*words) == (
        "m: warm already at w@h/1, as its files were when it was loaded. To have them read anew, unload it first\n"
    )


# Files


def test_texts_of_a_file_need_an_output_and_an_output_one_file(client: FakeClient) -> None:
    Path("texts.txt").write_text("a\nb\nc\n")
    assert "texts.txt is a file: name a file for its vectors with --output" in refused("embed", "texts.txt")
    assert "2 texts given; with --output just one" in refused("embed", "a", "b", "-o", "out.npy")
    for wrong in (("--in-flight", "0"), ("--batch", "0"), ("--dimensions", "0"), ("--dtype", "int4")):
        assert wrong[0][2:].replace("-", "_") in refused("embed", "texts.txt", "-o", "out.npy", *wrong)
        assert not list(Path().glob("out.npy*"))
    Path("out.npy").write_text("a\n")
    assert "written over its input out.npy" in refused("embed", "out.npy", "-o", "out.npy", "--overwrite")
    Path("out.npy").unlink()
    assert said("embed", "texts.txt", "-o", "out.npy") == "out.npy: 3 vectors of 8 numbers, float32\n"
    record = json.loads(said("embed", "texts.txt", "-o", "out.npy", "--overwrite", "--dtype", "float16", "--json"))
    assert record.pop("seconds") >= 0
    assert record == {"output": "out.npy", "rows": 3, "resumed": 0, "dim": 8, "dtype": "float16"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("embed", "texts.txt", "a"), "texts.txt is a file: name a file for its vectors"),
        (("embed", "a", "none.jsonl"), "none.jsonl: there is no such file. Give a text that ends so on standard input"),
        (("generate", "none.jsonl"), "none.jsonl: there is no such file"),
        (("rerank", "q", "texts.txt", "a"), "texts.txt is a file: it is read where it is given alone"),
        (("rerank", "q", "text.txt"), "text.txt: there is no such file"),
        (("embed", "a", "--batch", "5"), "--batch: given without --output"),
        (("embed", "texts.txt", "--field", "body", "-o", "a.npy"), "--field: 'body' given with texts.txt, whose lines"),
        (("embed", "a", "--field", "body"), "--field: given without a file of JSON lines"),
    ],
)
def test_the_name_of_a_file_is_never_taken_for_a_text_nor_is_what_is_for_files_passed_over(
    client: FakeClient, words: tuple[str, ...], why: str
) -> None:
    Path("texts.txt").write_text("a\nb\n")
    assert why in refused(*words)
    assert not client.sent.jobs


@pytest.mark.parametrize("steps", ["100", "99"])
def test_steps_next_to_epochs_are_refused_also_as_many_as_are_usual(client: FakeClient, steps: str) -> None:
    Path("style.jsonl").write_text('{"text": "a"}\n')
    words = ("train", "style", "--dataset", "style.jsonl", "--epochs", "2", "--steps", steps)
    assert refused(*words) == "steps and epochs given; say one of them."


def test_a_text_that_speaks_of_a_file_is_a_text(client: FakeClient) -> None:
    assert "what is in none.txt" in said("embed", "what is in none.txt")


def test_a_folder_that_init_cannot_write_is_named(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(init_command, "write_whole", refuse)
    assert "new/style.jsonl: cannot be written ([Errno 28]" in refused("init", "new", error=ConfigError)


@pytest.mark.parametrize("given", ["schema.json", "-"])
def test_json_that_a_command_reads_has_bounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str) -> None:
    monkeypatch.chdir(tmp_path)
    shown = "standard input" if given == "-" else given

    def read(text: str) -> Any:
        Path("schema.json").write_text(text)
        monkeypatch.setattr(inputs, "stdin", lambda: io.BytesIO(text.encode()))
        return inputs.read_json("json_schema", given)

    longest = 4 * MAX_TEXT_CHARS
    assert read(json.dumps("a" * (longest - 2))) == "a" * (longest - 2)
    for text, why in (
        (json.dumps("a" * (longest - 1)), f"json_schema: {shown} has more than {longest} bytes"),
        ("{", f"json_schema: {shown} cannot be read as JSON"),
        ("[" * 200_000, "is nested too deeply"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            read(text)


@pytest.mark.parametrize(
    ("verb", "what"), [("backup", "the backup cannot be written"), ("restore", "cannot be restored")]
)
def test_a_disk_that_refuses_a_backup_is_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: str, what: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup, verb, refuse)
    said = refused(verb, str(tmp_path / "b.tgz"), "--url", "redis://127.0.0.1:1/0")
    assert said.startswith(f"{tmp_path}/b.tgz: ")
    assert what in said
    assert "No space left on device" in said


# Runs


def test_a_run_is_pinned_until_it_is_let_go_and_removed_when_it_has_ended(client: FakeClient) -> None:
    folder = make_run("job-1")
    assert said("runs", "pin", "style") == "job-1: pinned\n"
    assert (folder / "pinned").stat().st_mode & 0o777 == 0o600
    for _ in range(2):
        assert said("runs", "pin", "job-1", "--off") == "job-1: not pinned any more\n"
    assert not (folder / "pinned").exists()
    assert said("runs", "remove", "job-1") == "job-1: deleted\n"
    assert not folder.exists()


def test_a_run_whose_folder_cannot_be_changed_is_one_error(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run("job-1")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(runs, "remove_folder", refuse)
    monkeypatch.setattr(Path, "touch", refuse)
    assert refused("runs", "remove", "job-1", error=ConfigError).startswith(f"{folder}: cannot be deleted")
    assert "cannot be made" in refused("runs", "pin", "job-1", error=ConfigError)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert "cannot be deleted" in refused("runs", "pin", "job-1", "--off", error=ConfigError)


def test_a_run_is_followed_by_its_name_here_or_its_id_elsewhere_and_nothing_else_is(client: FakeClient) -> None:
    client.script.train([2.0, 1.0], times=None)
    client.script.generate("a")
    for run_id in ("job-1", "job-2"):
        client.train("style", [{"text": "x"}], steps=2, job_id=run_id)
    make_run("job-1", name="mine")
    ends = "adapter style@2: loss 2.000 → 1.000"
    assert said("runs", "attach", "mine").splitlines()[-1] == ends
    assert said("runs", "attach", "job-2").splitlines()[-1] == ends.replace("@2", "@3")
    client.generate("x", job_id="text")
    assert refused("runs", "attach", "text").startswith("text: no training run")
    there = "run 'minne' given; on this machine there are: job-1 (mine). Nor does the broker know a job of that id."
    assert refused("runs", "attach", "minne") == there


PLAN = {
    "examples": 10, "held_out": 2, "shortest": 3, "longest": 40, "median": 12, "tokens_an_epoch": 96,
    "learned_an_epoch": 50, "steps_an_epoch": 4, "steps": 7, "epochs": 1.75, "trained_parameters": 12345,
    "device": "cpu", "seconds_a_step": 0.5, "seconds": 90.0, "memory_bytes": 3 * 2**29,
}  # fmt: skip


def test_a_dry_run_says_what_the_run_would_be_of_what_was_asked(
    client: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def plan(verb: str, **fields: Any) -> Any:
        asked.append((verb, fields))
        return PLAN

    monkeypatch.setattr(train_command, "ask_engine", plan)
    Path("a.jsonl").write_text('{"text": "x"}\n')
    words = ("train", "style", "--dataset", "a.jsonl", "--dry-run")
    shown = said(*words, "--model", LLM, "--rank", "4", "--epochs", "2")
    assert shown.splitlines() == [
        "10 examples, 2 held out; 3 to 40 tokens, median 12",
        "an epoch: 96 tokens, 50 of them learned, in 4 steps; the run: 7 steps, 1.8 epochs",
        "12,345 parameters are trained",
        "on cpu: at most 0.50 s a step, 1.5 min in all, 1.50 GB",
    ]
    ((verb, fields),) = asked
    assert (verb, fields["dataset"]) == ("plan", "a.jsonl")
    request = fields["request"]
    assert (request["model"], request["name"], request["rank"], request["epochs"]) == (LLM, "style", 4, 2)
    assert json.loads(said(*words, "--model", LLM, "--json")) == PLAN
    assert "a dry run loads the model itself" in refused(*words)
    on_worker = ("train", "style", "--dataset", "worker:a", "--dry-run", "--model", LLM)
    assert "a dry run reads the file itself" in refused(*on_worker)
    assert not client.sent.jobs, "nothing is sent"


# The machine


def test_up_says_where_everything_is_and_what_to_try_until_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    card = ModelCard(model="m", architecture="a", kinds=("generate",), context=9, parameters=1)
    presence = Presence(
        worker="w", host="h", pid=1, device="cpu", started=0, time=0, models=(card,), adapters={}, lanes={},
        memory_bytes=0,
    )  # fmt: skip

    class Stack:
        def __init__(self, settings: Any, **options: Any) -> None:
            made.append((settings.models, {name: value for name, value in options.items() if name != "report"}))
            self.settings, self.joined = settings, joined
            self.flower_url, self.flower_password = ("http://f", "secret") if options["flower"] else ("", "")
            self.gateway_url = "http://g" if options["gateway"] else ""
            self.did = did

        def __enter__(self) -> Stack:
            self.did.append("started")
            return self

        def __exit__(self, *_: object) -> None:
            self.did.append("stopped")

        def wait_until_warm(self) -> Presence:
            return presence

        def watch(self, report: Callable[[str], None]) -> None:
            report("the worker ended; starting another")
            raise KeyboardInterrupt

    monkeypatch.setattr(stacks, "Stack", Stack)
    joined: int | None = None
    did: list[str] = []
    shown = said("up", "--model", "m=/a", "--url", "redis://h:5/2").splitlines()
    assert did == ["started", "stopped"]
    assert made[0] == (("m=/a",), {"flower": True, "gateway": True})
    logs = load_settings().logs
    assert [line for line in shown if not line.startswith("starting")] == [
        "broker  redis://h:5/2", "worker  m warm on cpu", f"flower  http://f  (user {USER}, password secret)",
        "gateway http://g", f"logs    {logs}", "", "Try in another shell:", '  stoker generate "Why is the sky blue?"',
        "  stoker status", "  stoker jobs list", "Ctrl-C ends all.", "the worker ended; starting another", "",
        "stopping",
    ]  # fmt: skip
    joined = 77
    shown = said("up", "--no-flower", "--no-gateway", "--model", "m=/a", "--url", "redis://h:5/2").splitlines()
    assert made[1][1] == {"flower": False, "gateway": False}
    assert not [line for line in shown if line.startswith(("flower", "gateway"))]
    assert "broker  redis://h:5/2  (of the `stoker up` that runs already, process 77)" in shown
    assert any("Ctrl-C ends this worker alone" in line for line in shown)


def test_the_gateway_is_given_its_names_in_small_letters_and_where_to_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def serves(settings: Any, *more: Any) -> None:
        *rest, say = more
        given.append((settings.address.redis, *rest))
        say("gateway  here")

    monkeypatch.setattr(gateway_command, "serve", serves)
    words = ("serve", "--port", "7", "--address", "::1", "--host", "A.example", "--host", "b", "--url", "redis://h:5/2")
    assert said(*words) == "gateway  here\n"
    said("serve", "--url", "redis://h:5/2")
    assert given == [
        ("redis://h:5/2", "::1", 7, frozenset({"a.example", "b"})),
        ("redis://h:5/2", "127.0.0.1", serve.PORT, frozenset()),
    ]


def test_a_gateway_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stoker.gateway.command", None)
    assert "pip install '.[gateway]', from a checkout" in refused("serve", "--url", "redis://h:5/2", error=ConfigError)


def test_an_engine_that_is_missing_or_cannot_be_asked_is_a_fault_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "of_machine", lambda settings: [])
    failed = subprocess.CompletedProcess([], 1, "", "x" * 400 + " no MLX\n")
    monkeypatch.setattr(doctor, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    (check,) = doctor.machine_checks(None)
    assert (check.name, check.ok, check.remedy) == ("engine", False, "make venv installs what it needs")
    assert check.detail == f"it cannot be asked: {('x' * 400 + ' no MLX')[-300:]}"

    def missing() -> None:
        raise ConfigError("this installation has the client alone")

    monkeypatch.setattr(stacks, "require_workers", missing)
    (check,) = doctor.machine_checks(None)
    assert (check.ok, check.detail) == (False, "this installation has the client alone")
    assert check.remedy == "a client needs no engine; a worker does"


def test_a_stack_whose_models_can_do_nothing_yet_is_asked_how_it_is() -> None:
    assert machine.suggestions(()) == ["stoker status", "stoker jobs list"]

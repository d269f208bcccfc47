"""The command line: one clear line for an error, the documented exit codes, JSON for programs."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stoker import cli, errors
from stoker.broker.outcome import JobStatus
from stoker.cli import app, chat, embed, generate, inputs, jobs, machine, train
from stoker.client.requests import read_dataset
from stoker.contract import GenerateResult, ModelCard, Presence, StreamToken, TrainReport, TrainResult, Usage
from stoker.contract.presence import ModelState
from stoker.errors import InvalidRequest, StokerError, UnknownModel
from stoker.files.source import Source
from stoker.settings import load_settings
from tests.stoker.forked import Commands

NOWHERE = "redis://127.0.0.1:1/0"
RESULT = GenerateResult(
    model="m", adapter=None, text="one two", token_ids=(1, 2), finish_reason="stop", usage=Usage(completion_tokens=2)
)
RUN = TrainResult(
    model="m",
    adapter="style",
    version=3,
    steps=20,
    first_loss=2.0,
    last_loss=1.0,
    best_step=20,
    tokens=80,
    usage=Usage(),
)
CARD = ModelCard(model="m", architecture="llama", kinds=("generate", "train"), context=64, parameters=1)
WORKER = Presence(
    worker="w@here",
    host="here",
    pid=5,
    device="cpu",
    started=0.0,
    time=9.0,
    models=(CARD,),
    adapters={"m": ("style@3",)},
    lanes={"generate": (1, 16)},
    memory_bytes=2**20,
)


class FakeJob:
    id = "3f2c"

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self, timeout: float | None = None) -> Any:
        return self._value

    def status(self) -> JobStatus:
        return JobStatus.RUNNING

    def cancel(self) -> None:
        print("cancelled!")

    def stream(self) -> Iterator[StreamToken]:
        for index, text in enumerate(("one ", "two")):
            yield StreamToken(index=index, token_id=index, text=text, logit=0, logprob=0, probability=1)

    def progress(self) -> Iterator[TrainReport]:
        for step in range(20):
            yield TrainReport(
                index=step, step=step + 1, steps=20, loss=1, learning_rate=1, gradient_norm=1, tokens=1,
                tokens_per_second=1,
            )  # fmt: skip


class FakeClient:
    """Answers as a client with one worker; notes what it was asked."""

    asked: dict[str, Any] = {}  # noqa: RUF012
    alive = (WORKER,)

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def embed(self, texts: list[str], **options: Any) -> FakeJob:
        self.asked.update(texts=texts, **options)
        return FakeJob(np.array([[0.5, -1.0, 2.0, 0.0, 9.0]] * len(texts), dtype=np.float32))

    def generate(self, prompt: str, **options: Any) -> FakeJob:
        self.asked.update(prompt=prompt, **options)
        return FakeJob(RESULT)

    def train(self, name: str, dataset: Path, **options: Any) -> FakeJob:
        self.asked.update(name=name, dataset=dataset, **options)
        return FakeJob(RUN)

    def job(self, job_id: str) -> FakeJob:
        return FakeJob(None)

    def workers(self) -> tuple[Presence, ...]:
        return self.alive

    def choose_model(self, model: str | None, kind: str) -> str:
        return model or "m"

    def models(self) -> dict[str, ModelCard]:
        return {name: CARD.model_copy(update={"model": name, "chat": name == "instruct"}) for name in ("m", "instruct")}

    @property
    def settings(self) -> Any:
        return load_settings(url=NOWHERE)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(FakeClient, "asked", {})
    for module in (chat, embed, generate, jobs, machine, train):
        monkeypatch.setattr(module, "connect", lambda url: FakeClient())
    return FakeClient.asked


def run(*words: str, stdin: str | None = None) -> str:
    """What a command prints on standard output; it must end well."""
    done = CliRunner().invoke(app, words, input=stdin, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_embed_shows_the_beginning_of_each_vector(asked: dict[str, Any]) -> None:
    assert run("embed", "a", "b", "--truncate").splitlines() == [
        "[+0.5000, -1.0000, +2.0000, +0.0000, … 5 in all]  a",
        "[+0.5000, -1.0000, +2.0000, +0.0000, … 5 in all]  b",
    ]
    assert (asked["texts"], asked["model"], asked["truncation"]) == (["a", "b"], None, "end")
    assert json.loads(run("embed", "a", "--json")) == [[0.5, -1.0, 2.0, 0.0, 9.0]]


def test_generate_prints_the_text_and_nothing_else(asked: dict[str, Any]) -> None:
    assert run("generate", "Once", "--max-tokens", "5", "--seed", "7", "--temperature", "0.5") == "one two\n"
    assert (asked["prompt"], asked["max_tokens"], asked["seed"], asked["temperature"]) == ("Once", 5, 7, 0.5)
    assert GenerateResult.model_validate_json(run("generate", "Once", "--json")) == RESULT


def test_generate_takes_messages_schemas_and_stops(asked: dict[str, Any], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    run("generate", "Hello", "--chat", "--json-schema", str(schema), "--stop", "a", "--stop", "b")
    assert asked["prompt"] == [{"role": "user", "content": "Hello"}]
    assert (asked["json_schema"], asked["stop"]) == ({"type": "object"}, ("a", "b"))
    assert run("generate", "x", "--n", "2") == f"--- 1\n{RESULT.text}\n"
    schema.write_text("{")
    done = CliRunner().invoke(app, ["generate", "x", "--json-schema", str(schema)])
    assert isinstance(done.exception, InvalidRequest)
    assert "cannot be read as JSON" in str(done.exception)


def test_a_chat_keeps_the_conversation_until_it_is_cleared(asked: dict[str, Any]) -> None:
    shown = run("chat", "--system", "Be brief.", stdin="Hello\n\nAgain\n")
    assert shown.count("one two\n") == 2
    roles = [message["role"] for message in asked["prompt"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert [asked["prompt"][2]["content"], asked["prompt"][3]["content"]] == ["one two", "Again"]
    run("chat", stdin="Hello\n/clear\nNew\n/exit\nnever\n")
    assert asked["prompt"] == [{"role": "user", "content": "New"}]


def test_a_model_with_a_chat_template_gets_the_prompt_as_a_message_unless_it_is_raw(asked: dict[str, Any]) -> None:
    run("generate", "Hello", "--model", "instruct")
    assert asked["prompt"] == [{"role": "user", "content": "Hello"}]
    run("generate", "Hello", "--model", "instruct", "--raw")
    assert asked["prompt"] == "Hello"


def test_a_chat_changes_model_adapter_and_system_and_answers_again(asked: dict[str, Any]) -> None:
    said = ("/adapter style", "Hello", "/model instruct", "/system Be brief.", "/retry", "/adapter", "Bye", "/nonsense")
    run("chat", "--seed", "7", stdin="\n".join(said))
    roles = [message["role"] for message in asked["prompt"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert (asked["model"], asked["adapter"], asked["seed"]) == ("instruct", None, 9)


def test_a_chat_says_what_can_be_typed() -> None:
    for command in ("/clear", "/model", "/adapter", "/system", "/retry", "/exit"):
        assert command in chat.HELP


def test_init_writes_files_that_train_and_embed_take_and_overwrites_none(tmp_path: Path) -> None:
    run("init", str(tmp_path / "new"))
    dataset = tmp_path / "new/style.jsonl"
    assert b"messages" in read_dataset(dataset)
    assert Source(tmp_path / "new/texts.txt", "text", plain=True).survey()[0] > 3
    dataset.write_text("mine")
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new")])
    assert isinstance(done.exception, InvalidRequest)
    assert dataset.read_text() == "mine"


def test_init_writes_nothing_where_one_of_its_files_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("mine")
    done = CliRunner().invoke(app, ["init", str(tmp_path)])
    assert isinstance(done.exception, InvalidRequest)
    assert {entry.name for entry in tmp_path.iterdir()} == {"texts.txt"}


@pytest.mark.parametrize(
    ("cards", "wanted"),
    [
        (
            (CARD.model_copy(update={"chat": True}),),
            ["stoker generate", "stoker init && stoker train", "stoker status"],
        ),
        ((CARD,), ["stoker generate", "stoker status", "stoker jobs list"]),
        ((CARD.model_copy(update={"kinds": ("embed",)}),), ["stoker embed", "stoker status", "stoker jobs list"]),
    ],
)
def test_up_names_three_commands_that_its_models_can_run(cards: tuple[ModelCard, ...], wanted: list[str]) -> None:
    shown = machine.suggestions(cards)
    assert [line.startswith(start) for line, start in zip(shown, wanted, strict=True)] == [True] * 3
    assert not any("--model" in line for line in shown)
    assert "--model m" in machine.suggestions((*cards, *cards))[0]


def test_the_one_who_joins_another_up_reads_that_ctrl_c_ends_this_worker_alone() -> None:
    assert machine.at_the_end(None) == "Ctrl-C ends all."
    assert "Ctrl-C ends this worker alone" in machine.at_the_end(7)
    assert "ends all" not in machine.at_the_end(7)


def test_a_prompt_can_come_from_standard_input(asked: dict[str, Any]) -> None:
    run("generate", "-", stdin="from a pipe")
    assert asked["prompt"] == "from a pipe"


@pytest.mark.parametrize(("command", "end"), [("generate", ".jsonl"), ("embed", ".txt")])
def test_a_text_that_is_too_long_for_a_name_is_no_file(asked: dict[str, Any], command: str, end: str) -> None:
    text = "word " * 1000 + end
    run(command, text)
    assert text in (asked.get("prompt"), *asked.get("texts", ()))


@pytest.mark.parametrize("words", [("embed", "-"), ("embed", "one", "-")])
def test_texts_can_come_from_standard_input_a_text_a_line(asked: dict[str, Any], words: tuple[str, ...]) -> None:
    run(*words, stdin="\ufefftwo\r\n\r\nthree")
    assert asked["texts"] == [*words[1:-1], "two", "three"]


def test_json_lines_of_standard_input_need_the_name_of_their_field(asked: dict[str, Any]) -> None:
    run("embed", "-", "--field", "body", stdin='{"body": "two"}\n{"body": "three"}')
    assert asked["texts"] == ["two", "three"]
    with pytest.raises(InvalidRequest, match="standard input: JSON lines given; name the field"):
        run("embed", "-", stdin='{"body": "two"}')


@pytest.mark.parametrize(
    ("name", "field", "content", "texts"),
    [
        ("pipe", None, "one\ntwo", ["one", "two"]),
        ("pipe", "body", '{"body": "one"}', ["one"]),
        ("pipe.jsonl", None, '{"text": "one"}', ["one"]),
        ("pipe.txt", None, "one", ["one"]),
    ],
)
def test_a_pipe_is_read_by_its_name_or_as_standard_input(
    tmp_path: Path, name: str, field: str | None, content: str, texts: list[str]
) -> None:
    """`<(…)` has no suffix, and can be read once."""
    pipe = tmp_path / name
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(content), daemon=True)
    writer.start()
    unnamed = inputs.is_unnamed(str(pipe))
    with inputs.as_file(str(pipe)) as path:
        source = embed.source_of(str(pipe), path, field)
        assert source.survey()[0] == len(texts)
        assert list(source.texts()) == texts
    writer.join()
    assert unnamed is (name == "pipe")


@pytest.mark.parametrize(
    ("words", "stdin", "why"),
    [
        (("embed", "-"), "", "^standard input: no text in it"),
        (("generate", "-"), " \n", "prompt: standard input given, without a character that is not a space"),
        (("generate", "-"), "", "prompt: standard input given"),
        (("generate", ""), "", "prompt: an empty text given"),
        (("generate", "a", "--in-flight", "2"), "", "--in-flight: given without --output"),
        (("generate", "a", "--overwrite"), "", "--overwrite: given without --output"),
        (("embed", "a", "--in-flight", "0"), "", "--in-flight: given without --output"),
        (("embed", "a", "--overwrite"), "", "--overwrite: given without --output"),
        (("jobs", "cancel", "--kind", "nope"), "", "kind: 'nope' given; embed, generate, train, adapters are allowed"),
        (("jobs", "purge", "--kind", "nope"), "", "kind: 'nope' given; embed, generate, train, adapters are allowed"),
        (("embed", "-"), "a\n\udcff".encode("utf-8", "surrogateescape"), "standard input, line 2: not UTF-8"),
        (("embed", "-", "-"), "a", "'-' given twice"),
        (("generate", "-"), b"\xff", "standard input is not UTF-8"),
        (("generate", "-", "--json-schema", "-"), "a", "which is the prompt already"),
        (("generate", "a", "--json-schema", "-"), "{", "json_schema: standard input cannot be read as JSON"),
        (("generate", "a", "--json-schema", "-"), "[" * 100_000, "json_schema: standard input is nested too deeply"),
        (("generate", "-"), "x" * 4_000_001, "prompt: standard input has more than 4000000 bytes"),
        (
            ("train", "style", "--dataset", "worker:x", "--dry-run", "--model", "smollm2-135m-instruct"),
            "",
            "dry run reads",
        ),
    ],
)
def test_what_is_wrong_with_standard_input_is_said(
    asked: dict[str, Any], words: tuple[str, ...], stdin: str, why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        run(*words, stdin=stdin)


def test_ctrl_c_leaves_a_run_going_and_says_how_to_follow_and_to_end_it(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(_: FakeJob) -> Iterator[TrainReport]:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeJob, "progress", progress)
    monkeypatch.setattr(FakeJob, "cancel", lambda _: pytest.fail("it was to go on"))
    done = CliRunner().invoke(app, ["train", "style", "--dataset", str(tmp_path / "rows.jsonl")])
    assert done.exit_code == 130
    assert "the run goes on: `stoker runs attach 3f2c`, `stoker cancel 3f2c`" in done.stderr


def test_a_dataset_can_come_from_standard_input_or_a_pipe_or_be_the_workers(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def train(self: FakeClient, name: str, dataset: Path | str, **options: Any) -> FakeJob:
        read.append(dataset.encode() if isinstance(dataset, str) else dataset.read_bytes() + dataset.read_bytes())
        return FakeJob(RUN)

    monkeypatch.setattr(FakeClient, "train", train)
    run("train", "style", "--dataset", "-", stdin="rows")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("more"), daemon=True)
    writer.start()
    run("train", "style", "--dataset", str(tmp_path / "pipe"))
    writer.join()
    run("train", "style", "--dataset", "worker:a.jsonl")
    assert read == [b"rowsrows", b"moremore", b"worker:a.jsonl"]


def test_a_schema_can_come_from_standard_input(asked: dict[str, Any]) -> None:
    run("generate", "Hello", "--json-schema", "-", stdin='{"type": "object"}')
    assert asked["json_schema"] == {"type": "object"}


def test_a_run_prints_a_line_every_tenth_of_it_where_there_is_no_terminal(asked: dict[str, Any]) -> None:
    lines = run("train", "style", "--dataset", "x.jsonl", "--steps", "20").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [f"{step}/20" for step in range(2, 21, 2)]
    assert lines[-1] == "adapter style@3: loss 2.000 → 1.000"
    assert (asked["name"], asked["dataset"], asked["steps"]) == ("style", Path("x.jsonl"), 20)


def test_a_run_as_json_is_a_report_a_line_and_the_result_last(asked: dict[str, Any]) -> None:
    lines = run("train", "style", "--dataset", "x.jsonl", "--json").splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, 21))
    assert TrainResult.model_validate_json(lines[-1]) == RUN


@pytest.mark.usefixtures("asked")
def test_cancel_says_in_which_state_the_job_was() -> None:
    assert run("cancel", "3f2c") == "cancelled!\n3f2c: asked to stop; it was running\n"


@pytest.mark.usefixtures("asked")
def test_status_says_which_models_are_warm() -> None:
    shown = run("status")
    assert "w@here  on cpu, process 5, up 9 s, 1 MB" in shown
    assert "warm: generate, train; takes 64 tokens" in shown
    assert "adapters in memory: style@3" in shown
    assert "jobs held: generate 1 of 16" in shown
    (found,) = json.loads(run("status", "--json"))
    assert Presence.model_validate_json(json.dumps(found)) == WORKER


@pytest.mark.usefixtures("asked")
def test_status_says_of_each_model_once_how_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    states = (
        ModelState(model=WORKER.models[0].model, state="warm", pinned=True),
        ModelState(model="large", state="refused", why="it has no room"),
        ModelState(model="later", state="offered"),
    )
    monkeypatch.setattr(FakeClient, "alive", (WORKER.model_copy(update={"states": states}),))
    lines = [line.split() for line in run("status").splitlines()]
    for model, said in (
        (WORKER.models[0].model, "warm, pinned:"),
        ("large", "refused: it has no room"),
        ("later", "loaded when a job waits for it"),
    ):
        (line,) = [" ".join(line[1:]) for line in lines if line[0] == model and line[1] != "adapters"]
        assert line.startswith(said)


@pytest.mark.usefixtures("asked")
def test_status_without_a_worker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClient, "alive", ())
    for words in (["status"], ["status", "--json"]):
        with pytest.raises(UnknownModel, match=r"no worker is alive at .*127\.0\.0\.1:1/0\. Start one"):
            CliRunner().invoke(app, words, catch_exceptions=False)


def test_the_version_is_printed() -> None:
    assert run("--version") == "stoker 0.1.0\n"


def test_every_command_explains_itself() -> None:
    listed = run("--help")
    for command in ("embed", "generate", "train", "cancel", "status", "up", "worker", "doctor", "demo", "models"):
        assert command in listed
        assert "Usage" in run(command, "--help")


def ended(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """The exit code of `main` when a command raises `error`."""

    def raises(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", raises)
    # `main` takes the signals of its process; they are given back here.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return end.value.code


CODES = {
    errors.WorkerUnavailable: 1,
    errors.ConfigError: 2,
    errors.TextTooLong: 2,
    errors.UnknownModel: 2,
    errors.BrokerUnavailable: 3,
    errors.JobCancelled: 4,
    errors.JobFailed: 4,
    errors.JobLost: 4,
    errors.ModelError: 5,
    errors.JobTimeout: 6,
}


@pytest.mark.parametrize(("error", "code"), CODES.items())
def test_an_error_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[StokerError], code: int
) -> None:
    assert ended(monkeypatch, error("why, and what to do.")) == code
    assert capsys.readouterr().err == "stoker: why, and what to do.\n"


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch, KeyboardInterrupt()) == 130


def test_a_reader_that_goes_away_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert ended(monkeypatch, BrokenPipeError()) == 0


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as running:
        yield running


@pytest.fixture
def command(commands: Commands) -> Callable[..., tuple[int, str]]:
    """Exit code and standard error of the real command."""

    def run(*words: str) -> tuple[int, str]:
        code, said = commands.run(words)
        assert "Traceback" not in said
        return code, said

    return run


def test_no_broker_is_one_line_that_says_how_to_start_one(command: Callable[..., tuple[int, str]]) -> None:
    words = ("generate", "x", "--url", NOWHERE)
    alone = [sys.executable, "-c", "from stoker.cli import main; main()", *words]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert "127.0.0.1:1/0" in done.stderr
    assert "stoker up" in done.stderr
    assert command(*words) == (done.returncode, done.stderr), "as in a fork"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "--url", "http://x"], "http://… given; allowed: redis://"),
        (["up", "--model", "nope"], "model 'nope' given; the catalogue has all-minilm-l6-v2"),
        (["up", "--model", "No Name=/x"], "model 'No Name' given; a name has"),
        (["worker", "--model", "m="], "no source after '='"),
        (["status", "--url", "redis://\udcff"], "stoker: --url: cannot be read"),
        (["status", "--url", f"redis://{'a' * 64}"], "stoker: --url: cannot be read"),
        (["status", "--disk", "--url", "x"], "stoker: --url: something that is no URL given"),
        (["serve", "--url", "redis://h?a=1"], "stoker: --url: an option behind the ? is wrong"),
        (["worker", "install", "--url", "x"], "stoker: --url: something that is no URL given"),
        (["worker", "--group", "a b"], "Invalid value for '--group': 'a b' given; allowed: 1 to 64 of a-z"),
        (["worker", "--kv-bits", "3"], "Invalid value for '--kv-bits': 3 given; allowed: 16, 8, 4."),
        (["worker", "--model", "m=/x", "--name", "\udcff"], "name: '\\udcff' given; allowed: 1 to 128 letters"),
        (["worker", "--model", "m=/x", "--name", "a@b"], "name: 'a@b' given"),
        (["nope"], "No such command 'nope'"),
        (["generate"], "Missing argument"),
        (["generate", "x", "--max-tokens", "many"], "Invalid value for '--max-tokens'"),
    ],
)
def test_wrong_usage_ends_with_2(command: Callable[..., tuple[int, str]], words: list[str], said: str) -> None:
    code, shown = command(*words)
    assert code == 2
    assert said in shown


def test_a_misspelt_setting_is_named_by_every_command(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_MODLES", "x")
    code, said = command("status")
    assert (code, said.count("\n")) == (2, 1)
    assert "did you mean STOKER_MODELS" in said


@pytest.mark.parametrize("home", ["/proc/none", "a file", "~nosuchuser/x"])
def test_a_home_that_cannot_be_is_one_line(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("STOKER_HOME", home if home[0] in "/~" else str(tmp_path / home))
    monkeypatch.delenv("STOKER_URL", raising=False)
    code, said = command("up", "--no-flower")
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("stoker: STOKER_HOME: ")


def test_a_report_that_cannot_be_written_is_said_before_the_kernels_are_checked(
    command: Callable[..., tuple[int, str]],
) -> None:
    assert command("kernels", "check", "--report", "/proc/none/x.json") == (
        1,
        "stoker: /proc/none/x.json: No such file or directory.\n",
    )


def test_doctor_names_what_is_missing_and_fails() -> None:
    code = "from stoker.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json", "--url", NOWHERE], capture_output=True, text=True
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 1
    assert not checks["broker"]["ok"]
    assert checks["python"]["ok"]

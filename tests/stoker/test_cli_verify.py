"""`stoker verify` on the client in memory: each check fails for what it is about, alone, and the report has it all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stoker import GenerateJob
from stoker.cli import app, verification, verify
from stoker.cli.verification import ROWS, TOKENS, Golden, Tour
from stoker.contract import GenerateRequest, StreamToken
from stoker.errors import ModelError, OutOfMemory
from stoker.local.checks import Check
from stoker.testing import FakeClient
from tests.goldens import verification as goldens
from tests.stoker.test_cli_demo import WORKER

GOLDEN = Golden.read()
Answer = Callable[[GenerateRequest], Any]


def tokens(ids: Sequence[int]) -> list[StreamToken]:
    return [
        StreamToken(index=index, token_id=each, text=f" {each}", logit=0.0, logprob=-1.0, probability=0.4)
        for index, each in enumerate(ids)
    ]


def as_torch(request: GenerateRequest) -> list[StreamToken]:
    right = dict(GOLDEN.prompts)[tuple(request.prompt_ids or ())]
    return tokens(list(right[: request.max_tokens]) + [1] * (request.max_tokens - len(right)))


def by_seed(request: GenerateRequest) -> str:
    return f"text {request.seed}"


def by_adapter(request: GenerateRequest) -> str:
    return f"as {request.adapter}"


def wrong(request: GenerateRequest) -> list[StreamToken]:
    return tokens([request.max_tokens] * request.max_tokens)


class Answers:
    """What a machine that is right says, in the order in which the tour asks."""

    def __init__(self) -> None:
        self.embed: Any = lambda request: np.array(GOLDEN.vectors, np.float32)[: len(request.texts)]
        self.goldens: Answer = as_torch
        self.stream: Answer = as_torch
        self.seeds: Answer = by_seed
        self.rows: Answer = as_torch
        self.pattern = " 1984"
        self.hangs = True
        self.losses = [3.0, 2.0]
        self.adapter: Answer = by_adapter

    def script(self, client: FakeClient) -> None:
        client.script.embed(self.embed, times=1)
        client.script.generate(self.goldens, times=len(GOLDEN.prompts))
        client.script.generate(self.stream, times=2)
        client.script.generate(self.seeds, times=3)
        client.script.generate(self.rows, times=ROWS)
        client.script.generate(self.pattern)
        client.script.generate(tokens([5]), hangs=self.hangs)
        client.script.train(self.losses)
        client.script.generate(self.adapter, times=3)


def toured(answers: Answers) -> tuple[list[Check], Tour]:
    with closing(FakeClient()) as client:
        answers.script(client)
        tour = Tour(client, GOLDEN)
        return list(tour.checks()), tour


def failing(answers: Answers) -> list[str]:
    return [check.name for check in toured(answers)[0] if not check.ok]


def test_a_machine_that_is_right_passes_and_is_timed() -> None:
    checks, tour = toured(Answers())
    assert [check.detail for check in checks if not check.ok] == []
    assert [rate.name for rate in tour.rates] == [
        "embed, 256 short texts",
        "first token of a stream",
        "generate, 1 stream",
        f"generate, {ROWS} streams",
        "train",
    ]
    assert all(rate.value > 0 for rate in tour.rates)


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("embed", "embed", lambda request: np.eye(len(request.texts), 384, dtype=np.float32)),
        ("embed", "embed", lambda request: np.array([*GOLDEN.vectors[:-1], GOLDEN.vectors[0]], np.float32)),
        ("generate", "goldens", wrong),
        ("stream", "stream", lambda request: as_torch(request)[:-1]),
        ("seeds", "seeds", lambda request: "always this"),
        ("rows", "rows", wrong),
        ("pattern", "pattern", " soon"),
        ("train", "losses", [2.0, 2.0]),
        ("adapter", "adapter", lambda request: "the same"),
    ],
)
def test_what_is_wrong_is_named_alone(name: str, part: str, said: Any) -> None:
    answers = Answers()
    setattr(answers, part, said)
    assert failing(answers) == [name]


def test_a_stream_that_outlives_its_cancel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerateJob, "cancel", lambda _: None)
    answers = Answers()
    answers.hangs = False
    assert failing(answers) == ["cancel"]


def test_what_cannot_be_compared_is_named_and_hides_no_other_check() -> None:
    answers = Answers()
    answers.embed = lambda request: np.ones((len(request.texts), 7), np.float32)
    assert failing(answers) == ["embed"]


def test_two_texts_of_one_seed_are_named() -> None:
    answers, numbers = Answers(), iter(range(9))
    answers.seeds = lambda request: f"text {next(numbers)}"
    assert failing(answers) == ["seeds"]


def test_a_base_that_an_adapter_changed_is_named() -> None:
    answers, numbers = Answers(), iter(range(9))
    answers.adapter = lambda request: f"text {next(numbers)}"
    assert failing(answers) == ["adapter"]


def test_a_job_that_fails_is_named_with_its_error_and_hides_no_other_check() -> None:
    with closing(FakeClient()) as client:
        Answers().script(client)
        client.script.refuse(OutOfMemory("no room"))
        checks = list(Tour(client, GOLDEN).checks())
    # The answer that was for the job which was refused is taken by the next of its kind.
    assert checks[0].detail == "OutOfMemory: no room"
    assert [check.name for check in checks if not check.ok] == ["embed"]


@pytest.fixture
def device() -> str:
    return "cpu"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, device: str) -> list[Check]:
    """The checks of a machine, and a worker with the demo's models on it."""
    checks = [Check("python", True, "3.11")]

    @contextmanager
    def worker(url: str | None, *, exact: bool) -> Iterator[tuple[FakeClient, Any]]:
        with closing(FakeClient()) as client:
            Answers().script(client)
            yield client, WORKER.model_copy(update={"device": device})

    monkeypatch.setattr(verify, "machine_checks", lambda url: checks)
    monkeypatch.setattr(verify, "demo_worker", worker)
    return checks


def verified(tmp_path: Path, *words: str) -> tuple[int, str, dict[str, Any]]:
    report = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["verify", "--report", str(report), *words])
    return done.exit_code, done.stdout, json.loads(report.read_text("utf-8"))


@pytest.mark.usefixtures("machine")
def test_the_report_says_what_the_terminal_does_and_which_versions_ran(tmp_path: Path) -> None:
    code, said, report = verified(tmp_path)
    assert code == 0, said
    assert "10 of 10 hold" in said
    assert [check["name"] for check in report["checks"]][:3] == ["python", "embed", "generate"]
    assert report["device"] == "cpu"
    assert report["versions"]["mlx"] != "missing"
    assert len(report["rates"]) == 5
    assert report["kernels"] == {}, "there is no GPU"


@pytest.mark.usefixtures("machine")
def test_a_worker_that_does_not_come_up_is_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(url: str | None, *, exact: bool) -> Any:
        raise ModelError("no kernel for this device")

    monkeypatch.setattr(verify, "demo_worker", none)
    code, said, report = verified(tmp_path)
    assert code == 1
    assert report["checks"][-1]["detail"] == "ModelError: no kernel for this device"
    assert "1 of 2 hold" in said


def test_nothing_is_tried_on_a_machine_that_lacks_something(machine: list[Check], tmp_path: Path) -> None:
    machine.append(Check("mlx", False, "missing", "make venv"))
    code, said, report = verified(tmp_path)
    assert code == 1
    assert "→ make venv" in said
    assert [check["name"] for check in report["checks"]] == ["python", "mlx"]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("device", ["Apple M2"])
def test_kernels_of_a_gpu_are_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"kernel": "attend", "dtype": "float16", "passed": False},
        {"kernel": "sample", "dtype": "float32", "passed": True},
    ]
    monkeypatch.setattr(verify, "kernels_report", lambda: {"backend": "metal", "checked": rows})
    code, said, report = verified(tmp_path)
    assert (code, report["kernels"]["checked"]) == (1, rows)
    assert "2 kernels and dtypes on metal; wrong: attend float16" in said
    assert "STOKER_KERNELS=off" in said


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("device", ["Apple M2"])
def test_kernels_of_a_gpu_are_left_out_if_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def report() -> Any:
        asked.append(1)
        return {"backend": "metal", "checked": []}

    monkeypatch.setattr(verify, "kernels_report", report)
    code, said, written = verified(tmp_path, "--no-kernels")
    assert (code, written["kernels"], written["device"], asked) == (0, {}, "Apple M2", [])
    assert "10 of 10 hold" in said
    assert verified(tmp_path, "--kernels")[2]["kernels"] == {"backend": "metal", "checked": []}


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ("import time; time.sleep(60)", {"error": "not done after 0 s"}),
        ("import sys; sys.exit('no GPU')", {"error": "exit code 1: no GPU"}),
    ],
)
def test_kernels_whose_check_does_not_end_or_fails_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: str, found: dict[str, str]
) -> None:
    """A program in the place of Python."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{made}\n")
    program.chmod(0o700)
    monkeypatch.setattr(verify, "KERNELS_WITHIN", 0.3)
    if "exit" in made:
        monkeypatch.setattr(verify, "KERNELS_WITHIN", 60)
    monkeypatch.setattr(verify.sys, "executable", str(program))  # type: ignore[attr-defined]
    assert verify.kernels_report() == found


def test_kernels_that_cannot_be_checked_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")  # type: ignore[attr-defined]
    assert verify.kernels_report() == {"error": "exit code 1: "}


def test_the_goldens_are_those_of_torch() -> None:
    assert goldens.FILE.read_text("utf-8") == goldens.text(), "python -m tests.goldens.verification"
    assert sum(len(right) for _, right in GOLDEN.prompts) > TOKENS
    assert verification.CLOSE < 1


@pytest.mark.slow
@pytest.mark.integration
def test_this_machine_is_right(tmp_path: Path) -> None:
    code, said, report = verified(tmp_path)
    assert code == 0, said
    assert {check["name"] for check in report["checks"]} > {"embed", "adapter"}

"""Commands about this machine: what a worker's process becomes, what is shown of workers and the disk."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stoker.cli import app, machine
from stoker.contract import Presence
from stoker.errors import BrokerUnavailable, ConfigError
from stoker.local import naming, stack
from stoker.settings import load_settings, settings_of
from tests.stoker.test_cli import WORKER, FakeClient, asked, run
from tests.stoker.test_housekeeping import invoke

__all__ = ["asked"]

MODEL = Path(__file__).parents[1] / "goldens" / "architectures" / "bert"


class Became(Exception):
    """In the place of the program that the process becomes."""


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of the program that the process becomes, which is none. The broker is not looked for."""

    def execv(program: str, words: list[str]) -> None:
        raise Became(program, words)

    environment = os.environ.copy()
    # What the command adds goes with the test.
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(stack, "wait_for_broker", lambda settings, report: None)
    monkeypatch.setattr(machine, "hold_back", lambda: None)
    return environment


def test_a_worker_keeps_its_names_lock_and_its_settings_in_the_program_that_it_becomes(
    becomes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take = [], naming.take_name

    def taking(settings: Any) -> Any:
        taken.append(take(settings))
        return taken[0]

    monkeypatch.setattr(naming, "take_name", taking)
    words = ["worker", "--model", f"own={MODEL}", "--url", "redis://b.example/2"]
    with pytest.raises(Became) as became:
        CliRunner().invoke(app, words, catch_exceptions=False)
    ((name, lock),) = taken
    assert f"--hostname={name}" in became.value.args[1]
    assert os.get_inheritable(lock.fileno())
    lock.close()
    settings = settings_of({key: value for key, value in becomes.items() if key.startswith("STOKER_")})
    assert (settings.models, settings.url) == ((f"own={MODEL}",), "redis://b.example:6379/2")


@pytest.mark.parametrize("words", [["up", "--no-flower"], ["worker", "--name", "mine"]])
def test_a_model_that_there_is_not_is_said_before_anything_is_made(words: list[str], becomes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="model 'nope' given"):
        CliRunner().invoke(app, [*words, "--model", "nope"], catch_exceptions=False)
    assert not load_settings().home.exists()


def test_status_waits_for_a_worker_for_as_long_as_it_is_asked_to(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, pauses = iter([(), (), (WORKER,)]), list[float]()
    monkeypatch.setattr(FakeClient, "workers", lambda _: next(answers))
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert "w@here" in run("status", "--wait", "60")
    assert len(pauses) == 2


def test_status_waits_for_a_broker_too_which_may_just_be_starting(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    away, made = [BrokerUnavailable("no broker was chosen"), BrokerUnavailable("no answer")], FakeClient()

    def connected(url: str | None) -> FakeClient:
        if away:
            raise away.pop(0)
        return made

    monkeypatch.setattr(machine, "connect", connected)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert "w@here" in run("status", "--wait", "60")
    away.append(BrokerUnavailable("no answer"))
    with pytest.raises(BrokerUnavailable, match="no answer"):
        run("status")


def test_a_worker_is_up_since_its_start(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeClient, "alive", (WORKER.model_copy(update={"started": 1000.0, "time": 1061.0}),))
    assert "process 5, up 61 s, 1 MB" in run("status")


def test_status_asks_once_unless_it_is_to_wait(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def workers(_: FakeClient) -> tuple[Presence, ...]:
        looks.append(1)
        return ()

    monkeypatch.setattr(FakeClient, "workers", workers)
    assert CliRunner().invoke(app, ["status"]).exception is not None
    assert looks == [1]


def test_the_monitor_is_given_its_names_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("stoker.monitor.command.serve", lambda *arguments: given.append(arguments))
    run("flower", "--host", "Mac.Local", "--host", "other", "--port", "1", "--address", "::1", "--url", "redis://b/0")
    ((_, address, port, names, _),) = given
    assert (address, port, names) == ("::1", 1, frozenset({"mac.local", "other"}))


@pytest.mark.parametrize(
    ("options", "flags"),
    [([], []), (["--hard", "--no-timings", "--kernel", "a"], ["--kernel", "a", "--no-timings", "--hard"])],
)
def test_the_check_of_kernels_is_asked_as_it_was_typed(
    options: list[str], flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    called: list[list[str]] = []
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def call(words: list[str]) -> int:
        called.append(words)
        return 0

    monkeypatch.setattr(subprocess, "call", call)
    report = tmp_path / "report.json"
    assert CliRunner().invoke(app, ["kernels", "check", "--report", str(report), *options]).exit_code == 0
    assert called[0][2:] == ["kernels.check", "--report", str(report), *flags]


def test_the_disks_last_line_is_the_sum_of_all_parts() -> None:
    home = load_settings().home
    for name in ("runs", "logs"):
        (home / name).mkdir(parents=True)
        (home / name / "file").write_bytes(os.urandom(3 << 20))
    assert re.search(rf"\b6\.[0-9] MB  in {re.escape(str(home))}", invoke("status", "--disk"))


def test_the_own_file_of_a_worker_wins_over_the_shell_and_options_over_both(
    becomes: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOKER_MODELS", "nope")
    monkeypatch.setenv("STOKER_URL", "redis://shell.example/1")
    file = tmp_path / "worker.env"
    file.write_text(f"STOKER_MODELS=own={MODEL}\nSTOKER_URL=redis://file.example/3\n")
    file.chmod(0o600)
    with pytest.raises(Became):
        CliRunner().invoke(app, ["worker", "--name", "mine", "--env-file", str(file)], catch_exceptions=False)
    assert (becomes["STOKER_MODELS"], becomes["STOKER_URL"]) == (f"own={MODEL}", "redis://file.example:6379/3")

"""How the process of the monitor ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stoker.errors import ConfigError
from stoker.logs import setup as logs
from stoker.monitor import access, command, transport
from stoker.monitor.app import COLUMNS, GONE, TASKS
from stoker.settings import Settings

#: A monitor whose loop ends as `start` says, next to a thread of Flower's that waits for ever.
CHILD = """
import threading
from types import SimpleNamespace

from stoker.monitor import command

command.LEAVE_LIMIT = 0.1
threading.Thread(target=threading.Event().wait).start()


def start():
    {start}


loop = SimpleNamespace(run_sync=lambda leave, timeout: None, asyncio_loop=SimpleNamespace(
    add_signal_handler=lambda number, stop: None), stop=None)
command.run(SimpleNamespace(io_loop=loop, start=start, leave=None, stop=lambda: None))
"""


@pytest.mark.parametrize(
    ("start", "code"), [("pass", 0), ("raise RuntimeError('a defect')", 1)], ids=["asked", "defect"]
)
def test_a_monitor_with_a_thread_that_hangs_ends_and_says_whether_it_was_an_error(start: str, code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format(start=start)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr


def test_flowers_own_pages_are_told_the_address_and_ask_for_the_same_password(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SimpleNamespace()
    monkeypatch.setattr(command, "options", options)
    command.configure("::1", 5, "secret")
    assert (options.address, options.port, options.basic_auth) == ("::1", 5, ["stoker:secret"])
    assert (options.max_tasks, options.purge_offline_workers, options.tasks_columns) == (TASKS, GONE, COLUMNS)


class Loop:
    """Of tornado: what is handled, and what is run before the end."""

    def __init__(self, left: Exception | None = None) -> None:
        self.handled: list[int] = []
        self.asyncio_loop, self._left, self.limits = self, left, list[float]()

    def add_signal_handler(self, number: int, stop: object) -> None:
        self.handled.append(number)

    def stop(self) -> None: ...

    def run_sync(self, leave: object, timeout: float) -> None:
        self.limits.append(timeout)
        if self._left is not None:
            raise self._left


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """What the process would end within, and with which code."""
    found: list[tuple[float, int]] = []
    monkeypatch.setattr(command, "end_within", lambda seconds, code: found.append((seconds, code)))
    return found


def monitor_of(loop: Loop, start: Callable[[], object] = lambda: None) -> Any:
    made = SimpleNamespace(io_loop=loop, start=start, leave=None, stopped=0)

    def stop() -> None:
        made.stopped += 1

    made.stop = stop
    return made


def test_a_monitor_that_is_asked_to_end_lets_go_of_the_broker_and_writes_its_history(
    ends: list[tuple[float, int]], caplog: pytest.LogCaptureFixture
) -> None:
    for loop in (Loop(), Loop(TimeoutError())):
        monitor = monitor_of(loop)
        command.run(monitor)
        assert loop.limits == [command.LEAVE_LIMIT]
        assert monitor.stopped == 1
    assert ends == [(command.LEAVE_LIMIT, 0)] * 2
    assert len([record for record in caplog.records if "did not let go" in record.getMessage()]) == 1


def test_a_monitor_that_breaks_writes_its_history_and_says_that_it_was_an_error(ends: list[tuple[float, int]]) -> None:
    def broken() -> None:
        raise RuntimeError("a defect")

    monitor = monitor_of(Loop(), broken)
    with pytest.raises(RuntimeError):
        command.run(monitor)
    assert (monitor.stopped, ends) == (1, [(command.LEAVE_LIMIT, 1)])


def test_a_signal_that_is_ignored_on_purpose_stays_ignored(
    ends: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN if number == signal.SIGHUP else None)
    loop = Loop()
    command.run(monitor_of(loop))
    assert loop.handled == [signal.SIGTERM, signal.SIGINT]


def test_a_limit_on_the_end_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            made.append(self)

    monkeypatch.setattr(threading, "Timer", Timer)
    command.end_within(3.0, 7)
    assert (made[0].interval, made[0].args, made[0].daemon) == (3.0, (7,), True)


class Serving:
    """`stoker flower` without a server: what each monitor was made with, and what was said."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.settings, self.said, self.made = settings, list[str](), list[dict[str, Any]]()
        self.redacted: list[Any] = []
        self.installed, self.umask = 0, 0
        self.error: OSError | None = None
        self.during: Callable[[], object] = lambda: None
        monkeypatch.setattr(command, "Monitor", self._monitor)
        monkeypatch.setattr(command, "run", lambda monitor: self.during())
        monkeypatch.setattr(command, "quiet", lambda: None)
        monkeypatch.setattr(logs, "configure", lambda settings, secrets: self.redacted.extend(secrets))
        monkeypatch.setattr("stoker.monitor.command.options", SimpleNamespace())
        monkeypatch.setattr("stoker.monitor.command.IOLoop", SimpleNamespace(current=lambda: None))
        monkeypatch.setattr(transport, "install", self._install)

    def _install(self) -> None:
        self.installed += 1

    def _monitor(self, settings: Settings, gate: Any, loop: object, **history: Any) -> Any:
        self.umask = os.umask(0o022)
        os.umask(self.umask)
        self.made.append(history)

        def listen() -> int:
            if self.error is not None:
                raise self.error
            return 5555

        return SimpleNamespace(start_http_server=listen)

    def serve(self, address: str = "127.0.0.1") -> None:
        before = os.umask(0o022)
        try:
            command.serve(self.settings, address, 0, frozenset(), self.said.append)
        finally:
            os.umask(before)


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    return Serving(Settings(home=tmp_path, url="redis://:secret@127.0.0.1:6379/0"), monkeypatch)


def test_of_two_monitors_of_one_home_the_first_keeps_the_history(serving: Serving) -> None:
    serving.during = lambda: serving.serve() if len(serving.made) == 1 else None
    serving.serve()
    kept, other = serving.made
    assert (kept["persistent"], kept["state_save_interval"]) == (True, command.SAVE_EVERY)
    assert (other["persistent"], other["state_save_interval"]) == (False, 0)
    assert len([line for line in serving.said if "kept by another" in line]) == 1
    serving.serve()
    assert serving.made[2]["persistent"], "the lock goes with its holder"


def test_a_monitor_watches_alone_and_shows_no_secret_nor_leaves_one_open(serving: Serving) -> None:
    home = access.folder(serving.settings)
    old = home / "history.db"
    old.write_text("x")
    old.chmod(0o644)
    serving.serve()
    assert serving.installed == 1
    assert serving.redacted == [access.password(serving.settings)]
    assert serving.umask == 0o077
    assert old.stat().st_mode & 0o777 == 0o600
    assert "secret" not in "".join(serving.said)


@pytest.mark.parametrize(
    ("address", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("mac", "mac")]
)
def test_where_it_is_can_be_opened_as_it_is_said(serving: Serving, address: str, shown: str) -> None:
    serving.serve(address)
    assert serving.said[0].startswith(f"flower  http://{shown}:5555  (user stoker, password in ")


def test_a_port_that_is_taken_is_one_clear_error(serving: Serving) -> None:
    serving.error = OSError(98, "Address already in use")
    with pytest.raises(ConfigError, match=r"--address 127.0.0.1 --port 0: cannot be listened on \(Address"):
        serving.serve()

"""A worker's own threads: what they meet ends a round of theirs, and what ends them ends the worker."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from tests.conftest import wait_until
from workers.ending import EXIT_CODE
from workers.services import background
from workers.services.background import PAUSE, SAY_EVERY, Background

WRONG_TYPE = ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")


@pytest.fixture
def stopped() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def failing(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


ERRORS = [RedisConnectionError("gone"), WRONG_TYPE, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), KeyError("x")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_round_that_fails_costs_neither_the_next_one_nor_its_neighbours(
    stopped: threading.Event, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PAUSE", 0.0)
    done: list[int] = []
    failures: list[int] = []
    thread = Background(
        "x",
        failing(error),
        lambda: done.append(1),
        stopped=stopped,
        failed=lambda: failures.append(1),
        end=lambda: None,
    )
    thread.start()
    wait_until(lambda: len(done) >= 3 and len(failures) >= 3, "three rounds")
    assert thread.alive


class Waits(threading.Event):
    """Notes how long is waited for it instead of waiting, and is set at the third time."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout)
        if len(self.seconds) == 3:
            self.set()
        return self.is_set()


@pytest.mark.parametrize(
    ("every", "waited"), [(0.0, [PAUSE, 0.0, PAUSE]), (PAUSE / 4, [PAUSE, PAUSE / 4, PAUSE]), (3600.0, [3600.0] * 3)]
)
def test_a_round_that_fails_is_not_tried_again_at_once_however_soon_the_next_would_come(
    every: float, waited: list[float]
) -> None:
    """A broker that answers and takes no writes refuses each of them at once."""
    outcomes = iter([ResponseError("MISCONF disk"), None, ResponseError("NOREPLICAS")])
    waits, good = Waits(), []

    def work() -> None:
        error = next(outcomes)
        if error is not None:
            raise error

    thread = Background("x", work, lambda: good.append(1), stopped=waits, every=every, end=lambda: None)
    thread.start()
    thread.join(30)
    assert waits.seconds == waited
    assert len(good) == 3, "the round behind one that failed has its turn"


def test_it_stops_when_it_is_asked_to(stopped: threading.Event) -> None:
    ended: list[int] = []
    thread = Background("x", lambda: None, stopped=stopped, every=3600, end=lambda: ended.append(1))
    thread.start()
    stopped.set()
    thread.join(30)
    assert not thread.alive
    assert not ended


def test_what_ends_the_thread_is_logged_with_its_name_and_ends_the_worker(
    stopped: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    Background("presence", failing(SystemExit(1)), stopped=stopped, end=ended.set).start()
    assert ended.wait(30)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "'presence' has ended" in line
    assert f"exit code {EXIT_CODE}" in line


def test_the_worker_ends_with_the_code_that_the_log_names() -> None:
    code = (
        "import threading, time; from workers.services.background import Background\n"
        "def work(): raise SystemExit(3)\n"
        "Background('x', work, stopped=threading.Event()).start(); time.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode
    # Other than that of a worker which was stopped: only then does a supervisor start another.
    assert ended == EXIT_CODE == 70


def test_the_same_trouble_is_logged_once_and_then_now_and_then(
    stopped: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    thread = Background("x", failing(WRONG_TYPE), stopped=stopped)
    for _ in range(SAY_EVERY):
        thread.turn()
    assert len(caplog.records) == 1
    thread.turn()
    assert len(caplog.records) == 2


def test_a_trouble_that_comes_again_after_a_good_round_is_logged_again(
    stopped: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: Iterator[Exception | None] = iter([WRONG_TYPE, None, WRONG_TYPE])

    def work() -> None:
        error = next(outcomes)
        if error is not None:
            raise error

    thread = Background("x", work, stopped=stopped)
    for _ in range(3):
        thread.turn()
    assert len(caplog.records) == 2


def test_a_thread_holds_up_no_process_that_ends() -> None:
    stopped = threading.Event()
    Background("it waits", stopped.wait, stopped=stopped).start()
    (thread,) = [each for each in threading.enumerate() if each.name == "it waits"]
    stopped.set()
    assert thread.daemon


def test_what_the_broker_refuses_is_said_in_its_words_and_a_defect_with_its_place(
    stopped: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (WRONG_TYPE, KeyError("x")):
        Background("x", failing(error), stopped=stopped).turn()
    refused, defect = caplog.records
    assert "WRONGTYPE" in refused.getMessage()
    assert refused.exc_info is None
    assert defect.exc_info is not None


def test_each_round_has_troubles_of_its_own(stopped: threading.Event, caplog: pytest.LogCaptureFixture) -> None:
    thread = Background("x", failing(KeyError("a")), failing(KeyError("b")), stopped=stopped)
    for _ in range(3):
        thread.turn()
    assert len(caplog.records) == 2


def test_a_thread_that_never_began_is_not_waited_for() -> None:
    Background("x", lambda: None, stopped=threading.Event()).join(30.0)


def test_a_process_that_ends_itself_has_written_its_log(tmp_path: Path) -> None:
    code = (
        "import logging, logging.handlers, sys\n"
        "from workers.ending import end_process\n"
        "held = logging.handlers.MemoryHandler(9, logging.CRITICAL + 1, logging.FileHandler(sys.argv[1]))\n"
        "logging.getLogger().addHandler(held)\n"
        "logging.error('the last words')\n"
        "end_process()"
    )
    log = tmp_path / "log"
    assert subprocess.run([sys.executable, "-c", code, str(log)], timeout=60, check=False).returncode == 70
    assert log.read_text() == "the last words\n"

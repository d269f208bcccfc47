"""The signals of a worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from celery.platforms import EX_FAILURE
from celery.worker import state

from workers.celery.interrupts import Interrupts

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    stop = state.should_stop
    yield
    state.should_stop = stop
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("nohup", [False, True])
def test_behind_the_start_a_closed_terminal_drains_the_worker_unless_it_is_ignored(nohup: bool) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    heard: list[int] = []
    interrupts = Interrupts()
    # As Celery installs them: at SIGHUP it would try to start anew.
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: heard.append(number))
    signal.signal(signal.SIGHUP, lambda *_: pytest.fail("Celery's restart"))
    with interrupts.starting():
        pass
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ([signal.SIGTERM] if nohup else [signal.SIGHUP, signal.SIGTERM])


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_ends_a_worker_with_130() -> None:
    def celerys(*_: object) -> None:
        state.should_stop = EX_FAILURE

    signal.signal(signal.SIGINT, celerys)
    with Interrupts().starting():
        pass
    os.kill(os.getpid(), signal.SIGINT)
    assert state.should_stop == 130


@pytest.mark.parametrize("number", NUMBERS)
def test_a_start_that_is_broken_off_ends_at_once_with_130(number: signal.Signals) -> None:
    code = (
        "import os, signal, time; from workers.celery.interrupts import Interrupts\n"
        f"with Interrupts().starting(): os.kill(os.getpid(), {int(number)}); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")

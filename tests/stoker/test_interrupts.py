"""What asks a process to end: held back until there is something to call, then with one exit code."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

ASK = """
import os, signal
from stoker.local import interrupts
number = signal.Signals({number})
{before}
print("asked", flush=True)
os.kill(os.getpid(), number)
{after}
print("alive", flush=True)
"""
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def asked(number: signal.Signals, before: str, after: str = "") -> tuple[int, str]:
    """A process that is asked to end behind `before`: its exit code, and what it said."""
    code = ASK.format(number=int(number), before=before, after=after)
    plain = "import signal\nfor each in (1, 2, 15): signal.signal(each, signal.SIG_DFL)\n"
    done = subprocess.run([sys.executable, "-c", plain + code], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("number", NUMBERS)
def test_a_process_that_has_begun_nothing_ends_at_once_also_if_it_was_asked_before(number: signal.Signals) -> None:
    assert asked(number, "interrupts.end_at_once()") == (130, "asked\n")
    assert asked(number, "interrupts.hold_back()", "interrupts.end_at_once()") == (130, "asked\n")
    held = asked(number, "interrupts.hold_back()", "assert number in signal.sigpending()")
    assert held == (0, "asked\nalive\n"), "until then it waits"


def test_each_signal_ends_a_process_as_ctrl_c_does_except_one_that_is_ignored_on_purpose() -> None:
    catch = "try:\n    os.kill(os.getpid(), {0})\nexcept KeyboardInterrupt:\n    print('ended', flush=True)\n"
    rest = "".join(catch.format(int(other)) for other in (signal.SIGINT, signal.SIGTERM))
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\ninterrupts.end_cleanly()"
    assert asked(signal.SIGHUP, before, rest) == (0, "asked\nended\nended\nalive\n")

"""A process with limits: its answers are its caller's, it is no other process's, and one that hangs is left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from engine.platform import limited
from engine.platform.limited import LimitedProcess, LimitPassed
from stoker.errors import ModelError

Clock = Literal["passing", "computing"]

PROGRAM = """
import os, time

def answer(request):
    time.sleep(request.get("sleeps", 0))
    return {"pid": str(os.getpid()), "said": request["say"]}
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[LimitedProcess]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    made = LimitedProcess(program, "answers", "computing")
    yield made
    made.end()


def test_calls_are_answered_by_one_process_until_it_is_ended(process: LimitedProcess) -> None:
    answers = [process.ask({"say": word}, 5.0) for word in ("one", "two")]
    assert [answer["said"] for answer in answers] == ["one", "two"]
    process.end()
    again = process.ask({"say": "three"}, 5.0)
    assert answers[0]["pid"] == answers[1]["pid"] != again["pid"]


FORKS = """
import os, sys
from pathlib import Path
from engine.platform.limited import LimitedProcess

process = LimitedProcess(Path(sys.argv[1]), "answers", "computing")
before = process.ask({"say": "one"}, 5.0)["pid"]
if os.fork() == 0:
    process.end()  # its owner's is none of its own
    own = process.ask({"say": "child"}, 5.0)
    process.end()
    os._exit(own["said"] != "child" or own["pid"] == before)
_, status = os.wait()
assert process.ask({"say": "two"}, 5.0) == {"pid": before, "said": "two"}
process.end()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_process_that_was_forked_from_its_owner_starts_one_of_its_own(tmp_path: Path) -> None:
    """Two that share its pipes would read each other's answers."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    subprocess.run([sys.executable, "-c", FORKS, str(program)], check=True, timeout=60)


def test_a_program_that_hangs_without_computing_is_left_and_its_answer_is_nobodys(
    process: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = process.ask({"say": "one"}, 5.0)["pid"]
    with monkeypatch.context() as patch:
        patch.setattr(limited, "START_PATIENCE", 0.1)
        with pytest.raises(LimitPassed):
            process.ask({"say": "late", "sleeps": 2}, 0.1)
    after = process.ask({"say": "two"}, 5.0)
    assert (after["said"], after["pid"] != before) == ("two", True)


def running(folder: Path, answer: str, clock: Clock = "passing") -> LimitedProcess:
    """One whose program has `answer` as the body of its function."""
    program = folder / "program.py"
    program.write_text(f"import time\n\ndef answer(request):\n    {answer}\n")
    return LimitedProcess(program, "tries things", clock)


@pytest.mark.parametrize(("clock", "wait"), [("passing", "time.sleep(0.01)"), ("computing", "pass")])
def test_a_program_that_takes_too_long_is_ended_and_the_next_call_has_another(
    tmp_path: Path, clock: Clock, wait: str
) -> None:
    asked = running(tmp_path, f'while request["endless"]: {wait}\n    return {{"said": "yes"}}', clock)
    with pytest.raises(LimitPassed):
        asked.ask({"endless": True}, 0.2)
    assert asked.ask({"endless": False}, 5.0) == {"said": "yes"}
    asked.end()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit of a process's memory")
def test_a_program_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    with pytest.raises(LimitPassed):
        # Nothing is written there, so without the limit it is had at once.
        running(tmp_path, 'import mmap; return {"size": str(len(mmap.mmap(-1, 2 << 30)))}').ask({}, 10.0)


def test_a_program_that_does_not_start_is_named(tmp_path: Path) -> None:
    program = tmp_path / "broken.py"
    program.write_text("answer = nothing\n")
    with pytest.raises(ModelError, match=r"broken\.py, which tries things, does not start"):
        LimitedProcess(program, "tries things", "passing").ask({}, 5.0)

"""A guarded command never outlives the process that asked for it, and its log never fills the disk. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.local import guard, process
from stoker.local.process import Process
from tests.conftest import alive, wait_until

#: Writes its id into the file it is given, and sleeps; with `stubborn` it does not mind SIGTERM.
SLEEPER = """
import os, signal, sys, time
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
temporary = sys.argv[1] + ".new"
with open(temporary, "w") as file: file.write(str(os.getpid()))
os.rename(temporary, sys.argv[1])
time.sleep(600)
"""

#: Starts a sleeper under a guard, and sleeps too.
ASKER = f"""
import sys, time
from pathlib import Path
from stoker.local.process import Process
folder = Path(sys.argv[1])
command = [sys.executable, "-c", {SLEEPER!r}, str(folder / "pid"), *sys.argv[2:]]
Process("sleeper", command, log=folder / "log", env={{}}, grace=0.3)
time.sleep(600)
"""


def pid_in(path: Path) -> int:
    wait_until(path.exists, f"{path.name} is written")
    return int(path.read_text())


@pytest.mark.parametrize("manner", ["obedient", "stubborn"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guarded_command_ends_with_the_process_that_asked_for_it(
    tmp_path: Path, number: signal.Signals, manner: str
) -> None:
    asker = subprocess.Popen([sys.executable, "-c", ASKER, str(tmp_path), manner])
    try:
        sleeper = pid_in(tmp_path / "pid")
        assert alive(sleeper)
        asker.send_signal(number)
        wait_until(lambda: not alive(sleeper), "the sleeper has ended")
    finally:
        asker.kill()
        asker.wait()


def start(tmp_path: Path, *command: str, grace: float = 5.0) -> Process:
    return Process("child", [sys.executable, "-c", *command], log=tmp_path / "logs/child.log", env={}, grace=grace)


def test_stop_asks_first_and_waits(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(60)"
    )
    child = start(tmp_path, program)
    wait_until(lambda: "up" in child.output(), "the child is up")
    assert child.returncode is None
    assert [child.stop(), child.returncode, child.stop()] == [7, 7, 7]


def test_stop_ends_a_child_that_does_not_listen(tmp_path: Path) -> None:
    child = start(tmp_path, SLEEPER, str(tmp_path / "pid"), "stubborn", grace=0.2)
    pid = pid_in(tmp_path / "pid")
    assert child.stop() != 0
    assert not alive(pid)


def test_a_child_that_ends_by_itself_gives_its_exit_code_and_output(tmp_path: Path) -> None:
    child = start(tmp_path, "import os, sys; print('made'); sys.exit(int(os.environ['CODE']))")
    wait_until(lambda: child.returncode is not None, "the child has ended")
    assert child.stop() == 1
    assert "KeyError: 'CODE'" in child.output()
    printing = [sys.executable, "-c", "import os; print(os.environ['CODE'])"]
    again = Process("child", printing, log=child.log, env={"CODE": "5"}, grace=1)
    wait_until(lambda: again.returncode is not None, "the child has ended")
    assert again.output() == "5\n", "only what this process wrote"


def test_a_signal_to_the_guard_ends_its_command(tmp_path: Path) -> None:
    command = [sys.executable, str(guard.__file__), "5", sys.executable, "-c", SLEEPER, str(tmp_path / "pid")]
    guarding = subprocess.Popen(command, stdin=subprocess.PIPE)
    sleeper = pid_in(tmp_path / "pid")
    guarding.terminate()
    assert guarding.wait(30) != 0
    assert not alive(sleeper)
    assert guarding.stdin is not None
    guarding.stdin.close()


def test_a_large_log_is_put_aside_at_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG", 10)
    log = tmp_path / "logs/child.log"
    log.parent.mkdir()
    log.write_text("much too long")
    child = start(tmp_path, "print('new')")
    wait_until(lambda: child.returncode is not None, "the child has ended")
    assert log.read_text() == "new\n"
    assert log.with_name("child.log.1").read_text() == "much too long"


def test_the_guard_needs_only_the_standard_library() -> None:
    code = f"import runpy, sys; runpy.run_path({guard.__file__!r}); assert 'stoker' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})

"""A guarded command never outlives the process that asked for it, and its log never fills the disk. Real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.files.locks import try_lock
from stoker.local import guard
from stoker.local.process import LogSize, Process
from stoker.settings import Settings
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


def test_a_log_has_as_many_megabytes_and_files_as_the_settings_say() -> None:
    assert LogSize.of(Settings(log_size=5, log_files=2)) == LogSize(5 * 2**20, 2)
    assert LogSize.of(Settings()) == LogSize()


def test_the_beginning_of_a_line_is_in_the_log_before_its_end_comes(tmp_path: Path) -> None:
    child = start(tmp_path, "import sys, time; print('asks? ', end='', flush=True); time.sleep(60)", grace=0.2)
    wait_until(lambda: child.output() == "asks? ", "the question is there")
    child.stop()


def test_a_log_that_is_begun_is_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        log = guard.RotatingLog(str(tmp_path / "x.log"), 10, 2)
        log.write(b"one line\nanother\n")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"x.log": 0o600, "x.log.1": 0o600}


def test_what_a_child_is_given_wins_over_what_this_process_has_and_its_last_words_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODE", "of the shell")
    monkeypatch.setenv("OTHER", "kept")
    program = "import os; print(os.environ['CODE'], os.environ['OTHER'], end='')"
    child = Process("child", [sys.executable, "-c", program], log=tmp_path / "x.log", env={"CODE": "own"}, grace=1)
    wait_until(lambda: child.returncode is not None, "the child has ended")
    assert child.output() == "own kept", "a line without an end too"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_ends_its_command(number: signal.Signals, tmp_path: Path) -> None:
    limits = ["5", str(tmp_path / "log"), "1000", "1"]
    command = [sys.executable, str(guard.__file__), *limits, sys.executable, "-c", SLEEPER, str(tmp_path / "pid")]
    guarding = subprocess.Popen(command, stdin=subprocess.PIPE)
    sleeper = pid_in(tmp_path / "pid")
    guarding.send_signal(number)
    assert guarding.wait(30) != 0
    assert not alive(sleeper)
    assert guarding.stdin is not None
    guarding.stdin.close()


#: Writes numbered lines of many lengths, in pieces that end anywhere, to the file that standard output is.
WRITER = """
import os, sys
said = b"".join(b"%06d %s\\n" % (n, b"x" * (n * 37 % 200)) for n in range(int(sys.argv[1]), int(sys.argv[2])))
while said: said = said[os.write(1, said[: 1 + len(said) * 7919 % 5000]) :]
"""


def numbers(folder: Path) -> list[int]:
    """Of all lines of all files; a line that is not whole fails the test."""
    found = []
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            number, _, rest = line.partition(" ")
            assert rest == "x" * (int(number) * 37 % 200), f"{path.name}: a line that is not whole"
            found.append(int(number))
    return found


def test_a_log_that_is_full_is_put_aside_while_the_command_runs_and_no_line_is_lost(tmp_path: Path) -> None:
    writing = [sys.executable, "-c", WRITER, "0", "3000"]
    log = tmp_path / "logs/child.log"
    child = Process("child", writing, log=log, env={}, grace=1, size=LogSize(20_000, 100))
    wait_until(lambda: child.returncode is not None, "the child has ended")
    assert sorted(numbers(log.parent)) == list(range(3000))
    files = sorted(path.name for path in log.parent.iterdir())
    assert len(files) > 10
    assert all(path.stat().st_size <= 20_000 for path in log.parent.iterdir())
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in log.parent.iterdir())
    assert [int(line[:6]) for line in child.output().splitlines()] == list(range(3000)), "in order, over all files"


def test_output_begins_behind_an_earlier_process_and_goes_on_at_the_start_of_the_next_file(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    log.write_text("of an earlier one\n")
    printing = [sys.executable, "-c", "print('a' * 30, 'b' * 30, sep='\\n')"]
    child = Process("child", printing, log=log, env={}, grace=1, size=LogSize(50, 1))
    wait_until(lambda: child.returncode is not None, "the child has ended")
    assert log.read_text() == f"{'b' * 30}\n", "a file of its own"
    assert child.output() == f"{'a' * 30}\n{'b' * 30}\n"


def test_of_full_logs_only_so_many_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs/child.log"
    log.parent.mkdir()
    log.write_text("of an earlier process\n")
    writing = [sys.executable, "-c", WRITER, "0", "1000"]
    child = Process("child", writing, log=log, env={}, grace=1, size=LogSize(5_000, 2))
    wait_until(lambda: child.returncode is not None, "the child has ended")
    assert sorted(path.name for path in log.parent.iterdir()) == ["child.log", "child.log.1", "child.log.2"]
    kept = numbers(log.parent)
    assert sorted(kept) == list(range(min(kept), 1000)), "the last ones, without a gap"
    assert child.output().endswith(f"000999 {'x' * (999 * 37 % 200)}\n")


def test_a_guard_whose_input_is_no_pipe_runs_its_command_to_the_end(tmp_path: Path) -> None:
    limits = ["5", str(tmp_path / "log"), "1000", "1"]
    command = [sys.executable, "-c", "import time; time.sleep(0.3); print('made')"]
    done = subprocess.run(
        [sys.executable, str(guard.__file__), *limits, *command], stdin=subprocess.DEVNULL, timeout=30
    )
    assert (done.returncode, (tmp_path / "log").read_text()) == (0, "made\n")


def test_a_command_that_a_signal_ended_has_the_exit_code_of_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    limits = ["5", str(tmp_path / "log"), "1000", "1"]
    guarded = [sys.executable, str(guard.__file__), *limits, *command]
    assert subprocess.run(guarded, stdin=subprocess.DEVNULL, timeout=30).returncode == 137


def test_processes_that_share_a_log_lose_no_line_when_it_is_full(tmp_path: Path) -> None:
    log = tmp_path / "logs/child.log"
    children = [
        Process(
            "child",
            [sys.executable, "-c", WRITER, str(first), str(first + 1500)],
            log=log,
            env={},
            grace=1,
            size=LogSize(20_000, 200),
        )
        for first in (0, 1500, 3000)
    ]
    wait_until(lambda: all(child.returncode is not None for child in children), "the children have ended")
    text = "".join(path.read_text() for path in log.parent.iterdir())
    found = {int(number) for number in re.findall(r"(?m)(?:^|x)(\d{6}) ", text)}
    assert found == set(range(4500))


@pytest.mark.parametrize("late", [False, True])
def test_a_log_that_another_process_has_put_aside_is_written_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """`late`: while this one waits for its turn to do so."""
    first, second = (guard.RotatingLog(str(tmp_path / "log"), 10, 9) for _ in range(2))
    lock = fcntl.flock

    def puts_aside(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        first.write(b"2 aaa\n")
        lock(file, how)

    first.write(b"1 aaaaaa\n")
    if late:
        monkeypatch.setattr(fcntl, "flock", puts_aside)
    else:
        first.write(b"2 aaa\n")
    second.write(b"3 a\n")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "log": "2 aaa\n3 a\n",
        "log.1": "1 aaaaaa\n",
    }


@pytest.mark.parametrize("deleted", ["the file", "its folder"])
def test_a_log_that_is_deleted_by_hand_is_begun_anew_with_the_next_line(tmp_path: Path, deleted: str) -> None:
    path = tmp_path / "logs" / "worker.log"
    path.parent.mkdir()
    log = guard.RotatingLog(str(path), 100, 2)
    log.write(b"lost\nhalf of ")
    path.unlink()
    if deleted == "its folder":
        path.parent.rmdir()
    log.write(b"a line\n")
    log.write(b"the next\n")
    log.write(b"and more\n")
    assert path.read_bytes() == b"the next\nand more\n"


@pytest.mark.parametrize("trouble", [NotADirectoryError(20, "Not a directory"), OSError(5, "Input/output error")])
def test_a_log_that_cannot_be_looked_at_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: OSError
) -> None:
    """Of a disk that was pulled: a guard that reads no more would have its worker wait for ever with a full pipe."""
    path = tmp_path / "log"
    log = guard.RotatingLog(str(path), 100, 9)
    log.write(b"a line\n")
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise trouble

        patch.setattr(os, "stat", refuse)
        patch.setattr(os, "open", refuse)
        log.write(b"the next\n")
    log.write(b"and more\n")
    assert path.read_bytes() == b"a line\nthe next\nand more\n"


def test_a_log_that_is_deleted_as_it_is_opened_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `stoker clean`, between the opening and the lock."""
    path, lock = tmp_path / "log", fcntl.flock

    def late(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    log = guard.RotatingLog(str(path), 100, 9)
    assert path.exists()
    log.write(b"a line\n")
    assert path.read_text() == "a line\n"


def test_logs_of_one_folder_are_put_aside_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each guard has its own descriptor: the lock of the folder keeps a second one away."""
    alone: list[bool] = []
    replace = os.replace

    def noted(source: str, target: str) -> None:
        folder = os.open(tmp_path, os.O_RDONLY)
        alone.append(not try_lock(folder))
        os.close(folder)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    log = guard.RotatingLog(str(tmp_path / "log"), 10, 2)
    for _ in range(3):
        log.write(b"a line\n")
    assert alone == [True] * 3
    folder = os.open(tmp_path, os.O_RDONLY)
    assert try_lock(folder), "and is given back"
    os.close(folder)


def test_a_line_that_is_longer_than_a_file_stays_whole(tmp_path: Path) -> None:
    log = guard.RotatingLog(str(tmp_path / "log"), 100, 9)
    for piece in (b"short\n", b"y" * 90, b"y" * 60, b"\nnext\n", b"z" * 150 + b"\nlast\n"):
        log.write(piece)
    texts = [path.read_text() for path in sorted(tmp_path.iterdir(), key=lambda path: path.name)]
    lines = [line for text in texts for line in text.splitlines()]
    assert sorted(lines) == sorted(["short", "y" * 150, "next", "z" * 150, "last"])


def test_what_a_full_disk_does_not_take_is_counted_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = guard.RotatingLog(str(tmp_path / "log"), 1000, 1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        log.write(b"lost\n")
        log.write(b"lost too\n")
    log.write(b"kept\n")
    log.write(b"kept too\n")
    said = "14 bytes are missing here: they could not be written\nkept\nkept too\n"
    assert (tmp_path / "log").read_text() == said, "said once"


def test_a_log_that_cannot_be_put_aside_grows_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = guard.RotatingLog(str(tmp_path / "log"), 20, 1)

    def refused(*_: object) -> None:
        raise PermissionError("the folder is another user's by now")

    lines = [b"line %d\n" % number for number in range(10)]
    with monkeypatch.context() as closed:
        closed.setattr(os, "replace", refused)
        for line in lines:
            log.write(line)
    assert (tmp_path / "log").read_bytes() == b"".join(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_command_whose_child_holds_its_output_ends_all_the_same(tmp_path: Path) -> None:
    leaving = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    child = start(tmp_path, leaving)
    wait_until(lambda: child.returncode is not None, "the child has ended")
    left = int(child.output())
    os.kill(left, signal.SIGKILL)


def test_the_guard_needs_only_the_standard_library() -> None:
    code = f"import runpy, sys; runpy.run_path({guard.__file__!r}); assert 'stoker' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})

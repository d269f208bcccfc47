"""The edge of the process: no surroundings of a user end a command with a traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stoker.cli import edge
from stoker.cli.options import print_json
from stoker.errors import InvalidRequest
from stoker.local import interrupts

#: The command, with something else in the place of its command tree.
MAIN = "import sys, time, signal, os\nfrom stoker import cli\ndef app(prog_name):\n    {}\ncli.app = app\ncli.main()"


def command(body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    code = MAIN.format(body)
    env = {**os.environ, "PYTHONUNBUFFERED": "", **options.pop("env", {})}
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=env, **options)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", b"\\u65e5 \\u2192 \\U0001f600\n"),
        ("cp1252", b"\\u65e5 \\u2192 \\U0001f600\n"),
        ("utf-8", "日 → 😀\n".encode()),
    ],
)
def test_a_character_that_the_output_cannot_hold_is_its_number(encoding: str, shown: bytes) -> None:
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    body = MAIN.format("print('\\u65e5 \\u2192 \\U0001f600')")
    done = subprocess.run([sys.executable, "-c", body], env=env, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", '["\\ud83d\\ude00"]\n'), ("utf-8", '["😀"]\n')])
def test_json_is_json_in_every_encoding(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    with open(os.dup(1), "w", encoding=encoding) as output:
        monkeypatch.setattr(sys, "stdout", output)
        print_json(["😀"])
    assert capfd.readouterr().out == shown


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_on_a_full_disk_is_one_line(unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = command("print('x')", stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (1, "stoker: standard output: No space left on device.\n")


def test_a_reader_that_has_gone_ends_a_command_without_a_word() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        done = command("print('x' * 100000)", stdout=gone)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_closed_streams_read_and_write_nothing(tmp_path: Path, closed: tuple[int, ...]) -> None:
    """And no file that is opened later takes the place of one."""
    target = tmp_path / "file"
    body = (
        f"f = open({str(target)!r}, 'w'); f.write(str(f.fileno())); print('x', sys.stdin.read(), sys.stdout.isatty())"
    )

    def close() -> None:
        for number in closed:
            os.close(number)

    done = command(body, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, preexec_fn=close)
    assert done.returncode == 0, done.stderr
    assert int(target.read_text()) > 2


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InvalidRequest("why."), 2, "stoker: why.\n"),
        (OSError(errno.EIO, "Input/output error"), 1, "stoker: standard output: Input/output error.\n"),
        (OSError(errno.EACCES, "Permission denied", "/x"), 1, "stoker: /x: Permission denied.\n"),
        (OSError(errno.ENETDOWN, "Network is down"), 1, "stoker: Network is down.\n"),
        (BrokenPipeError(), 0, ""),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit("a word"), 1, "stoker: a word\n"),
        (SystemExit(None), 0, ""),
        (SystemExit(7), 7, ""),
    ],
)
def test_what_ends_a_command_is_a_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fails() -> None:
        raise error

    assert edge.run(fails) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("said", [True, False])
def test_an_interrupt_may_come_out_of_a_library_as_another_error(said: bool) -> None:
    """Whether it names its cause or not, and also behind a further error."""

    def fails() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            if said:
                raise RuntimeError("Error calling __set_name__") from error
            raise RuntimeError("in the middle of it")  # noqa: B904  it is what a library does

    def fails_again() -> None:
        try:
            fails()
        except RuntimeError as error:
            raise ValueError("no good") from error

    assert [edge.run(fails), edge.run(fails_again)] == [130, 130]


def test_a_command_that_typer_ends_because_its_reader_has_gone_has_not_failed() -> None:
    def ends() -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  as typer does

    assert edge.run(ends) == 0


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        edge.run(fails)


def test_what_is_said_to_a_full_disk_is_lost_and_ends_nothing() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = MAIN.format("print('note', file=sys.stderr, flush=True); print('done')")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_work_goes_on_when_the_terminal_that_it_reports_to_has_gone(tmp_path: Path) -> None:
    """As after `disown`: nothing is ended, and each write to the terminal fails."""
    master, slave = os.openpty()
    body = f"sys.stdin.readline(); print('note', file=sys.stderr); open({str(tmp_path / 'done')!r}, 'w').write('it')"
    with subprocess.Popen([sys.executable, "-c", MAIN.format(body)], stdin=subprocess.PIPE, stderr=slave) as begun:
        os.close(slave)
        os.close(master)
        begun.communicate(b"\n", timeout=60)
    assert begun.returncode == 0
    assert (tmp_path / "done").read_text() == "it"


def test_an_error_that_nobody_can_read_keeps_its_exit_code() -> None:
    body = "from stoker.errors import InvalidRequest; raise InvalidRequest('why.')"
    with open("/dev/null") as unwritable:
        done = subprocess.run([sys.executable, "-c", MAIN.format(body)], stderr=unwritable)
    assert done.returncode == 2


def process(code: str, *, before: Callable[[], object] | None = None, **options: Any) -> subprocess.Popen[str]:
    """A process that has said "here"."""
    begun = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before, **options,
    )  # fmt: skip
    assert begun.stdout is not None
    assert begun.stdout.readline() == "here\n"
    return begun


WAITS = MAIN.format("print('here', flush=True); time.sleep(60)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_asked_to_end_ends_with_130(number: signal.Signals) -> None:
    with process(WAITS) as begun:
        begun.send_signal(number)
        assert (begun.communicate(timeout=30)[1], begun.returncode) == ("", 130)


def test_under_nohup_a_command_goes_on_when_the_terminal_closes() -> None:
    said = MAIN.format("print('here', flush=True); sys.stdin.readline(); print('still', flush=True)")
    with process(said, before=partial(signal.signal, signal.SIGHUP, signal.SIG_IGN), stdin=subprocess.PIPE) as begun:
        begun.send_signal(signal.SIGHUP)
        assert begun.communicate("\n", timeout=30)[0] == "still\n"
        assert begun.returncode == 0


def test_an_interrupt_while_the_command_is_loaded_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("import time; print('here', flush=True); time.sleep(60)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with process("from stoker.cli import main; main()", env=env) as begun:
        begun.send_signal(signal.SIGINT)
        assert (begun.communicate(timeout=30)[1], begun.returncode) == ("", 130)


def test_an_interrupt_between_two_programs_of_a_process_waits_for_the_second() -> None:
    """`stoker worker` becomes the worker."""
    second = "from stoker.local.interrupts import end_at_once; end_at_once(); print('went on')"
    first = (
        "import os, signal, sys; from stoker.local.interrupts import hold_back; hold_back(); "
        f"os.kill(os.getpid(), signal.SIGINT); os.execv(sys.executable, [sys.executable, '-c', {second!r}])"
    )
    done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (interrupts.INTERRUPTED, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_notes_that_a_full_disk_does_not_take_are_lost_and_end_nothing() -> None:
    with edge.Notes("/dev/full", "wb") as notes:
        assert notes.write(b"a note") == 6
        assert notes.write(memoryview(bytes(8)).cast("I")) == 8


def test_a_note_that_the_terminal_cannot_hold_is_shown_by_its_numbers() -> None:
    done = command("print('\\u65e5', file=sys.stderr)", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "\\u65e5\n")

"""Whether another worker on this device runs streams is a lock of the kernel's, which goes with its process."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from stoker.address import Address
from stoker.settings import Settings
from workers.neighbours import StreamLocks, lock_file, neighbours_of

#: Announces each priority that it reads, and says so.
WORKER = """
import sys
from pathlib import Path
from workers.neighbours import StreamLocks

locks = StreamLocks(Path(sys.argv[1]))
for line in sys.stdin:
    locks.announce(None if line == "\\n" else int(line))
    print("done", flush=True)
"""


class Other:
    """Another process with the same file."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", WORKER, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def announce(self, priority: int | None) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("" if priority is None else priority, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@contextmanager
def other(path: Path) -> Iterator[Other]:
    made = Other(path)
    try:
        yield made
    finally:
        made.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "x.streams"


@pytest.fixture
def here(path: Path) -> Iterator[StreamLocks]:
    with closing(StreamLocks(path)) as locks:
        yield locks


def seen(locks: StreamLocks) -> list[int]:
    """The priorities that make way."""
    return [priority for priority in range(10) if locks.is_ahead(priority)]


def test_a_stream_of_another_process_is_ahead_of_what_is_worse_until_it_is_killed(
    here: StreamLocks, path: Path
) -> None:
    assert seen(here) == []
    with other(path) as there:
        there.announce(5)
        assert seen(here) == [6, 7, 8, 9]
        here.announce(7)
        assert seen(here) == [6, 7, 8, 9], "its own stream changes nothing of what it sees"
        there.announce(3)
        assert seen(here) == [4, 5, 6, 7, 8, 9]
        there.announce(None)
        assert seen(here) == []
        there.announce(0)
        assert seen(here) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
        there.kill()
        assert seen(here) == []


def test_what_ends_here_is_no_longer_seen_there(here: StreamLocks, path: Path) -> None:
    with other(path) as first, other(path) as second:
        first.announce(4)
        second.announce(4)
        first.announce(6)
        assert seen(here) == [5, 6, 7, 8, 9], "that of the second is still there"
        second.kill()
        assert seen(here) == [7, 8, 9]


def test_a_file_that_was_cleaned_up_is_made_again_by_who_announces_and_by_who_looks(
    here: StreamLocks, path: Path
) -> None:
    here.announce(5)
    path.unlink()
    path.parent.rmdir()
    with other(path) as there:
        there.announce(4)
        assert seen(here) == [5, 6, 7, 8, 9]
        path.unlink()
        assert seen(here) == []
        there.announce(2)
        assert seen(here) == [3, 4, 5, 6, 7, 8, 9]
        here.announce(None)


def test_the_lock_that_is_held_is_taken_on_the_file_that_replaces_one(here: StreamLocks, path: Path) -> None:
    here.announce(5)
    path.unlink()
    assert seen(here) == []
    asked = "import sys, pathlib, workers.neighbours as n; print(n.StreamLocks(pathlib.Path(sys.argv[1])).is_ahead(9))"
    said = subprocess.run([sys.executable, "-c", asked, str(path)], capture_output=True, text=True, check=True)
    assert said.stdout == "True\n"


def test_a_file_that_can_be_locked_no_more_costs_one_line_and_nothing_else(
    here: StreamLocks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "fcntl", broken)
    with caplog.at_level(logging.WARNING):
        assert seen(here) == []
        here.announce(5)
    (record,) = caplog.records
    assert record.message.startswith("bulk work here makes no way for streams of other workers on this machine: [Errno")


def of(url: str) -> Settings:
    return Settings(url=url)


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_another_user_may_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"stoker-{os.getuid()}"
    folder.mkdir()
    folder.chmod(mode)
    assert neighbours_of(of("redis://h"), "cpu") is None
    assert f"{folder} is not this user's alone" in caplog.text


def test_neither_folder_nor_file_may_be_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target, file = tmp_path / "target", lock_file(of("redis://h").address, "cpu")
    target.mkdir(0o700)
    file.parent.symlink_to(target)
    assert neighbours_of(of("redis://h"), "cpu") is None
    file.parent.unlink()
    file.parent.mkdir(0o700)
    file.symlink_to(target / "any")
    assert neighbours_of(of("redis://h"), "cpu") is None
    assert list(target.iterdir()) == []


def test_what_is_made_is_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = neighbours_of(of("redis://h"), "cpu")
    assert isinstance(made, StreamLocks)
    with closing(made):
        file = lock_file(of("redis://h").address, "cpu")
        assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]
        assert file.read_bytes() == b"", "nothing is ever written"


def test_workers_of_one_broker_and_device_share_a_file_and_others_have_their_own() -> None:
    def of_url(url: str, device: str = "cpu") -> Path:
        return lock_file(Address.parse(url), device)

    one = of_url("redis://127.0.0.1:6379/0")
    same = ["redis://localhost:6379/0", "redis://user:word@localhost:6379/0", "redis://[::1]:6379/0"]
    assert {of_url(url) for url in same} == {one}
    others = ["redis://127.0.0.1:6380/0", "redis://127.0.0.1:6379/1", "redis://host:6379/0", "redis+socket:///x"]
    assert len({one, of_url("redis://127.0.0.1:6379/0", "gpu"), *map(of_url, others)}) == 6


def test_a_worker_without_a_broker_has_no_neighbours(tmp_path: Path) -> None:
    assert neighbours_of(Settings(home=tmp_path), "cpu") is None

"""What a test may leave behind: keys, threads, file handles, processes."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.broker import keys

PROCESSES, HANDLES, CONNECTIONS = Path("/proc"), Path("/proc/self/fd"), Path("/proc/self/net/tcp")
#: Seconds. What is closing may still be there for a moment.
BEAR = 10.0


def overlong_keys(client: Any) -> list[str]:
    """Keys that no kind declares, and those that live longer than their kind may."""
    names = list(client.scan_iter(count=1000))
    pipeline = client.pipeline()
    for name in names:
        pipeline.pttl(name)
    found = []
    for name, left in zip((name.decode() for name in names), pipeline.execute(), strict=True):
        kind = keys.kind_of(name)
        if kind is None:
            found.append(f"{name}: no kind of stoker/broker/keys.py")
        elif kind.lifetime is not None and (left == -1 or left > 1000 * kind.lifetime):
            found.append(f"{name}: {left / 1000} s left, and {kind.lifetime} s are allowed")
    return found


#: Of jobs that have not ended, and of messages that are held: a kind of each place where one may be.
OF_OPEN_JOBS = ("open", "backlog", "turns", "dispatched", "client", "cancel", "ready", "unacked")


def open_work(client: Any) -> list[str]:
    """Keys that say that a job waits or runs, or that a message is held."""
    names = [name.decode() for name in client.scan_iter(count=1000)]
    kinds = [(name, keys.kind_of(name)) for name in names]
    busy = [name for name, kind in kinds if kind is not None and kind.name in OF_OPEN_JOBS]
    # Held by a worker for a moment, whether there is work or not.
    return [name for name in busy if name != f"{keys.UNACKED}_mutex"]


@dataclass(frozen=True)
class Held:
    """What this process holds now."""

    threads: frozenset[threading.Thread]
    handles: frozenset[str]
    children: frozenset[int]

    @classmethod
    def now(cls) -> Held:
        return cls(frozenset(threading.enumerate()), _handles(), _children())

    def left(self) -> list[str]:
        """What is held now and was not then."""
        if Held.now() != self:
            # A handle may be held by garbage alone; looking for that takes longer than all the rest.
            gc.collect()
        now = Held.now()
        threads = [f"thread {thread.name}" for thread in now.threads - self.threads]
        return [
            *threads,
            *(handle + _ends_of(handle) for handle in sorted(now.handles - self.handles)),
            *(f"process {pid}" for pid in now.children - self.children),
        ]


def _handles() -> frozenset[str]:
    found = set()
    for entry in HANDLES.iterdir() if HANDLES.is_dir() else ():
        # The listing's own handle is gone by now.
        with suppress(FileNotFoundError):
            found.add(f"handle {entry.name} of {entry.readlink()}")
    return frozenset(found)


def _ends_of(handle: str) -> str:
    """Of a TCP connection, its ports here and there: they say whose it is."""
    inode = handle.partition("socket:[")[2].rstrip("]")
    lines = CONNECTIONS.read_text().splitlines()[1:] if inode and CONNECTIONS.exists() else ()
    for fields in map(str.split, lines):
        if fields[9] == inode:
            here, there = (int(end.rpartition(":")[2], 16) for end in fields[1:3])
            return f", from port {here} to port {there}"
    return ""


def _children() -> frozenset[int]:
    tasks = Path("/proc/self/task")
    found: set[int] = set()
    for entry in tasks.iterdir() if tasks.is_dir() else ():
        with suppress(FileNotFoundError):
            found |= set(map(int, (entry / "children").read_text().split()))
    return frozenset(found)


def processes_of(home: Path) -> list[int]:
    """Processes other than this one that were started for the Stoker home `home`."""
    found = []
    for entry in PROCESSES.glob("[0-9]*"):
        with suppress(OSError):
            started = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            if str(home).encode() in started and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def assert_nothing(left: Callable[[], list[Any]], what: str, seconds: float = BEAR) -> None:
    """Wait until nothing is left; fail naming what is."""
    end = time.monotonic() + seconds
    while found := left():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: {found}")
        time.sleep(0.02)

"""Workers that can be killed, frozen, drained and started, on tiny random models and one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stoker.local.process import Process
from stoker.local.stack import worker_command
from stoker.settings import Settings, load_settings
from tests import endless
from tests.conftest import alive

GENERATE, EMBED = endless.MODEL, "tiny-encoder"


def make_models(folder: Path) -> tuple[str, ...]:
    """Two models of a few thousand random weights."""
    return (f"{GENERATE}={endless.write(folder)}", f"{EMBED}={endless.CHECKPOINTS / 'bert'}")


def fleet_settings(home: Path, url: str, models: tuple[str, ...]) -> Settings:
    """Requests draft where they say so alone: else the streams would end before they are met by anything."""
    return load_settings(
        home=home, url=url, models=models, lease=3, grace=2.0, generate_slots=4, embed_jobs=4, train_runs=1,
        lookup=False,
    )  # fmt: skip


class Member:
    """One worker, under its guard: a process, or a group of `ranks` processes."""

    def __init__(self, settings: Settings, number: int, ranks: int = 1) -> None:
        self.ranks = ranks
        settings = settings.model_copy(update={"ranks": ranks})
        self.name = f"chaos-{os.getpid()}-{number}@local"
        self.log = settings.logs / f"{self.name}.log"
        command = worker_command(settings, self.name)
        self._process = Process(self.name, command, log=self.log, env=settings.environment(), grace=settings.grace + 5)
        self.thaws_at: float | None = None
        self._frozen: int | None = None
        self.draining = self.asked_to_end = False

    @property
    def pid(self) -> int | None:
        """The worker's own process, not its guard's: rank 0 of a group."""
        return next((pid for pid, line in processes() if self.name in line and "guard.py" not in line), None)

    @property
    def warm(self) -> bool:
        """Whether it takes jobs, or has."""
        return self.log.exists() and "takes jobs of" in self.log.read_text(errors="replace")

    @property
    def last_rank(self) -> int | None:
        """The process of a group's last rank."""
        first = self.pid
        guards = [pid for pid, line in children(first) if f"rank-{self.ranks - 1}.log" in line] if first else []
        return next((pid for guard in guards for pid, _ in children(guard)), None)

    @property
    def gone(self) -> bool:
        return self._process.returncode is not None

    def signal(self, number: int) -> bool:
        return _sent(self.pid, number)

    def signal_last_rank(self, number: int) -> bool:
        """From the signal on the group may end by itself."""
        sent = _sent(self.last_rank, number)
        self.asked_to_end = self.asked_to_end or sent
        return sent

    def freeze(self, pid: int | None, seconds: float) -> bool:
        """A group one of whose ranks is frozen may end by itself, or outlive that."""
        if not _sent(pid, signal.SIGSTOP):
            return False
        self._frozen, self.thaws_at = pid, time.monotonic() + seconds
        self.asked_to_end = self.asked_to_end or self.ranks > 1
        return True

    def thaw(self) -> None:
        self.thaws_at = None
        _sent(self._frozen, signal.SIGCONT)

    def stop(self) -> None:
        if self.thaws_at is not None:
            self.thaw()
        self._process.stop()


def _sent(pid: int | None, number: int) -> bool:
    if pid is None or not alive(pid):
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def processes() -> list[tuple[int, str]]:
    """Of each process its id and its command."""
    return [(pid, args) for pid, _, args in _table()]


def children(parent: int) -> list[tuple[int, str]]:
    return [(pid, args) for pid, of, args in _table() if of == parent]


def _table() -> Iterator[tuple[int, int, str]]:
    command = ["ps", "-ww", "-eo", "pid=,ppid=,args="]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        pid, parent, *args = line.split(maxsplit=2)
        yield int(pid), int(parent), "".join(args)


class Fleet:
    """`keep` single workers at least, and next to them a group where there are `ranks`: like a supervisor, `tend`
    starts others for those that ended."""

    def __init__(self, settings: Settings, keep: int, ranks: int = 1) -> None:
        self._settings, self._keep, self._ranks, self._number = settings, keep, ranks, 0
        self.members: list[Member] = []
        self.names: list[str] = []
        #: A worker outlives all that happens to it except a signal.
        self.ended_by_themselves: list[str] = []

    def start(self, ranks: int = 1) -> Member:
        self._number += 1
        member = Member(self._settings, self._number, ranks)
        self.members.append(member)
        self.names.append(member.name)
        return member

    def tend(self) -> None:
        for member in [member for member in self.members if member.gone]:
            self.members.remove(member)
            if not member.asked_to_end:
                self.ended_by_themselves.append(f"{member.name} ended by itself: {member.log}")
        for member in self.members:
            if member.thaws_at is not None and time.monotonic() >= member.thaws_at:
                member.thaw()
        while sum(not member.draining and member.ranks == 1 for member in self.members) < self._keep:
            self.start()
        if self._ranks > 1 and self.group is None:
            self.start(self._ranks)

    @property
    def group(self) -> Member | None:
        return next((member for member in self.members if member.ranks > 1), None)

    @property
    def awake(self) -> list[Member]:
        """Those to whom something may happen: a group while it has jobs that could be lost, because it takes seconds to
        meet, and would hardly ever get there."""
        alike = [member for member in self.members if member.thaws_at is None and not member.draining]
        return [member for member in alike if member.ranks == 1 or member.warm]

    def calm_down(self) -> None:
        for member in self.members:
            member.thaws_at = None if member.thaws_at is None else 0.0
        self.tend()

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def left(self) -> list[str]:
        """Processes of this fleet that still run."""
        marks = (*self.names, str(self._settings.logs))
        return [line for _, line in processes() if any(mark in line for mark in marks)]

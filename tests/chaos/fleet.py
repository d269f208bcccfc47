"""Workers that can be killed, frozen, drained and started, on tiny random models and one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import time
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
    """One worker process, under its guard."""

    def __init__(self, settings: Settings, number: int) -> None:
        self.name = f"chaos-{os.getpid()}-{number}@local"
        self.log = settings.logs / f"{self.name}.log"
        command = worker_command(settings, self.name)
        self._process = Process(self.name, command, log=self.log, env=settings.environment(), grace=settings.grace + 5)
        self.thaws_at: float | None = None
        self.draining = self.asked_to_end = False

    @property
    def pid(self) -> int | None:
        """The worker's own process, not its guard's."""
        return next((pid for pid, line in processes() if self.name in line and "guard.py" not in line), None)

    @property
    def gone(self) -> bool:
        return self._process.returncode is not None

    def signal(self, number: int) -> bool:
        pid = self.pid
        if pid is None or not alive(pid):
            return False
        os.kill(pid, number)
        return True

    def stop(self) -> None:
        if self.thaws_at is not None:
            self.signal(signal.SIGCONT)
        self._process.stop()


def processes() -> list[tuple[int, str]]:
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = (line.strip().partition(" ") for line in listed.splitlines())
    return [(int(pid), args) for pid, _, args in lines]


class Fleet:
    """`keep` members at least: like a supervisor, `tend` starts others for those that ended."""

    def __init__(self, settings: Settings, keep: int) -> None:
        self._settings, self._keep, self._number = settings, keep, 0
        self.members: list[Member] = []
        self.names: list[str] = []
        #: A worker outlives all that happens to it except a signal.
        self.ended_by_themselves: list[str] = []

    def start(self) -> Member:
        self._number += 1
        member = Member(self._settings, self._number)
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
                member.signal(signal.SIGCONT)
                member.thaws_at = None
        while sum(not member.draining for member in self.members) < self._keep:
            self.start()

    @property
    def awake(self) -> list[Member]:
        return [member for member in self.members if member.thaws_at is None and not member.draining]

    def calm_down(self) -> None:
        for member in self.members:
            member.thaws_at = None if member.thaws_at is None else 0.0
        self.tend()

    def stop(self) -> None:
        for member in self.members:
            member.stop()

    def left(self) -> list[str]:
        """Processes of this fleet that still run."""
        return [line for _, line in processes() if any(name in line for name in self.names)]

"""Rank 0's side of a group: it says what the others do, and ends the worker when one of them is lost.

A rank that dies closes its socket; one that hangs, or is cut off, gives no sign of life for `SILENCE` seconds; one that
lives and does not do its work has the time of a step for it. Each ends this process as a crash does: its supervisor
starts the group again, and its jobs go on from where they were.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from hmac import compare_digest

from engine.adapters.lora import LoraWeights
from engine.generation.followed import Admission, LentAdapter
from engine.generation.limits import LaneLimits
from engine.training import followed
from engine.training.ranks import ALONE, Group, MlxRanks, RunPlan, text_of_rank_0
from stoker.errors import ConfigError, JobFailed, WorkerUnavailable
from stoker.settings import Settings
from workers.ending import EXIT_CODE, end_process
from workers.group import meeting
from workers.group.channel import Channel
from workers.group.plan import (
    Admit,
    Advance,
    Begin,
    Command,
    Done,
    Drop,
    End,
    Forget,
    Hello,
    Holds,
    Keep,
    Lend,
    Measured,
    NotOfThePlan,
    Open,
    Stop,
    Turn,
    Word,
)
from workers.group.starting import Starting

log = logging.getLogger(__name__)

#: Seconds between looks at whether the others do their work.
LOOK_EVERY = 1.0


def _ignore() -> None: ...


class Other:
    """A rank as rank 0 knows it."""

    def __init__(self, hello: Hello, channel: Channel) -> None:
        self.hello, self.channel = hello, channel
        self.models: dict[str, str] | None = None
        #: Why it ended before it had said what it holds; "": it did not.
        self.refusal = ""
        #: The last command that it has done.
        self.done = 0
        #: What it said of the last turn of each run.
        self.witnesses: dict[str, str] = {}

    def __str__(self) -> str:
        return f"rank {self.hello.rank} on {self.hello.host}"


class Leader(MlxRanks):
    """A `Group`, and a `Sharing`. `end` ends the process, with an exit code."""

    def __init__(self, settings: Settings, size: int, starting: Starting, end: Callable[[int], object]) -> None:
        super().__init__(0, size)
        self._settings, self._starting, self._end = settings, starting, end
        self._others: list[Other] = []
        self._changed = threading.Condition()
        #: The number of the last command, and when it was given.
        self._said, self._since = 0, 0.0
        #: The number of the last turn of a run, and the run.
        self._advanced = 0, ""
        #: What this rank says of the last turn of each run, until it is compared.
        self._witnesses: dict[str, str] = {}
        #: The turns of generation that not all ranks have made: number → rank → what it says of it.
        self._turns: dict[int, dict[int, str]] = {}
        self._models: Mapping[str, str] = {}
        self._refusal, self._closing = "", threading.Event()
        #: Called by any thread when the others have done all that this one said.
        self.woken: Callable[[], None] = _ignore

    def join(self) -> None:
        with self._starting.starting() as place, meeting.listening(place.host) as server:
            meeting.meet(self, place)
            secret = secrets.token_hex(16)
            address = meeting.Address(place.host, server.getsockname()[1], os.getpid(), secret)
            text_of_rank_0(self, address.written)
            own = meeting.introduction(self._settings, secret, 0)
            while len(self._others) < self.size - 1:
                self._take(server, own)
        self._refuse(list(meeting.differences(own, [other.hello for other in self._others])))
        for other in self._others:
            other.channel.keep_alive()
            threading.Thread(target=self._listen, args=(other,), name=str(other), daemon=True).start()
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        log.info("the group has %d ranks: %s", self.size, ", ".join(map(str, self._others)))

    def _take(self, server: socket.socket, own: Hello) -> None:
        """The next connection, if it is from a rank of this group."""
        try:
            connected, address = server.accept()
        except TimeoutError:
            known = [other.hello.rank for other in self._others]
            raise ConfigError(
                f"ranks {known} have come within {meeting.MEET_WITHIN:.0f} s; 1 to {self.size - 1} are needed. Look at "
                "the logs of the others, and whether they reach this host."
            ) from None
        channel = Channel(connected)
        try:
            hello = next(channel.words(), None)
        except (OSError, NotOfThePlan) as error:
            log.warning("a connection from %s is of no rank: %s", address[0], error)
            channel.close()
            return
        if not isinstance(hello, Hello) or not compare_digest(hello.secret, own.secret):
            log.warning("a connection from %s has not the secret of this group", address[0])
            channel.close()
            return
        self._others.append(Other(hello, channel))

    def hold(self, models: Mapping[str, str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(other.models is not None or other.refusal for other in self._others))
            wrong = [f"{other}: {other.refusal}" for other in self._others if other.refusal]
            wrong += [
                said
                for other in self._others
                if other.models is not None
                for said in meeting.missing_models(other.hello.rank, dict(models), other.models)
            ]
        self._refuse(wrong)
        self._models = models

    def _refuse(self, wrong: list[str]) -> None:
        """Raise `ConfigError` if something is wrong, after the others have heard of it."""
        if not wrong:
            return
        why = " ".join(wrong)
        self._closing.set()
        for other in self._others:
            try:
                other.channel.say(Stop(why=why[:1000]))
            except OSError as error:
                log.info("%s does not hear why: %s", other, error)
        self._starting.stop()
        raise ConfigError(f"the ranks do not fit together. {why}")

    def of(self, model: str) -> Group:
        # One that comes later is here alone.
        return ALONE if self._models and model not in self._models else self

    @property
    def ready(self) -> bool:
        return all(other.done == self._said for other in self._others)

    def begin(self, plan: RunPlan) -> None:
        self._wait()
        header = followed.header_of(plan)
        self._command(lambda number: Begin(number=number, header=header))
        followed.send(self, plan)

    def advance(self, run: str) -> None:
        self._wait()
        self._advanced = self._said + 1, run
        self._command(lambda number: Advance(number=number, run=run))

    def advanced(self, run: str, witness: str) -> None:
        self._witnesses[run] = witness

    def check(self, run: str) -> None:
        self._wait()
        own = self._witnesses.pop(run, None)
        for other in self._others if own is not None else ():
            theirs = other.witnesses.get(run, "")
            if theirs != own:
                raise JobFailed(
                    f"training: {other} made {theirs or 'nothing'} of a step, and rank 0 {own or 'nothing'}: "
                    "their weights are not the same. Use devices of one kind in a group, or train on one rank."
                )

    def keep(self, run: str) -> None:
        self._wait()
        self._command(lambda number: Keep(number=number, run=run))

    def end(self, run: str) -> None:
        self._forget(run)
        self._command(lambda number: End(number=number, run=run))

    def _forget(self, run: str) -> None:
        with self._changed:
            if self._advanced[1] == run:
                # What another rank has yet to say of it is of no run.
                self._advanced = 0, ""
            for witnesses in (self._witnesses, *(other.witnesses for other in self._others)):
                witnesses.pop(run, None)

    def open(self, model: str, limits: LaneLimits) -> None:
        self._command(lambda number: Open.of(number, model, limits))

    def lend(self, model: str, adapter: tuple[str, int], weights: LoraWeights) -> None:
        lent = LentAdapter.of(*adapter, weights)
        self._command(lambda number: Lend(number=number, model=model, adapter=lent))
        lent.send(self, weights)

    def forget(self, model: str, adapter: tuple[str, int]) -> None:
        name, version = adapter
        self._command(lambda number: Forget(number=number, model=model, name=name, version=version))

    def admit(self, model: str, admission: Admission) -> None:
        self._command(lambda number: Admit(number=number, model=model, admission=admission))

    def drop(self, model: str, numbers: list[int]) -> None:
        self._command(lambda number: Drop(number=number, model=model, jobs=tuple(numbers)))

    def turn(self, model: str, *, lookahead: bool) -> None:
        with self._changed:
            self._turns[self._said + 1] = {}
        self._command(lambda number: Turn(number=number, model=model, lookahead=lookahead))

    def turned(self, witness: str) -> None:
        self._compare(self._said, 0, witness)

    def measured(self, seconds: float) -> None:
        self._say(Measured(seconds=seconds))

    def close(self) -> None:
        self._closing.set()
        for other in self._others:
            try:
                other.channel.say(Stop())
            except OSError as error:
                log.info("%s was gone before: %s", other, error)
            other.channel.close()
        self._starting.stop()

    def lose(self, why: str) -> None:
        self._lost(f"MLX has lost a rank ({why})")
        super().lose(why)

    def _wait(self) -> None:
        """Until the others have done what this one said; the lane's turn comes when they have."""
        with self._changed:
            self._changed.wait_for(lambda: self.ready or self._closing.is_set())
        if self._closing.is_set():
            raise WorkerUnavailable("the group is ending. The job goes on when it is back.")

    def _command(self, made: Callable[[int], Command]) -> None:
        """Give the others a command, made with its number."""
        if self._closing.is_set():
            return
        self._said, self._since = self._said + 1, time.monotonic()
        self._say(made(self._said))

    def _say(self, word: Word) -> None:
        for other in self._others:
            try:
                other.channel.say(word)
            except OSError as error:
                self._lost(f"{other} was lost ({error})")

    def _compare(self, number: int, rank: int, witness: str) -> None:
        """A rank has made a turn of generation; with the last of them it is known whether all made the same."""
        with self._changed:
            said = self._turns[number]
            said[rank] = witness
            if len(said) < self.size:
                return
            del self._turns[number]
        for other in self._others:
            if said[other.hello.rank] != said[0]:
                self._lost(f"{other} chose other tokens than rank 0. Use devices of one kind in a group")

    def _listen(self, other: Other) -> None:
        """Until it is gone. In a thread of its own."""
        try:
            for word in other.channel.words():
                self._hear(other, word)
            why = "it has closed its connection: it died"
        except TimeoutError:
            why = "no sign of life: it hangs, or it is cut off"
        except (OSError, NotOfThePlan) as error:
            why = str(error)
        if not other.refusal:
            self._lost(f"{other} was lost ({why})")

    def _hear(self, other: Other, word: object) -> None:
        if isinstance(word, Stop) and other.models is not None:
            self._lost(f"{other} ended: {word.why}")
        with self._changed:
            if isinstance(word, Stop):
                # This one is still loading, and hears of it when it is done: what it finds itself comes first.
                other.refusal = word.why
            elif isinstance(word, Holds):
                other.models = word.models
            elif isinstance(word, Done):
                if word.number == self._advanced[0]:
                    other.witnesses[self._advanced[1]] = word.witness
                other.done = word.number
            self._changed.notify_all()
        if isinstance(word, Done) and word.number in self._turns:
            self._compare(word.number, other.hello.rank, word.witness)
        if self.ready:
            self.woken()

    def _watch(self) -> None:
        """A rank that lives and does nothing. In a thread of its own."""
        limit = self._settings.step_limit
        while limit and not self._closing.wait(LOOK_EVERY):
            if not self.ready and time.monotonic() - self._since > limit:
                late = ", ".join(str(other) for other in self._others if other.done != self._said)
                self._lost(f"{late} took longer than {limit:g} s for a step")

    def _lost(self, what: str) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        log.critical("%s: ending this worker (exit code %d). Its jobs go on when the group is back.", what, EXIT_CODE)
        self._end(EXIT_CODE)
        with self._changed:
            self._changed.notify_all()


def leader_of(settings: Settings, size: int, starting: Starting) -> Leader:
    return Leader(settings, size, starting, end_process)

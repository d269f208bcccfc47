"""The broker, the worker and the client that are fuzzed, and what may be said of a call's end."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker import Client
from stoker.broker import keys
from stoker.client import Job
from stoker.contract import Presence
from stoker.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobTimeout,
    ModelError,
    QueueFull,
    StokerError,
)
from tests.chaos.fleet import EMBED, GENERATE, Member, fleet_settings, make_models
from tests.conftest import wait_until
from tests.engine.test_damaged import tiny_gguf
from tests.fuzz.loader import Loader
from tests.fuzz.odd import CallersOwn
from tests.integration.machinery import FragileBroker

#: Seconds after which a job that may be as long as it likes is cancelled, and in which any job has to end then.
ENOUGH, ENDS_WITHIN = 3.0, 45.0
#: Letters of an error: the longest repeats a whole regular expression, as its compiler does.
LONGEST_ERROR = 21_000
#: What a wrong request may end with.
REFUSED: tuple[type[StokerError], ...] = (InvalidRequest, ModelError, DeadlineExceeded, JobCancelled, QueueFull)
QUEUES = (
    *(keys.queue(GENERATE, kind) for kind in ("generate", "train", "adapters")),
    keys.queue(EMBED, "embed"),
)
#: An adapter that the world has from the beginning.
ADAPTER = "sound"


@dataclass
class World:
    """`folder` is for files of the inputs; each makes its own below it."""

    broker: FragileBroker
    member: Member
    client: Client
    loader: Loader
    folder: Path
    #: A sound GGUF file of a few kilobytes.
    gguf: Path
    #: The raw messages that were put into the broker: the dead letters that may be there.
    messages: set[bytes] = field(default_factory=set)

    @classmethod
    def start(cls, home: Path) -> World:
        """All of it warm, with one sound adapter."""
        home.mkdir(parents=True)
        broker = FragileBroker(home / "broker")
        settings = fleet_settings(home / "worker", broker.url, make_models(home))
        member, client = Member(settings, 0), Client(settings=settings)
        world = cls(broker, member, client, Loader(home), home, tiny_gguf(home / "sound.gguf"))
        wait_until(client.workers, "the worker is warm", 60)
        client.train(ADAPTER, [{"text": "ab ab"}], model=GENERATE, steps=1, rank=2, max_length=16).result(60)
        return world

    def close(self) -> None:
        self.client.close()
        self.loader.close()
        self.member.stop()
        self.broker.close()

    @property
    def adapter_files(self) -> Path:
        return self.client.settings.adapters / GENERATE / ADAPTER / "1"

    def own_folder(self, number: int) -> Path:
        """An empty folder for the input of that number."""
        made = self.folder / "inputs" / str(number)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        return made

    def presence(self, pid: int) -> Presence | None:
        """What the worker with that process says of itself; None if it says nothing that can be read."""
        try:
            return next((worker for worker in self.client.workers() if worker.pid == pid), None)
        except BrokerUnavailable:
            return None

    def judged(self, call: Callable[[], Any], allowed: tuple[type[StokerError], ...] = REFUSED) -> list[str]:
        """What is wrong with the end of a call, and with that of the job which it returns, if it does."""
        try:
            made = call()
            return self.ended(made, allowed) if isinstance(made, Job) else []
        except Exception as error:
            return wrong_error(error, allowed)

    def ended(self, job: Job[Any], allowed: tuple[type[StokerError], ...] = REFUSED) -> list[str]:
        """What is wrong with the end of a job. One that takes its time is cancelled."""
        try:
            try:
                job.result(ENOUGH)
            except JobTimeout:
                self._cancelled(job)
                job.result(ENDS_WITHIN)
        except JobTimeout:
            record = self.client.redis.hgetall(keys.job(job.id)) if _is_hash(self.client, job.id) else "no record"
            return [f"{job.id} does not end: {str(record)[:2000]}"]
        except Exception as error:
            return wrong_error(error, (*allowed, JobCancelled))
        return []

    def _cancelled(self, job: Job[Any]) -> None:
        end = time.monotonic() + ENDS_WITHIN
        while True:
            try:
                return job.cancel()
            except BrokerUnavailable:
                # Another input has spoiled a key that jobs share: the worker moves it aside within seconds.
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)


def _is_hash(client: Client, job_id: str) -> bool:
    return bool(client.redis.type(keys.job(job_id)) == b"hash")


def wrong_error(error: Exception, allowed: tuple[type[StokerError], ...]) -> list[str]:
    """An error is right if it is of the kinds that this input may end with, and says one thing in few words."""
    said = f"{type(error).__name__}: {str(error)[:1500]}"
    if isinstance(error, CallersOwn):
        return []
    if not isinstance(error, allowed):
        return [f"an error that it must not end with: {said}"]
    if len(str(error)) > LONGEST_ERROR or not str(error).strip():
        return [f"an error of {len(str(error))} letters: {said}"]
    if re.search(r"worker's log has the traceback|Traceback|user_script", str(error)):
        return [f"an error that is not meant for people: {said}"]
    return []


def as_json(document: Any) -> bytes:
    """JSON as it may be sent by a program that is not careful: NaN and half surrogates pass. What is nested too deeply
    is text that is nested too deeply."""
    try:
        return json.dumps(document).encode()
    except RecursionError:
        return b"[" * 5000

"""A prompt goes to a worker that has its beginning, if that one takes it soon.

Any worker takes a job first. If another has keys and values of a longer beginning of its prompt, the job is passed on
to that one alone; if it is not taken within `Settings.placement` seconds, it is recalled, and the next worker that asks
runs it. So a job waits a fraction of a second at most, once, and a worker that passes one on takes the next meanwhile
(delay scheduling, Zaharia et al., EuroSys 2010).

A prompt that is too long for this worker's memory of keys and values is passed on to a worker that says it has room for
it, and waits there, in its turn, until that one takes it; `recover` finds it where that one takes none any more.

Who has what is written into the broker when a job is done, and forgotten after a while. It is a hint: where it is
wrong, a prompt is prefilled that need not be.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError
from redis.exceptions import RedisError

from stoker.broker import keys, ledger
from stoker.contract import GenerateRequest, Presence
from stoker.contract.kinds import GENERATE
from stoker.local.naming import home_id
from stoker.settings import Settings
from workers.beginnings import beginnings as beginnings_of
from workers.others import others
from workers.services.background import Background

log = logging.getLogger(__name__)

#: Seconds for which the thread waits for a job to recall, before it looks whether the worker ends.
LOOK_EVERY = 0.5


class Holder(NamedTuple):
    """Who has keys and values of a beginning. `place`: what shares them, one folder or one process."""

    place: str
    worker: str

    @classmethod
    def parse(cls, text: bytes) -> Holder:
        place, _, worker = text.decode(errors="replace").partition(" ")
        return cls(place, worker)

    def __str__(self) -> str:
        return f"{self.place} {self.worker}"


class Memory(NamedTuple):
    """A worker, the tokens of a prompt whose keys and values it has room for, and its free slots."""

    worker: str
    tokens: int
    free: int


@dataclass(frozen=True)
class _Passed:
    """A job that is to be recalled at `due`, by `time.monotonic`."""

    due: float
    job_id: str
    queue: str
    worker: str


class Placing:
    """`worker`: the name of this process in the ledger. From any thread."""

    def __init__(self, settings: Settings, worker: str, redis: Any) -> None:
        self._wait, self._redis = settings.placement, redis
        self._here = Holder(_place(settings, worker), worker)
        #: None: the worker ends.
        self._passed: queue.SimpleQueue[_Passed | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread: Background | None = None

    def start(self, stopped: threading.Event) -> None:
        if self._wait:
            self._stopped = stopped
            self._thread = Background("placing", self.recall_next, stopped=stopped)
            self._thread.start()

    def stop(self) -> None:
        """Called once `stopped` is set, and no job is passed on any more: recall at once what is left, which
        nobody else would for up to four leases."""
        if self._thread is None:
            return
        self._passed.put(None)
        self._thread.join(1.0)
        try:
            while not self._passed.empty():
                self._recall(self._passed.get_nowait())
        except RedisError as error:
            log.info("jobs that were passed on are not recalled: %s", error)

    def names(self, request: GenerateRequest) -> list[str]:
        """Those of the prompt's beginnings, for `better` and later for `note`; none where no job waits for another
        worker."""
        return beginnings_of(request) if self._wait else []

    def note(self, beginnings: Sequence[str]) -> None:
        """From now on this worker has them. A broker that does not take it is asked no second time."""
        if not beginnings:
            return
        pipeline = self._redis.pipeline(transaction=False)
        for name in beginnings:
            pipeline.sadd(keys.beginning(name), str(self._here))
            pipeline.expire(keys.beginning(name), keys.BEGINNING_TTL)
        try:
            pipeline.execute()
        except RedisError as error:
            log.info("the broker does not hear which beginnings of prompts are here: %s", error)

    def better(self, model: str, beginnings: Sequence[str]) -> str | None:
        """The worker that has more of the prompt than this place has, and room for the job; None if there is none."""
        if not beginnings:
            return None
        try:
            for name, holders in self._holders(beginnings):
                if any(holder.place == self._here.place for holder in holders):
                    return None
                if room := self._rooms(model, name, holders):
                    return max(room, key=lambda worker: room[worker])
        except RedisError as error:
            log.info("the broker does not say who has the beginning of a prompt: %s", error)
        return None

    def _holders(self, beginnings: Sequence[str]) -> list[tuple[str, list[Holder]]]:
        """Each beginning that anyone has, the longest first."""
        names = list(reversed(beginnings))
        pipeline = self._redis.pipeline(transaction=False)
        for name in names:
            pipeline.smembers(keys.beginning(name))
        replies = zip(names, pipeline.execute(raise_on_error=False), strict=True)
        # What another program wrote there names nobody.
        return [(name, sorted(map(Holder.parse, reply))) for name, reply in replies if isinstance(reply, set) and reply]

    def _rooms(self, model: str, name: str, holders: Sequence[Holder]) -> dict[str, int]:
        """Slots that each of the workers which serve the model had free when it last said so; only those that had.

        Those that are gone are forgotten: a beginning that is asked for every day would have a holder for each worker
        that ever was.
        """
        said = self._redis.mget([keys.worker(holder.worker) for holder in holders])
        known = dict(zip(holders, said, strict=True))
        if gone := [str(holder) for holder, text in known.items() if text is None]:
            self._redis.srem(keys.beginning(name), *gone)
        rooms = {holder.worker: _room(model, text) for holder, text in known.items() if text is not None}
        return {worker: room for worker, room in rooms.items() if room > 0}

    def memories(self, model: str) -> list[Memory]:
        """Of the other workers that generate with the model and take jobs. Raises `RedisError`."""
        return [
            Memory(presence.worker, card.kv_tokens, _free(presence))
            for presence in others(self._redis, self._here.worker)
            for card in presence.models
            if card.takes(model, GENERATE.name) and not presence.stopping
        ]

    def recall_later(self, job_id: str, queue: str, worker: str) -> None:
        self._passed.put(_Passed(time.monotonic() + self._wait, job_id, queue, worker))

    def recall_next(self) -> None:
        try:
            passed = self._passed.get(timeout=LOOK_EVERY)
        except queue.Empty:
            return
        if passed is not None:
            self._stopped.wait(max(0.0, passed.due - time.monotonic()))
        self._recall(passed)

    def _recall(self, passed: _Passed | None) -> None:
        """One that the broker does not take comes again while its message is there; then `recover` finds it."""
        if passed is None:
            return
        try:
            recalled = ledger.recall(self._redis, passed.job_id, passed.queue, passed.worker)
        except RedisError:
            if time.monotonic() - passed.due < keys.PLACED_TTL:
                self._passed.put(passed)
            raise
        if recalled:
            log.info("job %s is anyone's again: %s did not take it", passed.job_id, passed.worker)


def _room(model: str, said: bytes) -> int:
    try:
        presence = Presence.model_validate_json(said)
    except ValidationError:
        return 0
    return _free(presence) if any(card.model == model for card in presence.models) else 0


def _free(presence: Presence) -> int:
    """Slots for jobs of generation."""
    held, most = presence.lanes.get(GENERATE.name, (0, 0))
    return most - held


def _place(settings: Settings, worker: str) -> str:
    """Workers of one machine and one home read each other's prefixes from the disk, where they keep any there."""
    if not settings.prefix_disk:
        return hashlib.sha256(worker.encode()).hexdigest()[:16]
    return hashlib.sha256(os.fsencode(f"{socket.gethostname()} {home_id(settings)}")).hexdigest()[:16]

"""Looking for jobs whose message is nowhere, and letting them wait again.

kombu takes a message off its list and then writes it down as unacknowledged: a worker that dies in between takes the
message with it. The records know (`stoker.broker.ledger.recover`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from redis.exceptions import ResponseError

from stoker.broker import keys, ledger
from stoker.broker.connection import passes
from stoker.broker.ledger import vectors
from stoker.contract import CONTRACT, ModelCard
from workers import clock
from workers.services.broker_check import warn_of
from workers.services.orphans import Orphans
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: Keys that say who does something now. Both expire: a value that does not is nobody's, and would stop it for ever.
TURNS = (keys.JANITOR, f"{keys.PREFIX}unacked_mutex")


class Janitor:
    """Looks for lost messages, in rounds. One worker at a time does a round; a lock that expires chooses it."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self._orphans = runtime, Orphans(runtime)

    def round(self) -> None:
        """Look at every queue of every known model, if nobody else has just done it."""
        redis, every = self._runtime.redis, 2 * self._runtime.settings.lease
        self._free_turns()
        if not redis.set(keys.JANITOR, self._runtime.name, nx=True, ex=every):
            return
        self._look_at_memory()
        clock.hold_lost(redis)
        if redis.ttl(keys.DEAD) == -1:
            # Its first letter is of another program, which gave it no end.
            redis.expire(keys.DEAD, keys.DEAD_TTL)
        self._forget(ledger.forget_letters, "dead letters")
        while self._forget(vectors.prune, "vectors"):
            pass
        for card in self._cards():
            for kind in card.kinds:
                self._recover(keys.queue(card.model, kind), every)
            with _despite_refusal(f"jobs of {card.model}, which nobody holds any more, cannot be ended"):
                self._orphans.sweep(card)

    def _look_at_memory(self) -> None:
        """A user, or a host, that does not let a worker ask for it must not keep lost messages from being found."""
        try:
            memory = self._runtime.redis.info("memory")
        except ResponseError as error:
            if passes(error):
                raise
            # This worker has said so at its start.
            log.debug("the broker's memory is unknown: %s", error)
            return
        warn_of(memory)

    def _free_turns(self) -> None:
        for key in TURNS:
            if self._runtime.redis.ttl(key) == -1:
                log.error("the key %s holds a value without expiry, which no worker wrote: it is deleted", key)
                self._runtime.redis.delete(key)

    def _cards(self) -> list[ModelCard]:
        found, gone = [], []
        oldest = clock.now(self._runtime.redis) - keys.MODEL_TTL
        for name, raw in self._runtime.redis.hgetall(keys.MODELS).items():
            try:
                card = ModelCard.model_validate_json(raw)
            except ValidationError:
                # Another release may write its cards in another form; its own workers look after its queues.
                log.warning("the field %r of %s is no card of a model: it is left out", name, keys.MODELS)
                continue
            if 0 < card.seen < oldest:
                gone.append(name)
            elif card.contract == CONTRACT:
                found.append(card)
        if gone:
            # The hash lives as long as any model is served, and each round looks at the queues of all that are in it.
            self._runtime.redis.hdel(keys.MODELS, *gone)
        return found

    def _forget(self, some: Callable[[Any], int], what: str) -> int:
        """Let the broker forget some of what it has kept for its time; how many."""
        forgotten = 0
        with _despite_refusal(f"old {what} cannot be looked for"):
            forgotten = some(self._runtime.redis)
        return forgotten

    def _recover(self, queue: str, older_than: float) -> None:
        with _despite_refusal(f"lost messages of {queue} cannot be looked for"):
            # A large fleet runs tens of thousands of jobs.
            for _ in range(1 + self._runtime.redis.zcard(keys.dispatched(queue)) // ledger.LOOKED_AT):
                for job_id in ledger.recover(self._runtime.redis, queue, older_than=older_than):
                    log.warning("job %s: its message was lost; it waits again", job_id)


@contextmanager
def _despite_refusal(said: str) -> Iterator[None]:
    """What the broker refuses of one thing is logged, and keeps the rest of the round from nothing. `said`: what cannot
    be done then. Raises for a broker that is away."""
    try:
        yield
    except ResponseError as error:
        if passes(error):
            raise
        log.error("%s: %s", said, error)

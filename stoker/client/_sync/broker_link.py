# Generated from stoker/client/_async/broker_link.py by `make format`: edit that file.
"""The link to a broker: what is asked of it, and what its answers mean."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator
from contextlib import closing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stoker import traces
from stoker.adapters import found
from stoker.broker import connection, keys, ledger, letters, prefixes, registry
from stoker.broker.asking import own_patience
from stoker.broker.connection import Patience, translated
from stoker.broker.ledger.discarding import discard
from stoker.broker.ledger.listing import Listing, OpenJob
from stoker.broker.ledger.record import begun, listed, summary
from stoker.broker.ledger.vectors import fetch
from stoker.broker.letters import Letter
from stoker.broker.outcome import JobStatus, lost, read_vectors, status_of
from stoker.broker.registry import AdapterEntry, Verb
from stoker.client import model_choice
from stoker.client._sync.link import Link
from stoker.client.blocking import Connections, finished, in_thread, sleep
from stoker.client.commands import Waiting
from stoker.client.following import Ended, Follower, ask_state
from stoker.client.submission import Submission
from stoker.contract import EmbedReply, ModelCard, Presence, Request, StreamToken, TrainReport, encode
from stoker.contract.control import ModelCommand, ModelReport
from stoker.contract.prefixes import PinnedPrefix, checked_length
from stoker.contract.vectors import Encoded

if TYPE_CHECKING:
    from stoker.client.blocking import Redis
    from stoker.settings import Settings

log = logging.getLogger("stoker.client")
E = TypeVar("E", StreamToken, TrainReport)


class BrokerLink:
    """`Link` over redis-py. It can be pickled: the broker's address and the key travel, without the password."""

    def __init__(
        self, settings: Settings, connections: Connections | None = None, key: str | None = None, asked: str = ""
    ) -> None:
        """`connections`: those of a link that has them already; they are closed with it. `key`: under which it sends,
        if the program chose it. `asked`: of every job that is sent, a digest of what it was asked for."""
        self._settings = settings if key is None else settings.model_copy(update={"client_key": key})
        self._key, self._asked = key, asked
        self._connections = connections or Connections(settings)
        self._sent = traces.Sent()
        self._ended = Ended()

    def __reduce__(self) -> tuple[object, ...]:
        return _link_at, (self._settings.address.without_password, self._key)

    @property
    def settings(self) -> Settings:
        return self._settings

    def with_key(self, key: str, asked: str | None = None) -> Link:
        return BrokerLink(self._settings, self._connections, key, self._asked if asked is None else asked)

    @property
    def redis(self) -> Redis:
        return self._connections.current()

    @property
    def _redis(self) -> Any:
        # redis-py types every reply as a union over its decoding modes; ours are always bytes.
        return self.redis

    def submit(self, request: Request, job_id: str, data: bytes = b"") -> None:
        with traces.sending(request, job_id) as trace:
            # In a thread: the digest of half a gigabyte would hold up an event loop.
            make = partial(Submission, self._settings, request, job_id, data, trace=trace, asked=self._asked)
            submission = in_thread(make) if data else make()
            if not self._is_there(submission):
                with translated(self._settings):
                    for part in submission.uploads(self._redis) if submission.in_parts else ():
                        part.execute()
                self._send(submission, revive=False)
        self._sent.remember(job_id, trace)

    def _is_there(self, submission: Submission) -> bool:
        """Whether a job whose input goes in parts is known already: nothing of it is sent then."""
        if not submission.in_parts:
            return False
        with translated(self._settings):
            known = summary(submission.job_id).on(self._redis)
        submission.check_known(known)
        return known.kind is not None

    def revive(self, request: Request, job_id: str, client: str | None) -> None:
        self._send(Submission(self._settings, request, job_id, client=client), revive=True)

    def _send(self, submission: Submission, *, revive: bool) -> None:
        while True:
            with translated(self._settings):
                reply = submission.transition(revive=revive).on(self._redis)
                submission.tidy(self._redis.pipeline(), reply).execute()
                if reply.state == "known":
                    submission.check_known(summary(submission.job_id).on(self._redis))
                pause = submission.pause(reply)
            if pause is None:
                return
            sleep(pause)

    def ability(self, job_id: str) -> str | None:
        with translated(self._settings, at=keys.job(job_id)):
            return (summary(job_id).on(self._redis)).ability

    def sender(self, job_id: str) -> str | None:
        with translated(self._settings, at=keys.job(job_id)):
            found = listed(job_id).on(self._redis)
        return None if found is None else found.client

    def status(self, job_id: str) -> JobStatus:
        with translated(self._settings):
            result, known = ask_state(self._redis.pipeline(), job_id).execute()
        return status_of(result, summary(job_id).parse(known), job_id)

    def begun(self, job_id: str) -> bool:
        with translated(self._settings, at=keys.job(job_id)):
            return begun(job_id).on(self._redis)

    def cancel(self, job_id: str) -> None:
        with translated(self._settings):
            known = summary(job_id).on(self._redis)
            if known.queue is None:
                raise lost(job_id)
            ledger.cancellation(job_id, known.queue).on(self._redis)

    def value(self, job_id: str, timeout: float | None) -> object:
        follower = Follower[StreamToken](self._settings, job_id, timeout=timeout)
        with traces.waiting(job_id, self._sent.of(job_id)):
            if job_id in self._ended:
                self._look_once(follower)
            for _ in self._follow(follower):
                pass
            return follower.value()

    def entries(self, job_id: str, entry: type[E], timeout: float | None) -> Generator[E]:
        follower = Follower(self._settings, job_id, entry, timeout)
        with traces.waiting(job_id, self._sent.of(job_id)):
            with closing(self._follow(follower)) as entries:
                for item in entries:
                    yield item
            self._ended.remember(job_id)
            follower.value()

    def _follow(self, follower: Follower[E]) -> Generator[E]:
        """Yield entries until the outcome is known; outlast the broker's outages for as long as patience lasts."""
        while follower.outcome is None:
            listener: Any = self._connections.listener()
            pause = 0.0
            try:
                with translated(self._settings, passing=connection.TROUBLE):
                    listener.subscribe(*follower.channels)
                follower.subscribed()
                while follower.outcome is None:
                    for item in self._more(listener, follower):
                        yield item
            except connection.TROUBLE as error:
                self._connections.doubt(listener)
                pause = follower.pause(error)
            finally:
                finished(listener.close)
            sleep(pause)

    def _look_once(self, follower: Follower[E]) -> None:
        """For a job that has ended: what it became is there, most likely, and nobody has to listen for it."""
        with suppress(*connection.TROUBLE):
            self._more(None, follower)

    def _more(self, listener: Any, follower: Follower[E]) -> list[E]:
        with translated(self._settings, passing=connection.TROUBLE), own_patience():
            if not follower.must_look:
                return follower.heard(listener.get_message(timeout=follower.wait()))
            entries = follower.looked(follower.ask(self._redis.pipeline()).execute())
            if follower.asks_why():
                self._say_who_is_missing(follower.job_id)
            if (late := follower.lateness()) is not None:
                # Its end comes as any other's: as a message.
                ledger.lateness(follower.job_id, late.queue, late.deadline).on(self._redis)
        return entries

    def _say_who_is_missing(self, job_id: str) -> None:
        """Log a warning if no living worker can run the job: silence would look like a hang."""
        job = listed(job_id).on(self._redis)
        if job is not None and not model_choice.is_served(job.model, job.kind, self._alive()):
            log.warning("job %s waits: no worker that is alive can %s with %s.", job_id, job.kind, job.model)

    def vectors(self, job_id: str, reply: EmbedReply) -> Encoded:
        patience = Patience(self._settings)
        while True:
            try:
                with translated(self._settings, passing=connection.TROUBLE), own_patience():
                    found = fetch(job_id, self._settings.patience).on(self._redis)
                    return read_vectors(reply, found.data, found.became)
            except connection.TROUBLE as error:
                sleep(patience.spend(error))

    def discard(self, job_id: str) -> None:
        with translated(self._settings):
            discard(job_id).on(self._redis)

    def workers(self) -> list[Presence]:
        with translated(self._settings):
            return self._alive()

    def _alive(self) -> list[Presence]:
        # All names of the last day: those that are gone have no presence any more, by the broker's clock.
        names = self._redis.zrange(keys.WORKERS, 0, -1)
        raw = self._redis.mget([keys.worker(name.decode(errors="replace")) for name in names]) if names else []
        return model_choice.parse_presences(raw)

    def models(self) -> dict[str, ModelCard]:
        with translated(self._settings):
            (seconds, _), raw = self._redis.pipeline(transaction=False).time().hgetall(keys.MODELS).execute()
        return model_choice.parse_cards(raw, float(seconds))

    def command(self, worker: str, command: ModelCommand, timeout: float | None) -> ModelReport:
        waiting, queue, text = Waiting(command, worker, timeout), keys.commands(worker), json.dumps(encode(command))
        with translated(self._settings):
            self._redis.pipeline().lpush(queue, text).expire(queue, keys.COMMAND_TTL).execute()
        while True:
            with translated(self._settings):
                asked = self._redis.pipeline().get(keys.command(command.id)).exists(keys.worker(worker))
                raw, alive = asked.execute()
            report = waiting.heard(raw, bool(alive))
            if report is not None:
                return report
            pause = waiting.pause()
            if pause is None:
                with translated(self._settings):
                    # All of it: it is there twice where the answer to the first sending was lost.
                    back = self._redis.pipeline().lrem(queue, 0, text).get(keys.command(command.id))
                    found, raw = back.execute()
                    raise waiting.over(taken_back=bool(found) and raw is None)
            sleep(pause)

    def jobs(self) -> dict[str, OpenJob]:
        models = self.models()
        listing = Listing(keys.queue(card.model, kind) for card in models.values() for kind in card.kinds)
        with translated(self._settings):
            ids = listing.ask_ids(self._redis.pipeline()).execute()
            records = listing.ask_records(self._redis.pipeline(), ids)
            return listing.jobs(records.execute(raise_on_error=False))

    def dead(self) -> dict[str, Letter]:
        with translated(self._settings):
            return letters.parse(self._redis.hgetall(keys.DEAD))

    def adapters(self, model: str) -> list[AdapterEntry]:
        with translated(self._settings):
            known = registry.names(self._redis.smembers(keys.adapters(model)))
            pipeline = self._redis.pipeline(transaction=False)
            for name in known:
                pipeline.hgetall(keys.adapter(model, name))
            return registry.parse_all(model, known, pipeline.execute(raise_on_error=False))

    def adapter(self, model: str, name: str) -> AdapterEntry:
        with translated(self._settings):
            raw = self._redis.hgetall(keys.adapter(model, name))
        return found(model, name, raw)

    def change_adapter(self, model: str, verb: Verb, name: str, version: int | None) -> bool:
        with translated(self._settings):
            leaving = None
            if verb == "rollback":
                # It is sent again where its answer was lost, and must not go back twice.
                leaving = registry.serving(self._redis, model, name) or b""
            return registry.change(self._redis, model, verb, name, version, leaving=leaving) is not None

    def prefixes(self, model: str) -> dict[str, PinnedPrefix]:
        with translated(self._settings):
            return prefixes.parse(self._redis.hgetall(keys.prefixes(model)))

    def pin_prefix(self, model: str, name: str, prefix: PinnedPrefix) -> PinnedPrefix:
        pinned = self.prefixes(model)
        prefixes.check_number(pinned, name, model)
        with translated(self._settings):
            seconds, microseconds = self._redis.time()
            made = prefix.model_copy(update={"time": seconds + microseconds / 1e6})
            text = checked_length(made)
            _, held, _ = prefixes.pin(self._redis.pipeline(), model, name, text).execute()
        if held != text.encode():
            # Another client was first, or another program wrote what no release reads.
            prefixes.check_number({**pinned, name: made}, name, model)
        return made

    def unpin_prefix(self, model: str, name: str) -> bool:
        with translated(self._settings):
            # Asked before: what is sent again, because its answer was lost, finds nothing any more.
            there = prefixes.pinned(self._redis, model, name)
            prefixes.unpin(self._redis.pipeline(), model, name).execute()
        return there is not None

    def close(self) -> None:
        self._connections.close()


def _link_at(address: str, key: str | None = None) -> BrokerLink:
    from stoker.settings import load_settings

    settings = load_settings()
    return BrokerLink(settings if settings.chosen_url is not None else load_settings(url=address), key=key)

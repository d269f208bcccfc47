# Generated from stoker/client/_async/jobs.py by `make format`: edit that file.
"""Jobs that were sent: waiting for them, following what they stream, cancelling."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from stoker import connection, keys, ledger
from stoker.asking import own_patience
from stoker.client.blocking import LEFT, finished, sleep
from stoker.client.following import Follower, ask_state
from stoker.client.outcome import JobStatus, lost, read_vectors, result_as, status_of
from stoker.connection import Patience, translated
from stoker.contract import AdapterResult, EmbedReply, GenerateResult, StreamToken, TrainReport, TrainResult
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, TRAIN
from stoker.contract.vectors import Encoded, plain
from stoker.ledger.record import summary

if TYPE_CHECKING:
    import numpy as np

    from stoker.client._sync.client import Client

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class Job(Generic[R]):
    """A job that was sent. It goes on whether or not a client waits for it.

    A job can be pickled, and found again in another process: see the client's own note on that.
    """

    def __init__(self, client: Client, job_id: str) -> None:
        self._client, self.id = client, job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._client, self.id)

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end and return what the job made.

        Raises the worker's error as the same class, `JobCancelled`, `JobLost`, `BrokerUnavailable` if the broker stays
        away longer than `STOKER_PATIENCE` seconds, and `JobTimeout` after `timeout` seconds (the job goes on).
        """
        return self._read(self._outcome(timeout))

    def status(self) -> JobStatus:
        """Where the job is now. Raises `JobLost` if the broker does not know it."""
        with translated(self._client.settings):
            result, known = ask_state(self._client.redis.pipeline(), self.id).execute()
        return status_of(result, summary(self.id).parse(known), self.id)

    def cancel(self) -> None:
        """Stop the job wherever it is: waiting, running, or already done (then nothing happens)."""
        with translated(self._client.settings):
            known = summary(self.id).on(self._client.redis)
            if known.queue is None:
                raise lost(self.id)
            ledger.cancellation(self.id, known.queue).on(self._client.redis)

    def _read(self, value: Any) -> R:
        raise NotImplementedError

    def _outcome(self, timeout: float | None) -> Any:
        follower = Follower[StreamToken](self._client.settings, self.id, timeout=timeout)
        for _ in self._follow(follower):
            pass
        return follower.value()

    def _entries(self, entry: type[E], timeout: float | None, cancel_on_close: bool) -> Generator[E]:
        follower = Follower(self._client.settings, self.id, entry, timeout)
        try:
            with closing(self._follow(follower)) as entries:
                for item in entries:
                    yield item
        except LEFT:
            if cancel_on_close:
                finished(self.cancel)
            raise
        follower.value()

    def _follow(self, follower: Follower[E]) -> Generator[E]:
        """Yield entries until the outcome is known; outlast the broker's outages for as long as patience lasts."""
        while follower.outcome is None:
            pubsub, pause = self._client.redis.pubsub(ignore_subscribe_messages=True), 0.0
            try:
                pubsub.subscribe(*follower.channels)
                follower.subscribed()
                while follower.outcome is None:
                    for item in self._more(pubsub, follower):
                        yield item
            except connection.TROUBLE as error:
                pause = follower.pause(error)
            finally:
                finished(pubsub.close)
            sleep(pause)

    def _more(self, pubsub: Any, follower: Follower[E]) -> list[E]:
        if not follower.must_look:
            return follower.heard(pubsub.get_message(timeout=follower.wait()))
        with own_patience():
            replies = follower.ask(self._client.redis.pipeline()).execute()
        return follower.looked(replies)


class EmbedJob(Job["np.ndarray"]):
    """`result()` is (texts, dim), float32; float16 if `dtype` asked for it."""

    def encoded(self, timeout: float | None = None) -> Encoded:
        """As `result`, except that int8 comes as it travelled: codes and scales."""
        return self._fetch(self._outcome(timeout))

    def discard(self) -> None:
        """Take the vectors out of the broker now, instead of a day after the end."""
        with translated(self._client.settings):
            self._client.redis.unlink(keys.blob(keys.vectors(self.id)))

    def _read(self, value: Any) -> np.ndarray:
        return plain(self._fetch(value))

    def _fetch(self, value: Any) -> Encoded:
        reply = result_as(EmbedReply, value)
        patience = Patience(self._client.settings)
        while True:
            try:
                with translated(self._client.settings, passing=connection.TROUBLE), own_patience():
                    return read_vectors(reply, self._client.redis.get(keys.blob(reply.blob)))
            except connection.TROUBLE as error:
                sleep(patience.spend(error))


class GenerateJob(Job[GenerateResult]):
    """`stream()` yields tokens as they are made; `result()` is the whole."""

    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> Generator[StreamToken]:
        """Every token once, in order, also those made before the call. May be called again until the stream expires.

        Leaving the loop early cancels the job, unless `cancel_on_close` is False. `timeout`: seconds without a token.
        With asyncio, a cancelled task or scope leaves it too. Where `break` or an error may leave it, wrap the stream
        in `contextlib.aclosing`, so that the job is cancelled at once.
        """
        return self._entries(StreamToken, timeout, cancel_on_close)

    def _read(self, value: Any) -> GenerateResult:
        return result_as(GenerateResult, value)


class TrainJob(Job[TrainResult]):
    """`progress()` yields a report a step; `result()` names the adapter."""

    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> Generator[TrainReport]:
        """Every report once, in order. Leaving the loop early leaves the run alone, unless `cancel_on_close`."""
        return self._entries(TrainReport, timeout, cancel_on_close)

    def _read(self, value: Any) -> TrainResult:
        return result_as(TrainResult, value)


class AdapterJob(Job[AdapterResult]):
    """`result()` says which version the adapter has become."""

    def _read(self, value: Any) -> AdapterResult:
        return result_as(AdapterResult, value)


#: Any of them, as a job is found by its id.
AnyJob = EmbedJob | GenerateJob | TrainJob | AdapterJob

#: Kind → its jobs.
JOBS: dict[str, type[EmbedJob] | type[GenerateJob] | type[TrainJob] | type[AdapterJob]] = {
    EMBED.name: EmbedJob,
    GENERATE.name: GenerateJob,
    TRAIN.name: TrainJob,
    ADAPTERS.name: AdapterJob,
}

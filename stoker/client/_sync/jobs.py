# Generated from stoker/client/_async/jobs.py by `make format`: edit that file.
"""Jobs that were sent: waiting for them, following what they stream, cancelling."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Generic, TypeVar

from stoker.broker.outcome import JobStatus, result_as, vectors_reply
from stoker.client._sync.link import Link
from stoker.client.blocking import LEFT, finished
from stoker.contract import AdapterResult, GenerateResult, RerankResult, StreamToken, TrainReport, TrainResult, Usage
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, TRAIN
from stoker.contract.requests import RERANK
from stoker.contract.vectors import Encoded, plain

if TYPE_CHECKING:
    import numpy as np

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class Job(Generic[R]):
    """A job that was sent. It goes on whether or not a client waits for it.

    A job can be pickled, and found again in another process: see the client's own note on that.
    """

    def __init__(self, link: Link, job_id: str) -> None:
        #: What carries the job's questions: that of its client. A job that was unpickled has one of its own to close.
        self.link = link
        self.id = job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.link, self.id)

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end and return what the job made.

        Raises the worker's error as the same class, `JobCancelled`, `JobLost`, `BrokerUnavailable` if the broker stays
        away longer than `STOKER_PATIENCE` seconds, and `JobTimeout` after `timeout` seconds (the job goes on).
        """
        return self._read(self.link.value(self.id, timeout))

    def status(self) -> JobStatus:
        """Where the job is now. Raises `JobLost` if the broker does not know it."""
        return self.link.status(self.id)

    def cancel(self) -> None:
        """Stop the job wherever it is: waiting, running, or already done (then nothing happens).

        Raises `JobLost` if the broker does not know it.
        """
        self.link.cancel(self.id)

    def _read(self, value: object) -> R:
        raise NotImplementedError

    def _entries(self, entry: type[E], timeout: float | None, cancel_on_close: bool) -> Generator[E]:
        try:
            with closing(self.link.entries(self.id, entry, timeout)) as entries:
                for item in entries:
                    yield item
        except LEFT:
            if cancel_on_close:
                finished(self.cancel)
            raise


class AnswerJob(Job[R]):
    """A job whose result is for its client alone."""

    def discard(self) -> None:
        """Take what the job has made out of the broker now, instead of a day after its end (vectors: ten minutes after
        they were fetched). It is gone then for all who have the job's id. Nothing, for a job that is not done."""
        self.link.discard(self.id)


class EmbedJob(AnswerJob["np.ndarray"]):
    """`result()` is (texts, dim), float32; float16 if `dtype` asked for it."""

    def encoded(self, timeout: float | None = None) -> Encoded:
        """As `result`, except that int8 comes as it travelled: codes (texts, dim) and scales, one for each text."""
        return self._fetch(self.link.value(self.id, timeout))

    def usage(self, timeout: float | None = None) -> Usage:
        """Wait for the end, and say what the job took; the vectors stay where they are."""
        return vectors_reply(self.id, self.link.value(self.id, timeout)).usage

    def _read(self, value: object) -> np.ndarray:
        return plain(self._fetch(value))

    def _fetch(self, value: object) -> Encoded:
        return self.link.vectors(self.id, vectors_reply(self.id, value))


class RerankJob(AnswerJob[RerankResult]):
    """`result()` has the score of each text, and says which are the best."""

    def _read(self, value: object) -> RerankResult:
        reply = vectors_reply(self.id, value)
        scores = plain(self.link.vectors(self.id, reply))
        return RerankResult(scores=tuple(scores.reshape(-1).tolist()), usage=reply.usage)


class GenerateJob(AnswerJob[GenerateResult]):
    """`stream()` yields tokens as they are made; `result()` is the whole."""

    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> Generator[StreamToken]:
        """Every token once, in order, also those made before the call. May be called again until the stream expires.

        Leaving the loop early cancels the job, unless `cancel_on_close` is False. `timeout`: seconds without a token.
        With asyncio, a cancelled task or scope leaves it too. Where `break` or an error may leave it, wrap the stream
        in `contextlib.aclosing`, so that the job is cancelled at once.
        """
        return self._entries(StreamToken, timeout, cancel_on_close)

    def _read(self, value: object) -> GenerateResult:
        return result_as(GenerateResult, value)


class TrainJob(Job[TrainResult]):
    """`progress()` yields a report a step; `result()` names the adapter."""

    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> Generator[TrainReport]:
        """Every report once, in order. `timeout`: seconds without a report. Leaving the loop early lets the run go on,
        unless `cancel_on_close`."""
        return self._entries(TrainReport, timeout, cancel_on_close)

    def _read(self, value: object) -> TrainResult:
        return result_as(TrainResult, value)


class AdapterJob(Job[AdapterResult]):
    """`result()` says which version the adapter has become."""

    def _read(self, value: object) -> AdapterResult:
        return result_as(AdapterResult, value)


#: Any of them, as a job is found by its id.
AnyJob = EmbedJob | RerankJob | GenerateJob | TrainJob | AdapterJob

#: Kind → its jobs.
JOBS: dict[str, type[EmbedJob] | type[GenerateJob] | type[TrainJob] | type[AdapterJob]] = {
    EMBED.name: EmbedJob,
    GENERATE.name: GenerateJob,
    TRAIN.name: TrainJob,
    ADAPTERS.name: AdapterJob,
}
#: What was asked for → its jobs.
JOBS_BY_ABILITY = {**JOBS, RERANK: RerankJob}

"""The blocking client: enqueue jobs, follow them, fetch what they make."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from stoker import client_core as core
from stoker import keys
from stoker.client_core import Dataset, JobStatus, Outcome
from stoker.connection import TROUBLE, Patience, connect, translated
from stoker.contract import (
    EmbedReply,
    GenerateResult,
    ModelCard,
    Presence,
    Request,
    StreamToken,
    TrainReport,
    TrainResult,
)
from stoker.settings import Settings, load_settings
from stoker.tail import PAGE, Limit, Tail, channels, commands

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class Client:
    """Enqueues jobs. Thread-safe; close it, or use it in `with`.

    `url` overrides `STOKER_URL`; without both it is the broker of a `stoker up` on this machine, else
    `redis://127.0.0.1:6379/0`. Every method raises `BrokerUnavailable` if the broker does not answer, and
    `InvalidRequest` before anything is sent if the request cannot be run.
    """

    def __init__(self, url: str | None = None, *, settings: Settings | None = None) -> None:
        self.settings = settings or load_settings(url=url)
        self.redis = connect(self.settings)
        self._sender = core.Sender(self.settings)

    def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        normalize: bool | None = None,
        truncate: bool = False,
    ) -> EmbedJob:
        """Turn texts into vectors: the result is float32 (len(texts), dim), in order."""
        fields = {"normalize": normalize, "truncate": truncate}
        request = core.embed_request(self._choose(model, "embed"), texts, fields)
        return EmbedJob(self, self._submit(request))

    def generate(
        self, prompt: str, *, model: str | None = None, seed: int | None = None, **options: Any
    ) -> GenerateJob:
        """Continue `prompt`. Options: adapter, max_tokens, temperature (0 is greedy), top_k, top_p."""
        request = core.generate_request(self._choose(model, "generate"), prompt, seed, options)
        return GenerateJob(self, self._submit(request))

    def train(self, name: str, dataset: Dataset, *, model: str | None = None, **options: Any) -> TrainJob:
        """Train the LoRA adapter `name` on `dataset`: a path to JSON lines, or the examples.

        Options: the fields of `TrainRequest`, such as steps, rank, alpha, learning_rate, batch_size, max_length.
        """
        job_id = core.new_job_id()
        request = core.train_request(self._choose(model, "train"), name, job_id, options)
        data = core.read_dataset(dataset)
        with translated(self.settings):
            self.redis.set(keys.blob(request.dataset), data, ex=keys.PENDING_TTL)
        return TrainJob(self, self._submit(request, job_id))

    def job(self, job_id: str) -> EmbedJob | GenerateJob | TrainJob:
        """A job that was sent before, by this process or another; raises `JobLost` if the broker does not know it."""
        with translated(self.settings):
            kind = self.redis.hget(keys.job(job_id), "kind")
        if kind is None:
            raise core.lost(job_id)
        return _JOBS[kind.decode()](self, job_id)

    def workers(self) -> list[Presence]:
        """The workers that are alive now, each with its warm models."""
        with translated(self.settings):
            names = self.redis.zrangebyscore(keys.WORKERS, time.time() - keys.PRESENCE_TTL, "+inf")
            raw = self.redis.mget([keys.worker(name.decode()) for name in names]) if names else []
        return core.parse_presences(raw)

    def models(self) -> dict[str, ModelCard]:
        """Every model that some worker serves or lately served."""
        with translated(self.settings):
            return core.parse_cards(self.redis.hgetall(keys.MODELS))

    def _choose(self, model: str | None, kind: str) -> str:
        return core.choose_model(model, kind, self.models(), self.workers())

    def _submit(self, request: Request, job_id: str | None = None) -> str:
        job_id = job_id or core.new_job_id()
        with translated(self.settings):
            pipeline = self.redis.pipeline()
            pipeline.hset(keys.job(job_id), mapping=core.job_record(request))
            pipeline.expire(keys.job(job_id), keys.PENDING_TTL)
            pipeline.execute()
        self._sender.send(job_id, request)
        return job_id

    def close(self) -> None:
        self._sender.close()
        self.redis.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Job(Generic[R]):
    """A job that was sent. It goes on whether or not anybody waits for it."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client, self.id = client, job_id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def result(self, timeout: float | None = None) -> R:
        """Wait for the end and return what the job made.

        Raises the worker's error as the same class, `JobCancelled`, `JobLost`, `BrokerUnavailable` if the broker stays
        away longer than `STOKER_PATIENCE` seconds, and `JobTimeout` after `timeout` seconds (the job goes on).
        """
        outcome = _drain(self._watch(None, timeout))
        return self._read(outcome.unwrap(self.id))

    def status(self) -> JobStatus:
        with translated(self._client.settings):
            record, known = commands(self._client.redis.pipeline(), self.id, None).execute()
        outcome = Outcome.parse(record)
        if outcome is None and not known:
            raise core.lost(self.id)
        return outcome.status if outcome else JobStatus.QUEUED

    def cancel(self) -> None:
        """Stop the job wherever it is: waiting, running, or already done (then nothing happens)."""
        with translated(self._client.settings):
            pipeline = self._client.redis.pipeline()
            pipeline.set(keys.cancel(self.id), "1", ex=keys.PENDING_TTL)
            pipeline.publish(keys.CANCELS, self.id)
            pipeline.execute()

    def _read(self, value: Any) -> R:
        raise NotImplementedError

    def _entries(self, entry: type[E], timeout: float | None, cancel_on_close: bool) -> Iterator[E]:
        try:
            outcome = yield from self._watch(Tail(entry), timeout)
        except (GeneratorExit, KeyboardInterrupt):
            if cancel_on_close:
                self.cancel()
            raise
        outcome.unwrap(self.id)

    def _watch(self, tail: Tail[E] | None, timeout: float | None) -> Generator[E, None, Outcome]:
        """Yield the entries, return the outcome; outlast the broker's outages as long as patience lasts."""
        limit, patience = Limit(self.id, timeout), Patience(self._client.settings)
        while True:
            try:
                with self._client.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
                    pubsub.subscribe(*channels(self.id, tail))
                    return (yield from self._follow(pubsub, tail, limit, patience))
            except TROUBLE as error:
                time.sleep(limit.slice(patience.spend(error)))

    def _follow(
        self, pubsub: Any, tail: Tail[E] | None, limit: Limit, patience: Patience
    ) -> Generator[E, None, Outcome]:
        while True:
            record, known, *pages = commands(self._client.redis.pipeline(), self.id, tail).execute()
            patience.renew()
            if tail is not None:
                yield from tail.replay(pages[0])
                if len(pages[0]) == PAGE:
                    continue
            outcome = Outcome.parse(record)
            if outcome is not None and outcome.ended:
                return outcome
            if outcome is None and not known:
                raise core.lost(self.id)
            yield from self._listen(pubsub, tail, limit)

    def _listen(self, pubsub: Any, tail: Tail[E] | None, limit: Limit) -> Iterator[E]:
        """Yield live entries until a gap, a result or a quiet second: then it is time to look again."""
        while (message := pubsub.get_message(timeout=limit.slice(1.0))) is not None:
            limit.restart()
            if tail is None or message["channel"] != keys.channel(self.id).encode():
                return
            entry, gap = tail.live(message["data"])
            if entry is not None:
                yield entry
            if gap:
                return


class EmbedJob(Job[np.ndarray]):
    """`result()` is float32 (texts, dim)."""

    def _read(self, value: Any) -> np.ndarray:
        reply = EmbedReply(**value)
        with translated(self._client.settings):
            return core.read_vectors(reply, self._client.redis.get(keys.blob(reply.blob)))


class GenerateJob(Job[GenerateResult]):
    """`stream()` yields tokens as they are made; `result()` is the whole."""

    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> Iterator[StreamToken]:
        """Every token once, in order, also those made before the call. May be called again until the stream expires.

        Leaving the loop early cancels the job, unless `cancel_on_close` is False. `timeout`: seconds without a token.
        """
        return self._entries(StreamToken, timeout, cancel_on_close)

    def _read(self, value: Any) -> GenerateResult:
        return GenerateResult(**value)


class TrainJob(Job[TrainResult]):
    """`progress()` yields a report a step; `result()` names the adapter."""

    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> Iterator[TrainReport]:
        """Every report once, in order. Leaving the loop early leaves the run alone, unless told otherwise."""
        return self._entries(TrainReport, timeout, cancel_on_close)

    def _read(self, value: Any) -> TrainResult:
        return TrainResult(**value)


_JOBS: dict[str, type[EmbedJob] | type[GenerateJob] | type[TrainJob]] = {
    "embed": EmbedJob,
    "generate": GenerateJob,
    "train": TrainJob,
}


def _drain(entries: Generator[Any, None, Outcome]) -> Outcome:
    while True:
        try:
            next(entries)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

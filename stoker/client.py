"""The blocking client: enqueue jobs, follow them, fetch what they make."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from stoker import client_core as core
from stoker import keys, ledger, letters
from stoker.adapters import Adapters
from stoker.bulk.chunks import ATTEMPTS, BATCH_TEXTS, Plan
from stoker.bulk.many import embed_chunks
from stoker.client_core import Dataset, JobStatus, Outcome, Prompt
from stoker.connection import TROUBLE, Patience, connect, translated
from stoker.contract import (
    AdapterResult,
    EmbedReply,
    GenerateResult,
    ModelCard,
    Presence,
    Request,
    StreamToken,
    TrainReport,
    TrainResult,
    decode,
)
from stoker.contract.vectors import Encoded, plain
from stoker.errors import InvalidRequest, JobLost
from stoker.loading import own_patience
from stoker.settings import Settings, load_settings
from stoker.tail import PAGE, QUIET, Limit, Tail, channels, commands

R = TypeVar("R")
E = TypeVar("E", StreamToken, TrainReport)


class Client:
    """Enqueues jobs. Thread-safe; close it, or use it in `with`.

    `url` overrides `STOKER_URL`; without both it is the broker of a `stoker up` on this machine, else
    `redis://127.0.0.1:6379/0`. Every method raises `BrokerUnavailable` if the broker does not answer, and
    `InvalidRequest` before anything is sent if the request cannot be run.

    `key` names who sends: clients of one queue get equal shares of it, and each has a limit of its own. `queue_wait`:
    seconds to wait for a place in a queue that is full before `QueueFull` is raised. They override
    `STOKER_CLIENT_KEY` and `STOKER_QUEUE_WAIT`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        queue_wait: float | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or load_settings(url=url, client_key=key, queue_wait=queue_wait)
        self.redis = connect(self.settings, patient=True)
        #: The registry of adapters: `list`, `get`, `load`, `promote`, `rollback`, `deactivate`, `unload`.
        self.adapters = Adapters(self)
        self._choices = core.Choices()

    def embed(
        self, texts: Sequence[str], *, model: str | None = None, job_id: str | None = None, **options: Any
    ) -> EmbedJob:
        """Turn texts into vectors: the result is float32 (len(texts), dim), in order.

        Options: normalize (None: as the model's files say), truncation ("error", "end"), prompt, dimensions, dtype
        ("float32", "float16", "int8": float32 again when it is here), priority, deadline. `job_id`: an id of your own;
        sent twice it is one job, so a call that failed half-way can be repeated.
        """
        request = core.embed_request(self.choose_model(model, "embed"), texts, options)
        return EmbedJob(self, self._submit(request, job_id))

    def embed_many(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        batch: int = BATCH_TEXTS,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """Turn any number of texts into vectors (dim,), in order, with neither side's whole in memory.

        Jobs of `batch` texts; `in_flight` of them at once (None: four for each worker that holds the model, also those
        that come later). A job that failed is sent again, `attempts` times in all. What is wrong with a text is raised
        with its place among all. Leaving early cancels what is under way. Options: as those of `embed`.
        """
        for chunk in self.embed_chunks(
            texts, model=model, batch=batch, in_flight=in_flight, attempts=attempts, **options
        ):
            yield from plain(chunk)

    def embed_chunks(
        self,
        texts: Iterable[str],
        *,
        model: str | None = None,
        batch: int = BATCH_TEXTS,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Any,
    ) -> Iterator[Encoded]:
        """As `embed_many`, but as the jobs bring it: (texts of a job, dim), int8 as codes and scales."""
        model = self.choose_model(model, "embed")
        return embed_chunks(self, texts, model, Plan(batch, in_flight, attempts), options)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        model: str | None = None,
        seed: int | None = None,
        job_id: str | None = None,
        **options: Any,
    ) -> GenerateJob:
        """Continue `prompt`: a text, token ids, or the messages of a conversation.

        Options: the fields of `GenerateRequest` (docs/generate.md), such as adapter, max_tokens, n, temperature, top_k,
        top_p, min_p, repetition_penalty, logit_bias, stop, tools, json_schema, regex, priority, deadline.
        """
        request = core.generate_request(self.choose_model(model, "generate"), prompt, seed, options)
        return GenerateJob(self, self._submit(request, job_id))

    def train(
        self, name: str, dataset: Dataset, *, model: str | None = None, job_id: str | None = None, **options: Any
    ) -> TrainJob:
        """Train the LoRA adapter `name` on `dataset`: a path to JSON lines, or the examples.

        Options: the fields of `TrainRequest`, such as steps, rank, alpha, learning_rate, batch_size, max_length.
        """
        job_id = core.checked_job_id(job_id)
        request = core.train_request(self.choose_model(model, "train"), name, dataset, job_id, options)
        return TrainJob(self, self._submit(request, job_id, core.read_dataset(dataset)))

    def _load_adapter(self, name: str, data: bytes, model: str, promote: bool, job_id: str | None) -> AdapterJob:
        job_id = core.checked_job_id(job_id)
        request = core.adapter_request(model, name, job_id, {"promote": promote})
        return AdapterJob(self, self._submit(request, job_id, data))

    def job(self, job_id: str) -> EmbedJob | GenerateJob | TrainJob | AdapterJob:
        """A job that was sent before, by this process or another; raises `JobLost` if the broker does not know it."""
        with translated(self.settings, at=keys.job(job_id)):
            kind = self.redis.hget(keys.job(job_id), "kind")
        if kind is None:
            raise core.lost(job_id)
        return _JOBS[core.known_kind(job_id, kind)](self, job_id)

    def workers(self) -> list[Presence]:
        """The workers that are alive now, each with its warm models."""
        with translated(self.settings):
            names = self.redis.zrangebyscore(keys.WORKERS, time.time() - keys.PRESENCE_TTL, "+inf")
            raw = self.redis.mget([keys.worker(name.decode(errors="replace")) for name in names]) if names else []
        return core.parse_presences(raw)

    def models(self) -> dict[str, ModelCard]:
        """Every model that some worker serves or lately served."""
        with translated(self.settings):
            return core.parse_cards(self.redis.hgetall(keys.MODELS))

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Jobs that have not ended, oldest first: id → kind, model, age in seconds, and worker if one owns it."""
        with translated(self.settings):
            queues = [keys.queue(card.model, kind) for card in self.models().values() for kind in card.kinds]
            return ledger.open_jobs(self.redis, queues)

    def dead(self) -> dict[str, dict[str, Any]]:
        """Jobs that were put aside because they killed one worker after another, and messages that no worker can read:
        id → kind, model, history."""
        with translated(self.settings):
            return letters.parse(self.redis.hgetall(keys.DEAD))

    def retry(self, job_id: str) -> EmbedJob | GenerateJob | TrainJob | AdapterJob:
        """Send a dead job again, under its own id. Raises `JobLost` if there is none of that id."""
        letter = self.dead().get(job_id)
        if letter is None:
            raise JobLost(f"job {job_id}: no dead letter of that id. `stoker jobs dead` lists them.")
        if letter["kind"] not in core.REQUESTS:
            raise InvalidRequest(f"{job_id}: a message that cannot be read and no job; nothing can be sent again.")
        request = decode(core.REQUESTS[letter["kind"]], json.loads(letter["request"]))
        self._send(core.Submission(self.settings, request, job_id), revive=True)
        return _JOBS[request.kind](self, job_id)

    def choose_model(self, model: str | None, kind: str) -> str:
        """The name to send to: that of `model`, or of the only model that is warm and can do `kind`."""
        chosen = self._choices.get(model, kind)
        return chosen or self._choices.keep(model, kind, core.choose_model(model, kind, self.models(), self.workers()))

    def _submit(self, request: Request, job_id: str | None, data: bytes = b"") -> str:
        submission = core.Submission(self.settings, request, core.checked_job_id(job_id), data)
        with translated(self.settings):
            if submission.in_parts and not self.redis.exists(keys.job(submission.job_id)):
                deque(submission.uploads(self.redis), maxlen=0)
        return self._send(submission)

    def _send(self, submission: core.Submission, *, revive: bool = False) -> str:
        while True:
            with translated(self.settings):
                reply = submission.send(self.redis, revive=revive)
                submission.tidy(self.redis, reply)
                if reply[0] == b"known":
                    submission.check_known(self.redis.hget(keys.job(submission.job_id), "kind"))
                pause = submission.pause(reply)
            if pause is None:
                return submission.job_id
            time.sleep(pause)

    def close(self) -> None:
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
        return self._read(self._outcome(timeout))

    def _outcome(self, timeout: float | None) -> Any:
        return _drain(self._watch(None, timeout)).unwrap(self.id)

    def status(self) -> JobStatus:
        with translated(self._client.settings):
            record, owner = commands(self._client.redis.pipeline(), self.id, None).execute()
        return core.status_of(record, owner, self.id)

    def cancel(self) -> None:
        """Stop the job wherever it is: waiting, running, or already done (then nothing happens)."""
        with translated(self._client.settings):
            queue = self._client.redis.hget(keys.job(self.id), "queue")
            if queue is None:
                raise core.lost(self.id)
            ledger.cancel(self._client.redis, self.id, queue.decode())

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
            with own_patience():
                record, owner, *pages = commands(self._client.redis.pipeline(), self.id, tail).execute()
            patience.renew()
            if tail is not None:
                yield from tail.replay(pages[0])
                if len(pages[0]) == PAGE:
                    continue
            outcome = Outcome.parse(record)
            if outcome is not None:
                return outcome
            if owner[0] is None:
                raise core.lost(self.id)
            outcome = yield from self._listen(pubsub, tail, limit)
            if outcome is not None:
                return outcome

    def _listen(self, pubsub: Any, tail: Tail[E] | None, limit: Limit) -> Generator[E, None, Outcome | None]:
        """Yield live entries until a gap, the result or a quiet second: then it is time to look again."""
        quiet = time.monotonic() + QUIET
        while (left := quiet - time.monotonic()) > 0:
            message = pubsub.get_message(timeout=limit.slice(left))
            if message is None:
                # Nothing yet, or the broker's word that it heard the subscription.
                continue
            limit.restart()
            quiet = time.monotonic() + QUIET
            if tail is None or message["channel"] != keys.channel(self.id).encode():
                # With a stream to complete, the result alone is not all: look again.
                return core.announced(message["data"]) if tail is None else None
            entry, gap = tail.live(message["data"])
            if entry is not None:
                yield entry
            if gap:
                return None
        return None


class EmbedJob(Job[np.ndarray]):
    """`result()` is (texts, dim), float32; float16 if `dtype` asked for it."""

    def encoded(self, timeout: float | None = None) -> Encoded:
        """As `result`, but what was asked for in int8 comes as it travelled: codes and scales."""
        return self._fetch(self._outcome(timeout))

    def discard(self) -> None:
        """Take the vectors out of the broker now, instead of a day after the end."""
        with translated(self._client.settings):
            self._client.redis.unlink(keys.blob(keys.vectors(self.id)))

    def _read(self, value: Any) -> np.ndarray:
        return plain(self._fetch(value))

    def _fetch(self, value: Any) -> Encoded:
        reply = core.result_as(EmbedReply, value)
        patience = Patience(self._client.settings)
        while True:
            try:
                with translated(self._client.settings, but=TROUBLE), own_patience():
                    return core.read_vectors(reply, self._client.redis.get(keys.blob(reply.blob)))
            except TROUBLE as error:
                time.sleep(patience.spend(error))


class GenerateJob(Job[GenerateResult]):
    """`stream()` yields tokens as they are made; `result()` is the whole."""

    def stream(self, *, timeout: float | None = None, cancel_on_close: bool = True) -> Iterator[StreamToken]:
        """Every token once, in order, also those made before the call. May be called again until the stream expires.

        Leaving the loop early cancels the job, unless `cancel_on_close` is False. `timeout`: seconds without a token.
        """
        return self._entries(StreamToken, timeout, cancel_on_close)

    def _read(self, value: Any) -> GenerateResult:
        return core.result_as(GenerateResult, value)


class TrainJob(Job[TrainResult]):
    """`progress()` yields a report a step; `result()` names the adapter."""

    def progress(self, *, timeout: float | None = None, cancel_on_close: bool = False) -> Iterator[TrainReport]:
        """Every report once, in order. Leaving the loop early leaves the run alone, unless told otherwise."""
        return self._entries(TrainReport, timeout, cancel_on_close)

    def _read(self, value: Any) -> TrainResult:
        return core.result_as(TrainResult, value)


class AdapterJob(Job[AdapterResult]):
    """`result()` says which version the adapter has become."""

    def _read(self, value: Any) -> AdapterResult:
        return core.result_as(AdapterResult, value)


_JOBS: dict[str, type[EmbedJob] | type[GenerateJob] | type[TrainJob] | type[AdapterJob]] = {
    "embed": EmbedJob,
    "generate": GenerateJob,
    "train": TrainJob,
    "adapters": AdapterJob,
}


def _drain(entries: Generator[Any, None, Outcome]) -> Outcome:
    while True:
        try:
            next(entries)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

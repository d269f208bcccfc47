# Generated from stoker/client/_async/client.py by `make format`: edit that file.
"""The client: it enqueues jobs, and asks what there is."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from stoker import keys, letters
from stoker.bulk.chunks import ATTEMPTS, BATCH_TEXTS, Plan
from stoker.client import model_choice, requests
from stoker.client._sync.adapters import Adapters
from stoker.client._sync.bulk import embed_chunks
from stoker.client._sync.jobs import (
    JOBS,
    AdapterJob,
    AnyJob,
    EmbedJob,
    GenerateJob,
    TrainJob,
)
from stoker.client.blocking import Connections, Texts, in_thread, sleep
from stoker.client.options import EmbedOptions, GenerateOptions, TrainOptions, checked_options
from stoker.client.requests import Dataset, Prompt
from stoker.client.submission import Submission
from stoker.connection import translated
from stoker.contract import ModelCard, Presence, Request
from stoker.contract.codec import read
from stoker.contract.kinds import KINDS
from stoker.contract.vectors import Encoded, plain
from stoker.errors import InvalidRequest, JobLost
from stoker.ledger.listing import Listing
from stoker.ledger.record import summary
from stoker.settings import Settings, load_settings

if TYPE_CHECKING:
    import numpy as np

_BULK = ("model", "batch", "in_flight", "attempts")


class Client:
    """Enqueues jobs. Close it, or use it in `with`. Any number of event loops and threads may share it.

    `url` overrides `STOKER_URL`; without both it is the broker of a `stoker up` on this machine, else
    `redis://127.0.0.1:6379/0`. Every method raises `BrokerUnavailable` if the broker does not answer, and
    `InvalidRequest` before anything is sent if the request cannot be run.

    `key` names the sender: clients of one queue get equal shares of it, and each has a limit of its own. `queue_wait`:
    seconds to wait for room in a queue that is full before `QueueFull` is raised. They override
    `STOKER_CLIENT_KEY` and `STOKER_QUEUE_WAIT`.

    A client and its jobs can be pickled. The broker's address travels, without the password. Where they are unpickled,
    they use the settings of that process: its own broker if it has one (`STOKER_URL`), else this address.
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
        #: The registry of adapters: `list`, `get`, `load`, `promote`, `rollback`, `deactivate`, `unload`.
        self.adapters = Adapters(self)
        self._connections = Connections(self.settings)
        self._choices = model_choice.Choices()

    @property
    def redis(self) -> Any:
        """The connection pool, as redis-py's client."""
        return self._connections.current()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.settings.address.shown}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _client_at, (self.settings.address.without_password,)

    def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[EmbedOptions],
    ) -> EmbedJob:
        """Turn texts into vectors: the result is float32 (len(texts), dim), in order.

        Options and their defaults: normalize=None (as the model's files say), truncation="error" (or "end"; also
        truncate=True), prompt=None, dimensions=None (all), dtype="float32" (or "float16", "int8": float32 again when
        it is here), priority=5 (0 is first), deadline=None. `job_id`: an id of your own; sent twice it is one job, so
        a call that failed half-way can be repeated.
        """
        fields = checked_options(options, EmbedOptions, ("model", "job_id"))
        request = requests.embed_request(self.choose_model(model, "embed"), texts, fields)
        return EmbedJob(self, self._submit(request, job_id))

    def embed_many(
        self,
        texts: Texts,
        *,
        model: str | None = None,
        batch: int = BATCH_TEXTS,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Unpack[EmbedOptions],
    ) -> Generator[np.ndarray]:
        """Turn any number of texts into vectors (dim,), in order, with neither side's whole in memory.

        Jobs of `batch` texts; `in_flight` of them at once (None: four for each worker that holds the model, also those
        that come later). A job that failed is sent again, `attempts` times in all. What is wrong with a text is raised
        with its index among all. Leaving early cancels what is under way. With asyncio `texts` may be asynchronous
        too. Options and their defaults: those of `embed`.
        """
        checked_options(options, EmbedOptions, _BULK)
        return self._rows(self._chunks(texts, model, Plan(batch, in_flight, attempts), options))

    def embed_chunks(
        self,
        texts: Texts,
        *,
        model: str | None = None,
        batch: int = BATCH_TEXTS,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Unpack[EmbedOptions],
    ) -> Generator[Encoded]:
        """As `embed_many`, except that vectors come as the jobs bring them: (texts of a job, dim), int8 as codes and
        scales."""
        checked_options(options, EmbedOptions, _BULK)
        return self._chunks(texts, model, Plan(batch, in_flight, attempts), options)

    def generate(
        self,
        prompt: Prompt | None = None,
        *,
        model: str | None = None,
        seed: int | None = None,
        job_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> GenerateJob:
        """Continue `prompt`: a text, token ids, or the messages of a conversation.

        Options and their defaults: max_tokens=128, n=1, temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0,
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, stop=(),
        stop_token_ids=(), ignore_eos=False, top_logprobs=0, json_schema=None, regex=None, adapter=None, tools=None,
        template=None, priority=5 (0 is first), deadline=None; prompt_ids=None and messages=None, which say by name
        what `prompt` is. `seed`: None draws one. What each of them means: docs/generate.md.
        """
        fields = checked_options(options, GenerateOptions, ("prompt", "model", "seed", "job_id"))
        request = requests.generate_request(self.choose_model(model, "generate"), prompt, seed, fields)
        return GenerateJob(self, self._submit(request, job_id))

    def train(
        self,
        name: str,
        dataset: Dataset,
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[TrainOptions],
    ) -> TrainJob:
        """Train the LoRA adapter `name` on `dataset`: a path to JSON lines, `worker:NAME`, or the examples.

        Options and their defaults: steps=100, rank=8, alpha=16.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        rslora=False, dora=False, dropout=0.0, batch_size=4, accumulation=1, max_length=512, learn_prompts=False,
        learning_rate=0.0002, schedule="constant", warmup_steps=0, weight_decay=0.01, clip=1.0, label_smoothing=0.0,
        gradient_checkpointing=False, held_out=0.0, eval_every=0, stop_after=0, spike=3.0, checkpoint_every=20,
        promote=True, seed=0, priority=5 (0 is first), deadline=None. What each of them means: docs/train.md.
        """
        fields = checked_options(options, TrainOptions, ("model", "job_id"))
        job_id = requests.checked_job_id(job_id)
        request = requests.train_request(self.choose_model(model, "train"), name, dataset, job_id, fields)
        return TrainJob(self, self._submit(request, job_id, in_thread(requests.read_dataset, dataset)))

    def job(self, job_id: str) -> AnyJob:
        """A job that was sent before, by this process or another; raises `JobLost` if the broker does not know it."""
        with translated(self.settings, at=keys.job(job_id)):
            known = summary(job_id).on(self.redis)
        return JOBS[requests.known_kind(job_id, known.kind).name](self, job_id)

    def workers(self) -> list[Presence]:
        """The workers that are alive now, each with its warm models."""
        with translated(self.settings):
            # All names of the last day: those that are gone have no presence any more, by the broker's clock.
            names = self.redis.zrange(keys.WORKERS, 0, -1)
            raw = self.redis.mget([keys.worker(name.decode(errors="replace")) for name in names]) if names else []
        return model_choice.parse_presences(raw)

    def models(self) -> dict[str, ModelCard]:
        """Every model that some worker serves or lately served."""
        with translated(self.settings):
            (seconds, _), raw = self.redis.pipeline(transaction=False).time().hgetall(keys.MODELS).execute()
        return model_choice.parse_cards(raw, float(seconds))

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Jobs that have not ended, oldest first: id → kind, model, age in seconds, and worker if one owns it."""
        models = self.models()
        listing = Listing(keys.queue(card.model, kind) for card in models.values() for kind in card.kinds)
        with translated(self.settings):
            ids = listing.ask_ids(self.redis.pipeline()).execute()
            return listing.jobs(listing.ask_records(self.redis.pipeline(), ids).execute())

    def dead(self) -> dict[str, dict[str, Any]]:
        """Dead letters: jobs whose workers ended one after another, and messages that no worker can read.
        id → kind, model, history."""
        with translated(self.settings):
            return letters.parse(self.redis.hgetall(keys.DEAD))

    def retry(self, job_id: str) -> AnyJob:
        """Send a dead job again, under its own id and for the client that sent it. Raises `JobLost` if there is none of
        that id."""
        letter = (self.dead()).get(job_id)
        if letter is None:
            raise JobLost(f"job {job_id}: no dead letter of that id. `stoker jobs dead` lists them.")
        if letter["kind"] not in KINDS:
            raise InvalidRequest(f"{job_id}: a message that cannot be read and no job; nothing can be sent again.")
        request = read(KINDS[letter["kind"]].request, letters.request(letter))
        self._send(Submission(self.settings, request, job_id, client=letters.sender(letter)), revive=True)
        return JOBS[request.kind](self, job_id)

    def choose_model(self, model: str | None, kind: str) -> str:
        """The name to send to: that of `model`, or of the only model that is warm and can do `kind`."""
        chosen = self._choices.get(model, kind)
        if chosen is None:
            chosen = model_choice.choose_model(model, kind, self.models(), self.workers())
        return self._choices.keep(model, kind, chosen)

    def close(self) -> None:
        """Close the connections. The client may be used again: it opens others."""
        self._connections.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _chunks(self, texts: Texts, model: str | None, plan: Plan, options: EmbedOptions) -> Generator[Encoded]:
        model = self.choose_model(model, "embed")
        with closing(embed_chunks(self, texts, model, plan, options)) as chunks:
            for chunk in chunks:
                yield chunk

    def _rows(self, chunks: Generator[Encoded]) -> Generator[np.ndarray]:
        with closing(chunks):
            for chunk in chunks:
                for vector in plain(chunk):
                    yield vector

    def _load_adapter(
        self, name: str, data: bytes, model: str, fields: dict[str, Any], job_id: str | None
    ) -> AdapterJob:
        job_id = requests.checked_job_id(job_id)
        request = requests.adapter_request(model, name, job_id, fields)
        return AdapterJob(self, self._submit(request, job_id, data))

    def _submit(self, request: Request, job_id: str | None, data: bytes = b"") -> str:
        # In a thread: the digest of half a gigabyte would hold up an event loop.
        make = partial(Submission, self.settings, request, requests.checked_job_id(job_id), data)
        submission = in_thread(make) if data else make()
        with translated(self.settings):
            if submission.in_parts and (summary(submission.job_id).on(self.redis)).kind is None:
                for part in submission.uploads(self.redis):
                    part.execute()
        return self._send(submission)

    def _send(self, submission: Submission, *, revive: bool = False) -> str:
        while True:
            with translated(self.settings):
                reply = submission.transition(revive=revive).on(self.redis)
                submission.tidy(self.redis.pipeline(), reply).execute()
                if reply.state == "known":
                    submission.check_known((summary(submission.job_id).on(self.redis)).kind)
                pause = submission.pause(reply)
            if pause is None:
                return submission.job_id
            sleep(pause)


def _client_at(address: str) -> Client:
    settings = load_settings()
    return Client(settings=settings if settings.chosen_url is not None else load_settings(url=address))

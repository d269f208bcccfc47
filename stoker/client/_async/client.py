"""The client: it enqueues jobs, and asks what there is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from stoker.broker import letters
from stoker.broker.ledger.listing import OpenJob
from stoker.broker.letters import Letter
from stoker.client import model_choice, requests
from stoker.client._async.adapters import AsyncAdapters
from stoker.client._async.broker_link import AsyncBrokerLink
from stoker.client._async.bulk_client import AsyncBulkClient
from stoker.client._async.jobs import (
    JOBS_BY_ABILITY,
    AnyAsyncJob,
    AsyncEmbedJob,
    AsyncGenerateJob,
    AsyncRerankJob,
    AsyncTrainJob,
)
from stoker.client._async.link import AsyncLink
from stoker.client._async.models import AsyncModels
from stoker.client._async.prefixes import AsyncPrefixes
from stoker.client._async.sending import send
from stoker.client.asynchronously import Joint, in_thread
from stoker.client.options import EmbedOptions, GenerateOptions, RerankOptions, TrainOptions, checked_options
from stoker.client.requests import Dataset, Prompt
from stoker.contract import Presence, Request
from stoker.contract.codec import read
from stoker.contract.kinds import EMBED, GENERATE, KINDS, TRAIN
from stoker.contract.names import Rule, checked
from stoker.contract.requests import RERANK
from stoker.errors import ConfigError, InvalidRequest, JobLost

if TYPE_CHECKING:
    from stoker.client.asynchronously import Redis
    from stoker.settings import Settings


class AsyncClient(AsyncBulkClient):
    """Enqueues jobs. Close it, or use it in `async with`. Any number of event loops and threads may share it.

    `url` overrides `STOKER_URL`; without both it is the broker of a `stoker up` that runs with this STOKER_HOME. Every
    method raises `BrokerUnavailable` if there is none, or it does not answer. What sends a job raises, before anything
    is sent, `InvalidRequest` if the request cannot be run, `UnknownModel` if no worker can run it, and `QueueFull`.
    Where it is cancelled before it returns, its job is cancelled too, unless `job_id` names it.

    `key` names the sender: clients of one queue get equal shares of it, and each has a limit of its own. `queue_wait`:
    seconds to wait for room in a queue that is full before `QueueFull` is raised. They override
    `STOKER_CLIENT_KEY` and `STOKER_QUEUE_WAIT`.

    A client and its jobs can be pickled. The broker's address travels, without the password, and the `key` that was
    given. Where they are unpickled, they use the settings of that process for the rest: its own broker if it has one
    (`STOKER_URL`), else this address.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        key: str | None = None,
        queue_wait: float | None = None,
        settings: Settings | None = None,
        link: AsyncLink | None = None,
    ) -> None:
        # pydantic-settings, and asyncio behind it, are a fifth of the import: only a client that is made needs them.
        from stoker.settings import load_settings

        #: What carries the client's questions; its jobs share it. None given: a link to the broker.
        self.link = link or AsyncBrokerLink(
            settings or load_settings(url=url, client_key=key, queue_wait=queue_wait), key=None if settings else key
        )
        #: The registry of adapters: `list`, `get`, `load`, `promote`, `rollback`, `deactivate`, `unload`.
        self.adapters = AsyncAdapters(self.link, self.choose_model)
        #: Beginnings of prompts that workers keep ready: `list`, `pin`, `unpin`.
        self.prefixes = AsyncPrefixes(self.link, self.choose_model)
        #: Which models were chosen lately.
        self.choices = model_choice.Choices()
        self._choosing: Joint[str] = Joint()
        #: `models()`: every model that some worker serves or lately served. And `load`, `unload`, `pin`, `unpin`.
        self.models = AsyncModels(self.link, self._forget_choices)

    @property
    def settings(self) -> Settings:
        """The client's settings."""
        return self.link.settings

    @property
    def redis(self) -> Redis:
        """The connection pool, as redis-py's client. Raises `ConfigError` for a client without a broker."""
        if not isinstance(self.link, AsyncBrokerLink):
            raise ConfigError("this client works in memory: it has no broker, and so no connections.")
        return self.link.redis

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.settings.shown_address}>"

    def __reduce__(self) -> tuple[object, ...]:
        return _client_over, (self.link,)

    def with_key(self, key: str, *, asked: str | None = None) -> AsyncClient:
        """A client that sends under another key, for programs that send for several users. It shares the connections
        of this one, which closes them. `asked`: a digest of what a user asked for, of all jobs that it sends: under an
        id that this user's job has which was asked for otherwise, `InvalidRequest` is raised. Raises `InvalidRequest`
        for what can be no key too."""
        client = AsyncClient(link=self.link.with_key(checked(Rule.NAME, "key", key), asked))
        client.choices, client._choosing = self.choices, self._choosing
        return client

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[EmbedOptions],
    ) -> AsyncEmbedJob:
        """Turn texts into vectors: the result is (len(texts), dim), in order, float32 unless `dtype` says float16.

        Options and their defaults: normalize=None (as the model's files say), truncation="error" (or "end"; also
        truncate=True), prompt=None, dimensions=None (all), dtype="float32" (or "float16", "int8": float32 again when
        it is here), priority=5 (0 is first), deadline=None. `job_id`: an id of your own; sent twice it is one job, so
        a call that failed half-way can be repeated.
        """
        fields = checked_options(options, EmbedOptions, ("model", "job_id"))
        request = requests.embed_request(await self.choose_model(model, EMBED.name), texts, fields)
        return AsyncEmbedJob(self.link, await self._submit(request, job_id))

    async def rerank(
        self,
        query: str,
        texts: Sequence[str],
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[RerankOptions],
    ) -> AsyncRerankJob:
        """Score each of `texts` by how well it answers `query`: the result has the scores in their order, and
        `ranking()` the best first.

        Options and their defaults: normalize=None (scores from 0 to 1, or as the model's files say; False: as the
        model makes them), truncation="error" (or "end"; also truncate=True), prompt=None (an instruction, for models
        that take one), priority=5 (0 is first), deadline=None. `job_id`: as for `embed`.
        """
        fields = checked_options(options, RerankOptions, ("query", "texts", "model", "job_id"))
        request = requests.rerank_request(await self.choose_model(model, RERANK), query, texts, fields)
        return AsyncRerankJob(self.link, await self._submit(request, job_id))

    async def generate(
        self,
        prompt: Prompt | None = None,
        *,
        model: str | None = None,
        seed: int | None = None,
        job_id: str | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerateJob:
        """Continue `prompt`: a text, token ids, or the messages of a conversation.

        Options and their defaults: max_tokens=128, n=1, temperature=0.0 (greedy), top_k=0, top_p=1.0, min_p=0.0,
        repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, logit_bias=None, stop=(),
        stop_token_ids=(), ignore_eos=False, top_logprobs=0, lookup=None, json_schema=None, regex=None, adapter=None,
        tools=None, template=None, priority=5 (0 is first), deadline=None; prompt_ids=None and messages=None, which say
        by name what `prompt` is. `seed`: None draws one. What each of them means: docs/generate.md.
        """
        fields = checked_options(options, GenerateOptions, ("prompt", "model", "seed", "job_id"))
        request = requests.generate_request(await self.choose_model(model, GENERATE.name), prompt, seed, fields)
        return AsyncGenerateJob(self.link, await self._submit(request, job_id))

    async def train(
        self,
        name: str,
        dataset: Dataset,
        *,
        model: str | None = None,
        job_id: str | None = None,
        **options: Unpack[TrainOptions],
    ) -> AsyncTrainJob:
        """Train the LoRA adapter `name` on `dataset`: a path to JSON lines, `worker:NAME`, or the examples.

        Options and their defaults: steps=100, epochs=None (instead of steps), rank=8, alpha=16.0, targets=("q_proj",
        "k_proj", "v_proj", "o_proj"), rslora=False, dora=False, dropout=0.0, batch_size=4, accumulation=1,
        max_length=512, learn_prompts=False, learning_rate=0.0002, schedule="constant", warmup_steps=0,
        weight_decay=0.01, clip=1.0, label_smoothing=0.0, gradient_checkpointing=False, held_out=0.0, held_out_lines=0
        (instead of a share), eval_every=0, stop_after=0, spike=3.0, checkpoint_every=20, promote=True, seed=0,
        priority=5 (0 is first), deadline=None. What each of them means: docs/train.md.
        """
        fields = checked_options(options, TrainOptions, ("model", "job_id"))
        named = requests.checked_job_id(job_id)
        request = requests.train_request(await self.choose_model(model, TRAIN.name), name, dataset, named, fields)
        data = await in_thread(requests.read_dataset, dataset)
        await send(self.link, request, named, data, made=job_id is None)
        return AsyncTrainJob(self.link, named)

    async def job(self, job_id: str) -> AnyAsyncJob:
        """A job that was sent before, by this process or another; raises `JobLost` if the broker does not know it."""
        ability = await self.link.ability(requests.known_by(job_id))
        return JOBS_BY_ABILITY[requests.known_ability(job_id, ability)](self.link, job_id)

    async def sender(self, job_id: str) -> str | None:
        """The key of the client that sent the job; None for one that the broker does not know."""
        return await self.link.sender(requests.known_by(job_id))

    async def workers(self) -> list[Presence]:
        """The workers that are alive now, each with its warm models."""
        return await self.link.workers()

    async def jobs(self) -> dict[str, OpenJob]:
        """Jobs that have not ended, oldest first: id → kind, model, age in seconds, and worker if one owns it."""
        return await self.link.jobs()

    async def dead(self) -> dict[str, Letter]:
        """Dead letters: jobs that crashed their workers or were given up, and messages that no worker can read.
        id → kind, model, history."""
        return await self.link.dead()

    async def retry(self, job_id: str) -> AnyAsyncJob:
        """Send a dead job again, under its own id and for the client that sent it. Raises `JobLost` if there is none of
        that id, and `InvalidRequest` for a message that is no job."""
        letter = (await self.dead()).get(requests.known_by(job_id))
        if letter is None:
            raise JobLost(f"job {job_id}: no dead letter of that id. `stoker jobs dead` lists them.")
        if letter["kind"] not in KINDS:
            raise InvalidRequest(f"{job_id}: a message that cannot be read and no job; nothing can be sent again.")
        request = read(KINDS[letter["kind"]].request, letters.request(letter))
        await self.link.revive(request, job_id, client=letters.sender(letter))
        return JOBS_BY_ABILITY[request.ability](self.link, job_id)

    async def choose_model(self, model: str | None, ability: str) -> str:
        """The name to send to: that of `model`, or of the only model that is warm and can `embed`, `rerank`, `generate`
        …, as asked. Raises `UnknownModel`."""
        chosen = self.choices.get(model, ability)
        if chosen is None:
            chosen = await self._choosing.ask((model, ability), partial(self._choice, model, ability))
        return self.choices.keep(model, ability, chosen)

    async def _choice(self, model: str | None, ability: str) -> str:
        return model_choice.choose_model(model, ability, await self.models(), await self.workers())

    def _forget_choices(self) -> None:
        self.choices.forget()
        self._choosing.forget()

    async def close(self) -> None:
        """Close the connections. The client may be used again: it opens others."""
        await self.link.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _submit(self, request: Request, job_id: str | None) -> str:
        named = requests.checked_job_id(job_id)
        await send(self.link, request, named, made=job_id is None)
        return named


def _client_over(link: AsyncLink) -> AsyncClient:
    return AsyncClient(link=link)

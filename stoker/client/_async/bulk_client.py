"""The client's bulk calls: any number of texts or requests, with neither side's whole in memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from stoker.client._async.bulk import AsyncEmbedder, AsyncGeneratingClient, embed_chunks, generate_answers
from stoker.client.asked import common_options
from stoker.client.asynchronously import Asks, Texts
from stoker.client.chunks import ATTEMPTS, BATCH_TEXTS, Plan
from stoker.client.options import EmbedOptions, GenerateManyOptions, checked_options
from stoker.contract import GenerateResult
from stoker.contract.kinds import EMBED
from stoker.contract.vectors import Encoded, plain
from stoker.errors import StokerError

if TYPE_CHECKING:
    import numpy as np

_BULK = ("model", "batch", "in_flight", "attempts")


class AsyncBulkClient(AsyncEmbedder, AsyncGeneratingClient):
    """What a client does by its own `embed` and `generate`, job by job."""

    def embed_many(
        self,
        texts: Texts,
        *,
        model: str | None = None,
        batch: int = BATCH_TEXTS,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Unpack[EmbedOptions],
    ) -> AsyncGenerator[np.ndarray]:
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
    ) -> AsyncGenerator[Encoded]:
        """As `embed_many`, except that vectors come as the jobs bring them: (texts of a job, dim), int8 as codes and
        scales."""
        checked_options(options, EmbedOptions, _BULK)
        return self._chunks(texts, model, Plan(batch, in_flight, attempts), options)

    def generate_many(
        self,
        requests: Asks,
        *,
        model: str | None = None,
        seed: int | None = None,
        in_flight: int | None = None,
        attempts: int = ATTEMPTS,
        **options: Unpack[GenerateManyOptions],
    ) -> AsyncGenerator[GenerateResult | StokerError]:
        """Answer any number of requests, in order, with neither side's whole in memory.

        A request is a prompt, as `generate` takes it, or a mapping with `prompt`, `prompt_ids` or `messages` and
        options of its own, `model` and `seed` too. What is given here holds for those that do not say otherwise. An
        `InvalidRequest` in the place of one that could not be read keeps that place.

        In the place of a request that cannot be answered comes its error, a `StokerError` that is not raised: the
        others go on. Raised is what meets all of them: options that are wrong here, no model, no broker.

        `in_flight` jobs at once (None: half of what each worker that holds the model can run, also those that come
        later). A job that failed is sent again, `attempts` times in all. Leaving early cancels what is under way. With
        asyncio `requests` may be asynchronous too. Options and their defaults: those of `generate`.
        """
        common = common_options(model, seed, options)
        return generate_answers(self, requests, Plan(1, in_flight, attempts), common)

    async def _chunks(
        self, texts: Texts, model: str | None, plan: Plan, options: EmbedOptions
    ) -> AsyncGenerator[Encoded]:
        model = await self.choose_model(model, EMBED.name)
        async with aclosing(embed_chunks(self, texts, model, plan, options)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _rows(self, chunks: AsyncGenerator[Encoded]) -> AsyncGenerator[np.ndarray]:
        async with aclosing(chunks):
            async for chunk in chunks:
                for vector in plain(chunk):
                    yield vector

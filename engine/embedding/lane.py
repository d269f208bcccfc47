"""Embedding jobs of one model: their texts share batches, sorted by length, whatever job they come from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from engine.embedding.pooling import pool
from engine.loading import LoadedModel
from engine.ticket import StepOutput, Ticket
from stoker.contract import EmbedRequest
from stoker.errors import TextTooLong

#: Tokens of a batch, padding included: enough to fill the matmuls, little enough to let other lanes in between.
BATCH_TOKENS = 4096
#: What the models of the E5 family are trained with (Wang et al. 2022, arXiv:2212.03533).
E5_PROMPTS = {"query": "query: ", "passage": "passage: "}
#: Waiting texts that are looked at for neighbours in length.
WINDOW = 1024


@dataclass(eq=False)
class EmbedWork:
    ticket: Ticket
    request: EmbedRequest
    texts: list[list[int]]
    vectors: np.ndarray
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.texts)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True)
class _Text:
    work: EmbedWork
    row: int

    @property
    def tokens(self) -> list[int]:
        return self.work.texts[self.row]


class EmbedLane:
    kind = "embed"

    def __init__(self, model: LoadedModel) -> None:
        assert model.embedding is not None, "an embedding lane needs an embedding model"
        self._model, self._spec = model, model.embedding
        self._waiting: deque[_Text] = deque()

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def prepare(self, ticket: Ticket, request: EmbedRequest, data: None) -> EmbedWork:
        prompt = self._prompt(request.prompt)
        texts = self._model.tokenizer.encode_batch([prompt + text for text in request.texts])
        longest = self._spec.max_tokens
        for number, tokens in enumerate(texts):
            if len(tokens) > longest and not request.truncate:
                raise TextTooLong(
                    f"texts.{number}: {len(tokens)} tokens given; {request.model} takes {longest}. "
                    "Shorten it, or pass truncate=True to cut it."
                )
        # Cut before the closing special token, so that a cut text still ends as the model knows it.
        cut = [t if len(t) <= longest else [*t[: longest - 1], t[-1]] for t in texts]
        return EmbedWork(ticket, request, cut, np.empty((len(texts), self._spec.dim), dtype=np.float32))

    def _prompt(self, asked: str | None) -> str:
        known = {**E5_PROMPTS, **self._spec.prompts}
        name = self._spec.default_prompt if asked is None else asked
        return "" if name is None else known.get(name, name)

    def admit(self, work: EmbedWork) -> None:
        work.ticket.start()
        self._waiting.extend(_Text(work, row) for row in range(len(work.texts)))

    def drop_stopped(self) -> None:
        cancelled = {text.work for text in self._waiting if text.work.ticket.stopping}
        if cancelled:
            self._waiting = deque(text for text in self._waiting if text.work not in cancelled)
            for work in cancelled:
                work.ticket.fail_stopped()

    def run(self) -> StepOutput:
        """Embed one batch: the text that waits longest, and those nearest to it in length."""
        batch = self._next_batch()
        try:
            vectors = self._forward(batch)
        except BaseException:
            # Back among those that wait, where `fail_all` finds them.
            self._waiting.extendleft(batch)
            raise
        output = StepOutput()
        for text, vector in zip(batch, vectors, strict=True):
            work = text.work
            work.vectors[text.row] = vector
            work.left -= 1
            if work.left == 0:
                output.ended.append((work.ticket, work))
        return output

    def _next_batch(self) -> list[_Text]:
        window = [self._waiting[place] for place in range(min(WINDOW, len(self._waiting)))]
        ranked = sorted(window, key=lambda text: len(text.tokens))
        first = last = ranked.index(window[0])
        # Grow downwards first: shorter neighbours do not widen the padding of those that are in.
        while first > 0 and (last - first + 2) * len(ranked[last].tokens) <= BATCH_TOKENS:
            first -= 1
        while last + 1 < len(ranked) and (last - first + 2) * len(ranked[last + 1].tokens) <= BATCH_TOKENS:
            last += 1
        batch = ranked[first : last + 1]
        taken = set(batch)
        self._waiting = deque(text for text in self._waiting if text not in taken)
        return batch

    def _forward(self, batch: list[_Text]) -> np.ndarray:
        lengths = [len(text.tokens) for text in batch]
        longest = max(lengths)
        tokens = np.full((len(batch), longest), self._model.tokenizer.pad_id or 0, dtype=np.int32)
        for place, text in enumerate(batch):
            tokens[place, : lengths[place]] = text.tokens
        # Without padding no mask is needed, and attention without a mask is the faster one.
        mask = None if min(lengths) == longest else mx.array(np.arange(longest)[None] < np.array(lengths)[:, None])
        hidden = self._model.encoder(mx.array(tokens), mask)
        vectors = pool(hidden, mask, self._spec.pooling)
        normalize = mx.array([self._normalized(text.work.request) for text in batch])
        unit = vectors / mx.maximum(mx.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return np.array(mx.where(normalize[:, None], unit, vectors))

    def _normalized(self, request: EmbedRequest) -> bool:
        return self._spec.normalize if request.normalize is None else request.normalize

    def fail_all(self, error: BaseException) -> None:
        for work in {text.work for text in self._waiting}:
            work.ticket.fail(error)
        self._waiting.clear()

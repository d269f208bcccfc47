"""Embedding jobs of one model: their texts share batches, whatever job they come from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from engine.embedding.forward import Tokens, Vectors, forward_of
from engine.embedding.pace import Pace
from engine.embedding.packing import evenly
from engine.loading import LoadedModel
from engine.ticket import StepOutput, Ticket
from stoker.contract import EmbedRequest
from stoker.errors import InvalidRequest, TextTooLong

#: Seconds that a step should last: a token of another job waits no longer.
STEP_SECONDS = 0.1
#: Tokens of a step at the most, however fast the machine is.
MOST_TOKENS = 131_072
#: What the models of the E5 family are trained with (Wang et al. 2022, arXiv:2212.03533).
E5_PROMPTS = {"query": "query: ", "passage": "passage: "}


@dataclass(eq=False)
class EmbedWork:
    ticket: Ticket
    request: EmbedRequest
    texts: list[Tokens]
    vectors: Vectors
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = len(self.texts)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(frozen=True, order=True)
class _Text:
    """One text that waits. They are served by `turn`."""

    turn: int
    number: int
    work: EmbedWork = field(compare=False)
    row: int = field(compare=False)

    @property
    def tokens(self) -> Tokens:
        return self.work.texts[self.row]


class EmbedLane:
    """Start-time fair queueing over jobs (Goyal et al. 1996), in tokens.

    The turn of a text is the lane's present when its job came, and the tokens of its job before it. So the first texts
    of a new job go into the next batch beside those that a large one has got to: a small job never waits behind a
    large one, and no job starves.

    `stall`: seconds that a step may last, if less than `STEP_SECONDS`.
    """

    kind = "embed"

    def __init__(self, model: LoadedModel, stall: float = STEP_SECONDS) -> None:
        assert model.embedding is not None, "an embedding lane needs an embedding model"
        self._model, self._spec = model, model.embedding
        self._forward = forward_of(model)
        seconds = min(stall, STEP_SECONDS)
        # Who asks for less time between two tokens gets shorter steps, though the device idles.
        self._pace = Pace(seconds, int(self._forward.least_tokens * seconds / STEP_SECONDS), MOST_TOKENS)
        self._waiting: list[_Text] = []
        self._works: set[EmbedWork] = set()
        #: The turn of the last text that was served, and how many texts ever came.
        self._present = self._count = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def prepare(self, ticket: Ticket, request: EmbedRequest, data: None) -> EmbedWork:
        self._check_dimensions(request)
        prompt = self._prompt(request.prompt)
        texts = self._model.tokenizer.encode_batch([prompt + text for text in request.texts])
        longest = self._spec.max_tokens
        for number, tokens in enumerate(texts):
            if len(tokens) > longest and request.truncation == "error":
                raise TextTooLong(
                    f"texts.{number}: {len(tokens)} tokens given; {request.model} takes {longest}. "
                    'Shorten it, or pass truncation="end" to cut it.'
                )
        # Cut before the closing special token, so that a cut text still ends as the model knows it.
        cut = [t if len(t) <= longest else [*t[: longest - 1], t[-1]] for t in texts]
        rows = [np.array(tokens, dtype=np.int32) for tokens in cut]
        return EmbedWork(ticket, request, rows, np.empty((len(rows), self._spec.dim), dtype=np.float32))

    def _check_dimensions(self, request: EmbedRequest) -> None:
        asked, allowed = request.dimensions, self._spec.dimensions
        if asked is None or asked == self._spec.dim or asked in allowed:
            return
        if not allowed:
            raise InvalidRequest(
                f"dimensions: {asked} given; {request.model} makes {self._spec.dim}. It was not trained to be "
                "cut, or its config.json does not say so (matryoshka_dimensions)."
            )
        shown = f"1 to {self._spec.dim}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
        raise InvalidRequest(f"dimensions: {asked} given; {request.model} makes {shown}.")

    def _prompt(self, asked: str | None) -> str:
        known = {**E5_PROMPTS, **self._spec.prompts}
        name = self._spec.default_prompt if asked is None else asked
        return "" if name is None else known.get(name, name)

    def admit(self, work: EmbedWork) -> None:
        work.ticket.start()
        self._works.add(work)
        turn = self._present
        # Nobody sees in which order a job's texts are embedded: those of a length meet in a step.
        for row in sorted(range(len(work.texts)), key=lambda row: -len(work.texts[row])):
            heappush(self._waiting, _Text(turn, self._count, work, row))
            turn += len(work.texts[row])
            self._count += 1

    def drop_stopped(self) -> None:
        stopped = {work for work in self._works if work.ticket.stopping}
        if stopped:
            self._works -= stopped
            self._waiting = [text for text in self._waiting if text.work not in stopped]
            heapify(self._waiting)
            for work in stopped:
                work.ticket.fail_stopped()

    def run(self) -> StepOutput:
        """Embed the texts whose turn it is."""
        batch = self._next_batch()
        began = time.perf_counter()
        vectors = self._forward([text.tokens for text in batch])
        self._pace.note(sum(len(text.tokens) for text in batch), time.perf_counter() - began)
        return self._hand_out(batch, vectors)

    def _next_batch(self) -> list[_Text]:
        """As many tokens as the pace allows, or a text for each stream; a few less where that keeps them busier."""
        batch: list[_Text] = []
        streams = self._forward.streams
        room = max(self._pace.tokens, streams * len(self._waiting[0].tokens))
        while self._waiting and len(self._waiting[0].tokens) <= room:
            text = heappop(self._waiting)
            batch.append(text)
            room -= len(text.tokens)
        for _ in range(len(batch) - evenly([len(text.tokens) for text in batch], streams)):
            heappush(self._waiting, batch.pop())
        self._present = max(self._present, batch[-1].turn)
        return batch

    def _hand_out(self, batch: list[_Text], vectors: Vectors) -> StepOutput:
        output = StepOutput()
        for text, vector in zip(batch, vectors, strict=True):
            work = text.work
            work.vectors[text.row] = vector
            work.left -= 1
            if work.left == 0:
                self._works.discard(work)
                work.vectors = self._finished(work)
                output.ended.append((work.ticket, work))
        return output

    def _finished(self, work: EmbedWork) -> Vectors:
        """Cut first, then scaled: a cut vector has to have the length of one too."""
        asked = work.request
        vectors = work.vectors if asked.dimensions is None else work.vectors[:, : asked.dimensions]
        normalize = self._spec.normalize if asked.normalize is None else asked.normalize
        return unit(vectors) if normalize else vectors

    def fail_all(self, error: BaseException) -> None:
        for work in self._works:
            work.ticket.fail(error)
        self._works.clear()
        self._waiting.clear()


def unit(vectors: Vectors) -> Vectors:
    """Each row at length one; a row of zeros stays."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    scaled: Vectors = vectors / lengths
    return scaled

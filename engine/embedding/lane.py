"""Embedding jobs of one model: texts of different jobs share batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.loading import LoadedModel
from engine.embedding.forward import Forward, Tokens, Vectors, forward_of
from engine.embedding.pacer import EmbedPacer
from engine.embedding.tokenizing import named, tokenized
from engine.embedding.turns import Turns
from engine.ticket import StepOutput, Ticket
from stoker.contract import EmbedRequest
from stoker.contract.vectors import Embedded
from stoker.errors import InvalidRequest, ModelError

log = logging.getLogger(__name__)

#: Seconds that a step should last: a token of another job waits no longer.
STEP_SECONDS = 0.1
#: Tokens of a step at most, however fast the machine is.
MOST_TOKENS = 131_072
#: What the models of the E5 family are trained with (Wang et al. 2022, arXiv:2212.03533).
E5_PROMPTS = {"query": "query: ", "passage": "passage: "}
#: What sentence-transformers has in every model: many name a prompt for queries alone.
USUAL_PROMPTS = {"document": ""}


@dataclass(eq=False)
class EmbedWork:
    ticket: Ticket[Embedded]
    request: EmbedRequest
    texts: list[Tokens]
    #: A row a text, zeros until it is embedded. They stay where a text has no token: the mean of nothing, as
    #: sentence-transformers has it.
    vectors: Vectors
    #: Texts that are still to be embedded.
    left: int = field(init=False)

    def __post_init__(self) -> None:
        self.left = sum(len(text) > 0 for text in self.texts)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


class EmbedLane:
    """Jobs wait in `Turns`. What fails for one job ends that job alone, and its error names the text; `fail_all` is for
    a device that computes nothing any more.

    `stall`: seconds that a step may last, if less than `STEP_SECONDS`. `cores`: how many a CPU gives; None: all.
    `forward`, `pacer`: the pass through the model and the size of a step, where they are not the device's.
    """

    kind = EmbedRequest.kind

    def __init__(
        self,
        model: LoadedModel,
        stall: float = STEP_SECONDS,
        cores: int | None = None,
        *,
        forward: Forward | None = None,
        pacer: EmbedPacer | None = None,
    ) -> None:
        assert model.embedding is not None, "an embedding lane needs an embedding model"
        self._model, self._spec = model, model.embedding
        self._forward = forward or forward_of(model, cores)
        seconds = min(stall, STEP_SECONDS)
        # Who asks for less time between two tokens gets shorter steps, though the device idles.
        least = int(self._forward.least_tokens * seconds / STEP_SECONDS)
        #: How many tokens a step takes.
        self.pacer = pacer or EmbedPacer(seconds, least, MOST_TOKENS)
        self._turns: Turns[EmbedWork] = Turns()
        #: Every job from `admit` to its end, in the order in which they came.
        self._works: dict[EmbedWork, None] = {}

    def warming(self) -> Iterator[None]:
        """Compile, in slices, what its first job would wait for."""
        try:
            yield from self._forward.warming()
        except Exception as error:
            # Its jobs will say the same; other models of this worker serve.
            log.error("model %s cannot embed: %s", self._model.name, error)

    @property
    def busy(self) -> bool:
        return bool(self._works)

    @property
    def held(self) -> list[EmbedWork]:
        """Every job that was admitted and has not ended, in the order in which they came."""
        return list(self._works)

    @property
    def waiting(self) -> list[EmbedWork]:
        """Jobs with a text that waits for its turn."""
        return self._turns.jobs

    def prepare(self, ticket: Ticket[Embedded], request: EmbedRequest, data: None) -> EmbedWork:
        if request.query is not None:
            raise InvalidRequest(
                f"query: given, and {request.model} makes vectors: it has no head that scores a text against a query. "
                "Rerank with a model that has one (docs/rerank.md), or embed the query and the texts."
            )
        self._check_dimensions(request)
        rows = tokenized(self._model.tokenizer, request, self._prompt(request.prompt), self._spec.max_tokens)
        return EmbedWork(ticket, request, rows, np.zeros((len(rows), self._spec.dim), dtype=np.float32))

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
        known = {**USUAL_PROMPTS, **E5_PROMPTS, **self._spec.prompts}
        name = self._spec.default_prompt if asked is None else asked
        return "" if name is None else known.get(name, name)

    def admit(self, work: EmbedWork) -> None:
        self._works[work] = None
        self._turns.add(work, [len(text) for text in work.texts])
        work.ticket.start()

    def drop_stopped(self) -> None:
        for work in [work for work in self._works if work.ticket.stopping]:
            work.ticket.fail_stopped()
            self._forget(work)

    def run(self, *, lookahead: bool = True) -> StepOutput:
        """Embed the texts whose turn it is, and end the jobs that have no other."""
        output = StepOutput()
        if self._turns:
            batch = self._turns.take(self.pacer.tokens, self._forward.streams)
            began = time.perf_counter()
            self._embed(batch, probed=False)
            output.rows = len(batch)
            self.pacer.note(sum(len(work.texts[row]) for work, row in batch), time.perf_counter() - began)
        for work in self._works:
            if not work.left:
                self._end(work, output)
        # All at once, when nothing can fail any more: what `fail_all` does not find must be in `output`.
        self._works = {work: None for work in self._works if work.left}
        return output

    def _embed(self, batch: list[tuple[EmbedWork, int]], *, probed: bool) -> None:
        """Keep the vectors of `batch`. One that fails is halved until the texts that it fails of are found.

        Raises what it failed of if the device fails with the least of batches too.
        """
        batch = [(work, row) for work, row in batch if work in self._works]
        if not batch:
            return
        try:
            vectors = self._forward([work.texts[row] for work, row in batch])
        except Exception as caught:
            error = caught
        else:
            finite: NDArray[np.bool_] = np.all(np.isfinite(vectors), axis=1)
            for (work, row), vector, whole in zip(batch, vectors, finite, strict=True):
                self._keep(work, row, vector if whole else None)
            return
        if not probed:
            self._probe(error)
        if len(batch) == 1:
            self._fail(*batch[0], error)
            return
        middle = len(batch) // 2
        self._embed(batch[:middle], probed=True)
        self._embed(batch[middle:], probed=True)

    def _probe(self, error: Exception) -> None:
        """Raise `error` unless the device embeds a text of one token."""
        try:
            self._forward([np.zeros(1, dtype=np.int32)])
        except Exception:
            raise error from None

    def _keep(self, work: EmbedWork, row: int, vector: Vectors | None) -> None:
        """`vector`: None if a number of it is not finite."""
        if work not in self._works:
            return
        if vector is None:
            said = "its vector is not finite. The model's weights are damaged, or too large for its dtype"
            self._fail(work, row, ModelError(f"{said}: see `stoker models verify`, or load it in float32."))
            return
        work.vectors[row] = vector
        work.left -= 1

    def _end(self, work: EmbedWork, output: StepOutput) -> None:
        try:
            found = Embedded(self._finished(work), work.tokens, work.ticket.run_seconds)
        except Exception as error:
            log.exception("the vectors of job %s could not be finished", work.ticket.job_id)
            work.ticket.fail(error)
        else:
            output.end(work.ticket, found)

    def _fail(self, work: EmbedWork, row: int, error: Exception) -> None:
        """End a job by what failed for its text `row`."""
        log.error("text %d of job %s failed", row, work.ticket.job_id, exc_info=error)
        work.ticket.fail(named(row, error))
        self._forget(work)

    def _forget(self, work: EmbedWork) -> None:
        """Let go of a job, after its end: until then `fail_all` has to find it."""
        del self._works[work]
        self._turns.remove(work)

    def _finished(self, work: EmbedWork) -> Vectors:
        """Cut first, then scaled: a cut vector has to have the length of one too."""
        asked = work.request
        vectors = work.vectors if asked.dimensions is None else work.vectors[:, : asked.dimensions]
        normalize = self._spec.normalize if asked.normalize is None else asked.normalize
        made = unit(vectors) if normalize else vectors
        if asked.dtype == "float16" and (beyond := np.abs(made).max(axis=1) > np.finfo(np.float16).max).any():
            raise InvalidRequest(
                f"texts.{beyond.argmax()}: float16 given, and its vector has a number beyond 65504. "
                'Ask for dtype="float32" or normalize=True.'
            )
        return made

    def fail_all(self, error: BaseException) -> None:
        for work in self._works:
            work.ticket.fail(error)
        self._works, self._turns = {}, Turns()


def unit(vectors: Vectors) -> Vectors:
    """Each row at length one; a row of zeros stays."""
    # In float64: the squares of large numbers are beyond float32, and such a row would become zeros.
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled: Vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled

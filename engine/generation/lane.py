"""Continuous batching: requests join between two steps, decode together, and leave when they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

import mlx.core as mx

from engine.adapters.pool import AdapterPool
from engine.generation.prompt import check_ids, tokenize
from engine.generation.row import Generation, Row
from engine.generation.sampling import sample
from engine.loading import LoadedModel
from engine.models.cache import KVCache
from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateRequest, StreamToken

#: Tokens of a prompt that go through the model at once: long enough for full matmuls, short enough that the streams
#: beside it wait for one chunk only.
PREFILL_CHUNK = 256


class GenerateLane:
    """All generation jobs of one model. `slots` rows decode at once; more wait in order of arrival."""

    kind = "generate"

    def __init__(self, model: LoadedModel, pool: AdapterPool, slots: int) -> None:
        self._model, self._pool, self._slots = model, pool, slots
        self._decoder = model.decoder
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._reset_cache()

    def _reset_cache(self) -> None:
        self._cache = KVCache.for_model(self._decoder, slots=self._slots)
        self._free = list(range(self._slots))

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def prepare(self, ticket: Ticket, request: GenerateRequest, data: Sequence[StreamToken] | None) -> Generation:
        check_ids(self._model, request)
        prompt = tokenize(self._model, request)
        if request.adapter is not None:
            self._pool.check(request.adapter)
        generation = Generation(ticket, request, prompt, self._model.tokenizer, self._model.context)
        generation.resume(data or ())
        return generation

    def admit(self, work: Generation) -> None:
        if work.ended:
            # Its last token was published before; only the result is missing.
            work.ticket.start()
            work.ticket.resolve(work.result())
            return
        self._waiting.extend(row for row in work.rows if not row.finish_reason)

    def drop_stopped(self) -> None:
        for row in [row for row in (*self._waiting, *self._rows) if row.ticket.stopping]:
            self._release(row)
            row.ticket.fail_stopped()

    def run(self) -> StepOutput:
        """Seat who waits, push one prompt on by a chunk, decode everybody who is ready by one token."""
        output = StepOutput()
        self._seat()
        rows = [row for row in self._rows if len(row.uncached) == 1 and row.tokens]
        self._prefill(output)
        self._decode(rows, output)
        return output

    def _seat(self) -> None:
        while self._waiting and self._free:
            row = self._waiting.popleft()
            try:
                row.adapter = self._pool.acquire(row.request.adapter)
            except Exception as error:
                # A damaged adapter file fails the job that asked for it, not its neighbours.
                self._fail(row, error)
                continue
            row.slot = heappop(self._free)
            row.ticket.start()
            self._rows.append(row)

    def _fail(self, row: Row, error: Exception) -> None:
        row.ticket.fail(error)
        for other in row.generation.rows:
            self._release(other)

    def _prefill(self, output: StepOutput) -> None:
        row = next((row for row in self._rows if not row.tokens or len(row.uncached) > 1), None)
        if row is None:
            return
        chunk = row.uncached[:PREFILL_CHUNK]
        self._cache.ensure(row.cached + len(chunk))
        view = self._cache.prefill_view(row.slot, row.cached, len(chunk))
        hidden = self._decoder(mx.array([chunk]), cache=view, adapters=self._pool.rows([row.adapter]))
        row.cached += len(chunk)
        if not row.uncached:
            self._extend([row], hidden, output)
        mx.eval(self._cache.arrays())

    def _decode(self, rows: list[Row], output: StepOutput) -> None:
        # Ascending slots without holes are read where they lie; any other order copies their keys and values.
        rows.sort(key=lambda row: row.slot)
        if not rows:
            return
        self._cache.ensure(max(row.cached for row in rows) + 1)
        view = self._cache.decode_view([row.slot for row in rows], [row.cached for row in rows])
        tokens = mx.array([row.tokens[-1:] for row in rows])
        hidden = self._decoder(tokens, cache=view, adapters=self._pool.rows([row.adapter for row in rows]))
        for row in rows:
            row.cached += 1
        self._extend(rows, hidden, output)
        mx.eval(self._cache.arrays())

    def _extend(self, rows: list[Row], hidden: mx.array, output: StepOutput) -> None:
        """Sample the next token of each row from its last hidden state, (rows, tokens, width)."""
        logits = self._decoder.logits(hidden[:, -1])
        for row, pick in zip(rows, sample(logits, [row.draw() for row in rows]), strict=True):
            row.generation.extend(row, pick, output)
            if row.finish_reason:
                self._release(row)

    def _release(self, row: Row) -> None:
        if row in self._waiting:
            self._waiting.remove(row)
        if row in self._rows:
            self._rows.remove(row)
            heappush(self._free, row.slot)
            self._pool.release(row.adapter)

    def fail_all(self, error: BaseException) -> None:
        for row in (*self._waiting, *self._rows):
            row.ticket.fail(error)
        for row in self._rows:
            self._pool.release(row.adapter)
        self._waiting.clear()
        self._rows.clear()
        self._reset_cache()

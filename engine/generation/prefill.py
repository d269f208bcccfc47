"""Prompts on their way into the batch: a few at a time, a chunk of each in one pass."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import mlx.core as mx
import numpy as np

from engine.adapters.pool import AdapterPool
from engine.generation.batch import SMALLEST_KV_LENGTH, gather
from engine.generation.draws import Draw, Pick
from engine.generation.forward_input import ForwardInput
from engine.generation.prefixes import PrefixCache
from engine.generation.row import Row, RowState
from engine.generation.sampling import picks
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step, bucket
from engine.models.cache import KeyValues
from engine.models.decoder import Decoder

#: Tokens of a chunk, all rows together. At least: each takes a pass over the weights; with 16 on a CPU, streams during
#: a long prompt would wait a fifth less, and new requests half as long again. At most: activations take memory, too.
LEAST, MOST = 32, 2048
#: Tokens of a chunk up to which the pass over the weights is most of what it takes: then it takes the rest of a prompt
#: along that is at most half as long.
FEW = 4 * LEAST


class PrefillPacer:
    """How long a chunk may be: the tokens that take about the seconds asked for, found by doubling and halving.

    A speed would not do: on a GPU 64 tokens take as long as 512, because launching the kernels is what takes it.
    """

    def __init__(self, tokens: int = 128) -> None:
        self.tokens = tokens

    def note(self, tokens: int, seconds: float, wanted: float) -> None:
        """A chunk of `tokens` took `seconds`; `wanted` were allowed."""
        if seconds > wanted:
            self.tokens = max(LEAST, self.tokens // 2)
        elif seconds < 0.6 * wanted and tokens > 0.7 * self.tokens:
            self.tokens = min(MOST, self.tokens * 2)


class Prefill:
    """A group of rows of one priority that are prefilled together: one pass takes the next chunk of each.

    Making it and `advance` raise `RowFault` for a row that fails by itself: then no pass has begun.
    """

    def __init__(
        self, model: Decoder, pool: AdapterPool, step: Step, rows: Sequence[Row], prefixes: PrefixCache
    ) -> None:
        self._model, self._pool, self._step = model, pool, step
        self.rows, self.priority = list(rows), rows[0].priority
        self._kv_rows = {id(row): index for index, row in enumerate(self.rows)}
        self.kv = self._start(prefixes)
        for row in self.rows:
            row.state = RowState.PREFILLING

    def _start(self, prefixes: PrefixCache) -> KeyValues:
        """Storage for the whole prompts, with what the prefix cache has of them."""
        found = [self._find(row, prefixes) for row in self.rows]
        longest = max(row.length for row in self.rows)
        capacity = bucket(longest, SMALLEST_KV_LENGTH) if self._step.prompt_buckets else longest
        kv = KeyValues(self._model, bucket(len(self.rows)) if self._step.prompt_buckets else len(self.rows), capacity)
        for index, (row, (source, length)) in enumerate(zip(self.rows, found, strict=True)):
            if source is not None:
                with row.guarded():
                    kv.put(index, source, 0, length)
                row.cached = length
            row.generation.note_cached(row.cached)
        return kv

    def _find(self, row: Row, prefixes: PrefixCache) -> tuple[KeyValues | None, int]:
        row.cached = 0
        with row.guarded():
            return prefixes.find(owner(self._pool, row), row.uncached)

    def kv_row(self, row: Row) -> int:
        """Its row in `kv`."""
        return self._kv_rows[id(row)]

    def keep_prefix(self, row: Row, prefixes: PrefixCache) -> None:
        """Let the prefix cache have what is filled of a row."""
        tokens = (row.generation.prompt + row.tokens)[: row.cached]
        name = owner(self._pool, row)
        if len(tokens) >= prefixes.shortest and not prefixes.has(name, tokens):
            prefixes.put(name, tokens, self.kv.row(self.kv_row(row), row.cached))

    def advance(self, pacer: PrefillPacer, patience: float) -> list[tuple[Row, Pick]]:
        """One pass that shall take `patience` seconds at most; rows that are through leave the group, with their first
        new token."""
        began = time.perf_counter()
        waiting = {id(row): row.uncached for row in self.rows}
        share = _share(max(map(len, waiting.values())), pacer.tokens // len(self.rows))
        chunks = {row: waiting[id(row)][:share] for row in self.rows}
        done = [row for row, chunk in chunks.items() if len(chunk) == len(waiting[id(row)])]
        draws, sampling = self._sampling() if done else ([], None)
        chosen = self._pass(chunks, share, sampling)
        for row, chunk in chunks.items():
            row.cached += len(chunk)
        found: list[tuple[Row, Pick]] = []
        if done:
            picked = picks(chosen, draws)
            found = [(row, picked[self.kv_row(row)]) for row in done]
            self.rows = [row for row in self.rows if row not in done]
        else:
            mx.eval(self.kv.stored)
        pacer.note(sum(map(len, chunks.values())), time.perf_counter() - began, patience)
        return found

    def _sampling(self) -> tuple[list[Draw], SamplingBatch]:
        """For each row of the storage; those of padding and of rows that are through choose for nobody."""
        rows = [self.rows[0]] * self.kv.rows
        for row in self.rows:
            rows[self.kv_row(row)] = row
        return gather(rows, [0] * len(rows), self._model.args.vocab, len(rows))

    def _pass(self, chunks: dict[Row, list[int]], share: int, sampling: SamplingBatch | None) -> tuple[mx.array, ...]:
        size = self.kv.rows
        many = bucket(share, 16) if self._step.prompt_buckets else share
        tokens = np.zeros((size, many), dtype=np.int32)
        offset, last = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
        adapters = [0] * size
        for row, chunk in chunks.items():
            index = self.kv_row(row)
            tokens[index, : len(chunk)] = chunk
            offset[index], last[index], adapters[index] = row.cached, len(chunk) - 1, row.adapter
        end = int(offset.max()) + many
        if end > self.kv.capacity:
            # A chunk is padded to its bucket: the last one may write beyond the prompt.
            self.kv.resize(size, bucket(end, SMALLEST_KV_LENGTH))
        exact = not self._step.prompt_buckets and size == 1
        given = ForwardInput(
            mx.array(tokens),
            mx.array(offset),
            end if exact else min(bucket(end, SMALLEST_KV_LENGTH), self.kv.capacity),
            last=mx.array(last),
            adapters=self._pool.rows(adapters),
            exact=exact,
        )
        return self._step(self.kv, given, sampling)


def _share(longest: int, asked: int) -> int:
    """How many tokens of a row a chunk takes, of which `longest` wait."""
    takes_rest = asked <= FEW and longest <= asked + asked // 2
    return max(1, longest if takes_rest else min(longest, asked))


def owner(pool: AdapterPool, row: Row) -> Hashable:
    """Whose keys and values a row's are: a version of an adapter, or the base."""
    return pool.identity(row.adapter)

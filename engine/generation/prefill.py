"""Prompts on their way into the batch: a few at a time, a chunk of each in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from engine.adapters.pool import AdapterPool
from engine.generation.draws import Draw, Pick
from engine.generation.forward_input import ForwardInput
from engine.generation.gathering import gather
from engine.generation.row import Row, RowState
from engine.generation.sampling import picks
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step, Underway
from engine.models.buckets import bucket
from engine.models.decoder import Decoder
from engine.models.key_values import SMALLEST_KV_LENGTH, KeyValues
from engine.prefixes.memory import PrefixCache

#: Tokens of a chunk, all rows together. At least: each takes a pass over the weights; with 16 on a CPU, streams during
#: a long prompt would wait a fifth less, and new requests half as long again. At most: activations take memory, too.
LEAST, MOST = 32, 2048
#: Tokens of a chunk up to which the pass over the weights is most of what it takes: then it takes the rest of a prompt
#: along that is at most half as long.
FEW = 4 * LEAST
#: Tokens of prompts that are short.
SHORT = LEAST + LEAST // 2
#: Tokens of a prompt up to which a pass takes no turns: its first token would come a decode step later for each.
WHOLE = 256
#: A chunk of half the tokens that takes more than this part of the time saves nothing that those who wait would see.
SAVES = 0.9
#: A fifth less is worth twice the chunks, each with a pass of those who wait before it. A tenth less is worth them
#: where half of the half saves more: not where a quarter of the tokens takes more than three quarters of the time.
SAVES_MUCH, QUARTER_SAVES = 0.8, 0.75
#: Chunks after which it is tried again what others take.
FORGET = 64
#: Tokens of each row of a group at least, padding included.
FEWEST = 2


class PrefillPacer:
    """How long a chunk may be: the tokens that take about the seconds asked for, found by doubling and halving, `least`
    at least.

    A speed would not do: on a GPU 64 tokens take as long as 512, because launching the kernels is what takes it. There
    a shorter chunk lets nobody wait less, and the prompt waits for more of them: it is halved only where that saves,
    and doubled where it does not.
    """

    def __init__(self, tokens: int, least: int = LEAST) -> None:
        self.tokens, self._least = tokens, least
        #: Tokens of a chunk → seconds that the last ones took; forgotten after `FORGET` chunks.
        self._seconds: dict[int, float] = {}
        self._noted = 0

    @property
    def most(self) -> int:
        """Tokens that go at once where no more are left, padding included."""
        return self.tokens + self.tokens // 2 if self.tokens <= FEW else self.tokens

    def begin_by(self, other: PrefillPacer, wanted: float) -> None:
        """Before the first chunk: fewer tokens where `other` has measured that so many take longer than `wanted`."""
        if self._noted or not other._seconds:
            return
        each = min(seconds / tokens for tokens, seconds in other._seconds.items())
        while self._half < self.tokens and self.tokens * each > wanted:
            self.tokens = self._half

    def note(self, tokens: int, seconds: float, wanted: float) -> None:
        """A chunk of `tokens` took `seconds`; `wanted` were allowed."""
        whole = tokens > 0.7 * self.tokens
        if whole:
            self._remember(seconds)
        if seconds > wanted:
            self.tokens = self._after_slow(self._seconds.get(self.tokens, seconds))
        elif seconds < 0.6 * wanted and whole:
            self.tokens = self._double

    @property
    def _half(self) -> int:
        return max(self._least, self.tokens // 2)

    @property
    def _double(self) -> int:
        return min(MOST, self.tokens * 2)

    def _remember(self, seconds: float) -> None:
        self._noted += 1
        if self._noted % FORGET == 0:
            self._seconds.clear()
        # What others take of the device only adds to it, and not each time.
        self._seconds[self.tokens] = min(seconds, (self._seconds.get(self.tokens, seconds) + seconds) / 2)

    def _after_slow(self, seconds: float) -> int:
        """Half as many tokens where that saves enough; else twice as many, unless those take longer. Four times as many
        at once where those are known to take little longer."""
        four = self._seconds.get(4 * self.tokens, math.inf)
        if QUARTER_SAVES * four <= seconds <= four:
            return 4 * self.tokens
        if self._halving_pays(seconds):
            return self._half
        return self._double if SAVES * self._seconds.get(self._double, 0.0) <= seconds else self.tokens

    def _halving_pays(self, seconds: float) -> bool:
        """Of what is not known it is tried."""
        if self._half == self.tokens:
            return False
        half, quarter = (self._seconds.get(tokens, 0.0) for tokens in (self._half, self.tokens // 4))
        return half <= SAVES_MUCH * seconds or (half <= SAVES * seconds and quarter <= QUARTER_SAVES * seconds)


@dataclass(frozen=True, eq=False)
class PromptChunk:
    """The next tokens of a group's rows. `given`: to the model, without adapters. `adapters`: the index of that of
    each row of the storage. `done`: the rows whose last ones these are."""

    prefill: Prefill
    parts: dict[Row, list[int]]
    given: ForwardInput
    adapters: list[int]
    done: list[Row]

    @property
    def tokens(self) -> int:
        """In all, padding included."""
        return int(self.given.tokens.size)

    @property
    def adapters_of_tokens(self) -> list[int]:
        return [index for index in self.adapters for _ in range(self.given.tokens.shape[1])]

    @property
    def ends(self) -> list[int]:
        """Where the last token of each row that is done is, in all of them."""
        many = self.given.tokens.shape[1]
        return [self.prefill.kv_row(row) * many + len(self.parts[row]) - 1 for row in self.done]

    @property
    def waits(self) -> bool:
        """Whether a row waits for the token behind it."""
        return any(row in self.prefill.rows for row in self.done)

    def goes(self) -> None:
        """A pass with it was launched."""
        for row, part in self.parts.items():
            row.cached += len(part)

    def through(self, found: Sequence[Pick]) -> list[tuple[Row, Pick]]:
        """Its pass was read, and this is what it chose for `done`: those that are still here leave their group."""
        group = self.prefill
        here = [(row, pick) for row, pick in zip(self.done, found, strict=True) if row in group.rows]
        group.rows = [row for row in group.rows if row not in self.done]
        return here


@dataclass(eq=False)
class PassInTurns:
    """A chunk whose pass takes a turn or several, of `wanted` seconds in all, as `pacer` chose it. `seconds`: what they
    took until now; `known`: whether nothing was compiled meanwhile; `over`: it is through."""

    chunk: PromptChunk
    pacer: PrefillPacer
    wanted: float
    underway: Underway | None = None
    seconds: float = 0.0
    known: bool = True
    over: bool = False

    def took(self, seconds: float) -> None:
        """A turn took this many seconds."""
        self.seconds += seconds
        if self.over and self.known:
            # What a pass takes that has to be compiled first, none after it will.
            self.pacer.note(sum(map(len, self.chunk.parts.values())), self.seconds, self.wanted)


class Prefill:
    """A group of rows of one priority that are prefilled together: one pass takes the next chunk of each.

    Making it and `advance` raise `RowFault` for a row that fails by itself: then no pass has begun.
    """

    def __init__(
        self,
        model: Decoder,
        pool: AdapterPool,
        step: Step,
        rows: Sequence[Row],
        prefixes: PrefixCache,
        clock: Callable[[], float],
        agreed: Callable[[bool], bool] = bool,
    ) -> None:
        self._model, self._pool, self._step = model, pool, step
        self._clock, self._agreed = clock, agreed
        self.rows, self.priority = list(rows), rows[0].priority
        self._kv_rows = {id(row): index for index, row in enumerate(self.rows)}
        #: Whether all that is left of each row is its last token, which is decoded: those that go on from the same have
        #: it here once.
        self.known = False
        self.kv = self._start(prefixes)
        longest = max(row.length - row.cached for row in rows)
        #: Whether all of it is few tokens; and whether one prompt of it is many.
        self.short, self.long = len(rows) * longest <= SHORT, longest > WHOLE
        #: The chunk that had the last turn, if its pass takes several: who measures the step says what the turn took.
        self.turns: PassInTurns | None = None
        for row in self.rows:
            row.state = RowState.PREFILLING

    def _start(self, prefixes: PrefixCache) -> KeyValues:
        """Storage for the whole prompts, with what the prefix cache has of them."""
        found = [self._find(row, prefixes) for row in self.rows]
        here = list(zip(self.rows, found, strict=True))
        self.known = all(pieces and length == row.length - 1 for row, (pieces, length) in here)
        if self.known:
            places: dict[tuple[int, ...], int] = {}
            for row, (pieces, length) in here:
                self._kv_rows[id(row)] = places.setdefault((length, *map(id, pieces)), len(places))
        kv, filled = KeyValues(self._model, *self._size([length for _, length in found])), set[int]()
        for row, (pieces, length) in here:
            index = self.kv_row(row)
            if pieces and index not in filled:
                filled.add(index)
                with row.guarded():
                    kv.put_pieces(index, pieces, length)
            row.cached = length
            row.generation.note_cached(length)
        return kv

    def _size(self, found: Sequence[int]) -> tuple[int, int]:
        """Rows and capacity of the storage. `found`: tokens that are here, of each row."""
        count, longest = len(self.rows), max(row.length for row in self.rows)
        if self.known:
            return 1 + max(self._kv_rows.values()), longest - 1
        if self._step.prompt_buckets:
            return bucket(count), bucket(longest, SMALLEST_KV_LENGTH)
        # All rows of a group have a chunk of one length, behind what each has.
        return count, longest + (max(found) - min(found) + FEWEST if count > 1 else 0)

    def _find(self, row: Row, prefixes: PrefixCache) -> tuple[list[KeyValues], int]:
        row.cached = 0
        with row.guarded():
            return prefixes.find(owner(self._pool, row), row.uncached)

    def kv_row(self, row: Row) -> int:
        """Its row in `kv`."""
        return self._kv_rows[id(row)]

    def keep_prefix(self, row: Row, prefixes: PrefixCache) -> bool:
        """Let the prefix cache have what is filled of a row; whether it did not have it."""
        tokens = row.known[: row.cached]
        name = owner(self._pool, row)
        if len(tokens) < prefixes.shortest or prefixes.has(name, tokens):
            return False
        prefixes.put(name, tokens, self.kv, self.kv_row(row))
        return True

    def advance(self, pacer: PrefillPacer, patience: float, turns: int = 1) -> list[tuple[Row, Pick]]:
        """One turn, of `patience` seconds at most: a pass over the next chunk, or one of so many `turns` that it takes
        through the layers. Rows that are through leave the group, with their first new token."""
        began, traced = self._clock(), self._step.traced
        current = self.turns
        if current is None or current.over:
            current = self._begun(pacer, patience * turns)
        found = self._turn(current, -(-self._step.parts // turns))
        current.known &= self._agreed(self._step.traced == traced)
        self.turns = None if current.underway is None else current
        if self.turns is None:
            current.took(self._clock() - began)
        return found

    def _begun(self, pacer: PrefillPacer, wanted: float) -> PassInTurns:
        waiting = self._waiting()
        chunk = self._chunk(waiting, self._share([len(tokens) for tokens in waiting.values()], pacer))
        return PassInTurns(chunk, pacer, wanted)

    def _turn(self, current: PassInTurns, parts: int) -> list[tuple[Row, Pick]]:
        """Take a chunk through so many parts of the model more, and behind the last of them to its tokens."""
        done, every = 0 if current.underway is None else current.underway.done, self._step.parts
        # Anew in each turn: an adapter that came meanwhile could not be put into stacks that are held.
        given = replace(current.chunk.given, adapters=self._pool.rows(current.chunk.adapters))
        if parts == every or done == every:
            return self._rest(current, given)
        current.underway = self._step.further(self.kv, given, parts, current.underway)
        # Nobody waits for it: what decodes next is launched meanwhile.
        mx.async_eval(current.underway.hidden, self.kv.stored)  # type: ignore[no-untyped-call]
        if current.underway.done == every and not current.chunk.done:
            self._passed(current)
        return []

    def _rest(self, current: PassInTurns, given: ForwardInput) -> list[tuple[Row, Pick]]:
        """All that is left of a pass, and what it chose."""
        chunk, underway = current.chunk, current.underway
        draws, sampling = self._sampling() if chunk.done else ([], None)
        if underway is None:
            chosen = self._step(self.kv, given, sampling)
        else:
            chosen = self._step.rest(self.kv, given, sampling, underway)
        self._passed(current)
        if not chunk.done:
            mx.eval(self.kv.stored)
            return []
        picked = picks(chosen, draws)
        return chunk.through([picked[self.kv_row(row)] for row in chunk.done])

    def _passed(self, current: PassInTurns) -> None:
        current.over = True
        current.chunk.goes()

    def next(self, tokens: int) -> PromptChunk | None:
        """What goes along with a pass of rows that decode, of about so many tokens; None while a row's last ones are on
        their way: its storage may not be written to then. Raises `RowFault`."""
        waiting = self._waiting()
        if not all(waiting.values()):
            return None
        longest = max(map(len, waiting.values()))
        return self._chunk(waiting, -(-longest // -(-longest * len(waiting) // tokens)))

    def _waiting(self) -> dict[Row, list[int]]:
        """Tokens of each row that have not gone."""
        found: dict[Row, list[int]] = {}
        for row in self.rows:
            with row.guarded():
                found[row] = row.uncached
        return found

    def _share(self, waiting: Sequence[int], pacer: PrefillPacer) -> int:
        """How many tokens of a row a chunk takes at most, of which so many wait."""
        longest, asked = max(waiting), pacer.tokens // len(waiting)
        takes_rest = asked <= FEW and longest * len(waiting) <= pacer.most
        share = max(1, longest if takes_rest else min(longest, asked))
        # A state has seen every token that it was given: no row may be given padding.
        return min(share, *waiting) if self._model.kv_sizes.states else share

    def _sampling(self) -> tuple[list[Draw], SamplingBatch]:
        """For each row of the storage; those of padding and of rows that are through choose for nobody."""
        rows = [self.rows[0]] * self.kv.rows
        for row in self.rows:
            rows[self.kv_row(row)] = row
        return gather(rows, [0] * len(rows), self._model.args.vocab, len(rows))

    def _chunk(self, waiting: dict[Row, list[int]], share: int) -> PromptChunk:
        """So many tokens of each row, or what is left of it; padding in rows of the storage that are through."""
        chunks = {row: tokens[:share] for row, tokens in waiting.items()}
        done = [row for row, chunk in chunks.items() if len(chunk) == len(waiting[row])]
        size, many = self.kv.rows, self._many(share)
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
        buckets = self._step.prompt_buckets
        given = ForwardInput(
            mx.array(tokens),
            mx.array(offset),
            min(bucket(end, SMALLEST_KV_LENGTH), self.kv.capacity) if buckets else end,
            last=mx.array(last),
            exact=size == 1 and not buckets,
        )
        return PromptChunk(self, chunks, given, adapters, done)

    def _many(self, share: int) -> int:
        """Tokens of each row of a pass, padding included."""
        if self._step.prompt_buckets:
            return bucket(share, 16)
        # One token of several rows is what decoding is compiled for.
        return share if self.kv.rows == 1 or self._model.kv_sizes.states else max(share, FEWEST)


def owner(pool: AdapterPool, row: Row) -> tuple[str, int] | None:
    """Whose keys and values a row's are: a version of an adapter, or the base."""
    return pool.identity(row.adapter)

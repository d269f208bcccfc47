"""The rows that decode together: their keys and values side by side, one pass for all of them, one pass ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from engine.adapters.pool import BASE, AdapterPool
from engine.generation.draws import Draw, Pick
from engine.generation.forward_input import ForwardInput
from engine.generation.gathering import gather, sampling_of
from engine.generation.prefill import PromptChunk
from engine.generation.row import Row, RowState
from engine.generation.sampling import picks
from engine.generation.step import Step
from engine.models.decoder import Decoder
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.openings import Span


@dataclass(frozen=True)
class PendingStep:
    """A pass that was launched: which rows took part, and what it will have chosen for them, and behind that for those
    that are through with the `chunk` of prompts that it took along."""

    rows: list[Row]
    epochs: list[int]
    draws: list[Draw]
    chosen: tuple[mx.array, ...]
    chunk: PromptChunk | None = None


@dataclass(frozen=True)
class Read:
    """What a pass chose: for its rows that are still here, and for those whose prompts are through."""

    rows: list[tuple[Row, Pick]]
    through: list[tuple[Row, Pick]]


@dataclass(frozen=True)
class Tried:
    """What a pass made of a row's draft of so many tokens: those that ordinary decoding chooses, which are the drafted
    ones as far as they were right, and the one behind them."""

    row: Row
    drafted: int
    taken: list[Pick]


class Batch:
    """Rows in the order of their slots, without holes, so that the model reads keys and values where they lie."""

    def __init__(self, model: Decoder, pool: AdapterPool, step: Step) -> None:
        self._model, self._pool, self._step = model, pool, step
        self.rows: list[Row] = []
        self.kv: KeyValues | JointKeyValues | None = None
        self._empty = self._new()
        self._in_flight: PendingStep | None = None
        #: The pass that was launched last, until it begins; and how many have begun.
        self._made: PendingStep | None = None
        self.begun = 0

    @property
    def nbytes(self) -> int:
        # Read once: another thread may ask while the rows leave.
        kv = self.kv
        return kv.nbytes if kv is not None else 0

    @property
    def in_flight(self) -> PendingStep | None:
        """The pass that was launched last, until `read` has read it."""
        return self._in_flight

    def _lengths(self) -> list[int]:
        """Of all rows, each with a token more."""
        return [row.cached + 1 for row in self.rows]

    def span(self, row: Row, length: int) -> Span:
        """What a row needs that is to come with `length` tokens. Rows share what their prompts begin with, seen with
        the same row of the adapter stack: while a row has that, it is no other adapter's."""
        adapter = _adapter(row) if self._model.kv_sizes.joint else None
        if adapter is None:
            return Span(length)
        # Of a prompt on its way others could share what is there of it alone.
        return Span(length, row.generation.opening(adapter).cut(length - 1), row.request.n - 1)

    def growth(self, more: Sequence[Span] = ()) -> int:
        """Bytes that its storage would take on top of what it has, with each row a token longer, and these rows
        more."""
        lengths = self._lengths()
        return max(0, self._storage.bytes_of(lengths, more) - self.nbytes) if lengths or more else 0

    def bytes_for(self, staying: Sequence[Row], more: Sequence[Span]) -> int:
        """What storage takes that holds these rows of it, those that come, and no others."""
        return self._storage.bytes_of_some([row.slot for row in staying], [row.cached + 1 for row in staying], more)

    def fit(self, more: Sequence[Span] = ()) -> None:
        """Have room for a token more of each row, and for these rows more."""
        if self.kv is None:
            self.kv = self._new()
        self.kv.fit(self._lengths(), more)

    def _new(self) -> KeyValues | JointKeyValues:
        return JointKeyValues(self._model) if self._model.kv_sizes.joint else KeyValues(self._model, 0, 0)

    @property
    def _storage(self) -> KeyValues | JointKeyValues:
        """What there is; where nothing is, what would grow."""
        return self._empty if self.kv is None else self.kv

    def shrink(self) -> None:
        """Give back what the rows that are left do not need."""
        if not self.rows:
            self.kv = None
        elif self.kv is not None:
            self.kv.shrink(self._lengths())

    def join(self, row: Row, source: KeyValues, source_row: int) -> None:
        """Seat a row. `source` holds all its tokens except the newest."""
        span = self.span(row, row.cached + 1)
        self.fit([span])
        assert self.kv is not None
        row.slot, row.state = len(self.rows), RowState.DECODING
        self.rows.append(row)
        self.kv.add(row.slot, span, source, source_row)

    def arrange(self) -> None:
        """Have the rows of a better priority in the slots before the others."""
        rows = self.rows
        for slot in range(len(rows)):
            best = min(range(slot, len(rows)), key=lambda other: rows[other].priority)
            if rows[best].priority < rows[slot].priority:
                self._swap(slot, best)

    def _swap(self, slot: int, other: int) -> None:
        rows = self.rows
        if self.kv is not None:
            self.kv.swap(slot, other, max(rows[slot].cached, rows[other].cached))
        rows[slot], rows[other] = rows[other], rows[slot]
        rows[slot].slot, rows[other].slot = slot, other

    def leave(self, row: Row) -> None:
        """Free a row's slot; the last row moves into it."""
        last = self.rows.pop()
        if self.kv is not None:
            self.kv.leave(row.slot, last.slot, last.cached)
        if last is not row:
            last.slot = row.slot
            self.rows[last.slot] = last
        row.slot = -1
        row.epoch += 1

    def settle(self) -> None:
        """Let a pass go that nobody waits for any more."""
        pending = self._in_flight
        if not self.rows and pending is not None and not (pending.chunk and pending.chunk.waits):
            self._in_flight = self._made = None

    def clean(self) -> None:
        """Leave nothing of rows that are gone, whose numbers were not finite: another row may get their slots."""
        if self.kv is not None:
            self.kv.clear_beyond([row.cached for row in self.rows])

    def launch(self, count: int | None = None, chunk: PromptChunk | None = None) -> bool:
        """Make the next pass, for `begin`, whether or not the last one has been read; False if no row needs it.

        `count`: how many rows it takes, from the first slot on; the others rest, with their keys and values. None: all.
        `chunk`: of prompts, which it takes along.

        Raises `RowFault` for a row that cannot be sampled, before anything has begun.
        """
        pending, rows = self._in_flight, self.rows[:count]
        ahead = self.ahead(pending)
        if not rows or all(row.ends_within(ahead[slot]) for slot, row in enumerate(rows)):
            return False
        self.fit()
        if chunk is None:
            draws, chosen = self._decode(pending, rows, ahead)
        else:
            draws, chosen = self._decode_with(chunk, pending, rows, ahead)
            chunk.goes()
        for row in rows:
            row.cached += 1
        self._in_flight = PendingStep(rows, [row.epoch for row in rows], draws, chosen, chunk)
        self._made = self._in_flight
        return True

    def begin(self) -> None:
        """Give the pass that was launched last to the device, if that has not been done. On a CPU MLX keeps its caller
        waiting until nearly all of it is done."""
        made, self._made = self._made, None
        if made is not None:
            self.begun += 1
            stored = () if made.chunk is None else made.chunk.prefill.kv.stored
            mx.async_eval(made.chosen, stored)  # type: ignore[no-untyped-call]

    def _decode(
        self, pending: PendingStep | None, rows: Sequence[Row], ahead: Sequence[int]
    ) -> tuple[list[Draw], tuple[mx.array, ...]]:
        """A pass over the newest token of each row: how it draws, and what it chooses."""
        assert self.kv is not None
        size = self.kv.padded(len(rows)) if self._step.decode_buckets else len(rows)
        padding = size - len(rows)
        assert not padding or len(rows) == len(self.rows), "a row that rests would be written to"
        draws, sampling = gather(rows, ahead[: len(rows)], self._model.args.vocab, size)
        given = self._newest(pending, rows, size, [0] * padding, bucketed=self._step.decode_buckets)
        return draws, self._step(self.kv, given, sampling)

    def _decode_with(
        self, chunk: PromptChunk, pending: PendingStep | None, rows: Sequence[Row], ahead: Sequence[int]
    ) -> tuple[list[Draw], tuple[mx.array, ...]]:
        """The same with a chunk of prompts."""
        assert isinstance(self.kv, KeyValues)
        prefill, drawn = chunk.prefill, [*rows, *chunk.done]
        ahead = [*ahead[: len(rows)], *[0] * len(chunk.done)]
        draws, sampling = gather(drawn, ahead, self._model.args.vocab, len(drawn))
        given = self._newest(pending, rows, len(rows), chunk.adapters_of_tokens, bucketed=False)
        prompts = replace(chunk.given, last=mx.array(chunk.ends, mx.int32))
        return draws, self._step.mixed(self.kv, given, prefill.kv, prompts, sampling)

    def _newest(
        self, pending: PendingStep | None, rows: Sequence[Row], size: int, behind: list[int], *, bucketed: bool
    ) -> ForwardInput:
        """The newest token of each row, padded to `size`. `behind`: indices of the adapters of what the pass takes
        behind these rows."""
        assert self.kv is not None
        offset = np.array([row.cached for row in rows] + [0] * (size - len(rows)), dtype=np.int32)
        return ForwardInput(
            self._tokens(pending, rows, size)[:, None],
            mx.array(offset),
            self.kv.read_length(int(offset.max()) + 1, 1, bucketed=bucketed),
            adapters=self._pool.rows([row.adapter for row in rows] + behind),
            places=self.kv.pending(offset, len(rows)),
        )

    def read(self, pending: PendingStep) -> Read:
        """Wait for a pass: what it chose for its rows that are still here, and for those whose prompts are through."""
        found = picks(pending.chosen, pending.draws)
        if pending is self._in_flight:
            self._in_flight = self._made = None
        count = len(pending.rows)
        rows = list(zip(pending.rows, pending.epochs, found[:count], strict=True))
        here = [(row, pick) for row, epoch, pick in rows if row.slot >= 0 and row.epoch == epoch]
        if len(here) < len(rows) and not all(pick.finite for pick in found):
            self.clean()
        return Read(here, [] if pending.chunk is None else pending.chunk.through(found[count:]))

    @property
    def room(self) -> int:
        """Tokens of each row that a pass can write to the storage as it is."""
        return 0 if self.kv is None else self.kv.room([row.cached for row in self.rows])

    def try_drafts(self, width: int) -> list[Tried]:
        """A pass over `width` tokens of each row, its newest and the draft behind it, and what comes of it. No pass
        is under way, and `width` is within `room`.

        A token is chosen at each position as if all before it had come; the first that is not the drafted one is the
        row's last of this pass (Leviathan et al., 2023, with the row's own draws in the place of theirs). What the pass
        has written behind it counts for nothing: later passes write over it, and see nothing of it before. A row whose
        draft gives numbers that are not finite gets nothing, and drafts no more.

        Raises `RowFault` for a row that cannot be sampled, before anything has begun.
        """
        assert self._in_flight is None
        assert self.kv is not None
        rows, drafts, draws = self.rows, list[list[int]](), list[Draw]()
        for row in rows:
            with row.guarded():
                draft, found = row.draft(width - 1)
            drafts.append(draft)
            # Behind a draft is padding, of which nobody looks at anything.
            draws += found + found[-1:] * (width - len(found))
        size = self.kv.padded(len(rows)) if self._step.prompt_buckets else len(rows)
        owners = [row for row in rows for _ in range(width)]
        sampling = sampling_of(owners, draws, self._model.args.vocab, size * width)
        picked = picks(self._step(self.kv, self._drafted(drafts, width, size), sampling), draws)
        tried = [
            Tried(row, len(draft), _taken(draft, picked[slot * width :][: 1 + len(draft)]))
            for slot, (row, draft) in enumerate(zip(rows, drafts, strict=True))
        ]
        for one in tried:
            one.row.cached += len(one.taken)
            if not one.taken:
                one.row.lookup = one.row.guess = None
        if not all(one.taken for one in tried):
            self.clean()
        return tried

    def _drafted(self, drafts: Sequence[list[int]], width: int, size: int) -> ForwardInput:
        """The newest token of each row and the draft behind it; it is padded with a token of its own, which gives
        numbers as it did before."""
        assert self.kv is not None
        tokens, offset = np.zeros((size, width), dtype=np.int32), np.zeros(size, dtype=np.int32)
        for slot, (row, draft) in enumerate(zip(self.rows, drafts, strict=True)):
            tokens[slot], offset[slot] = row.newest, row.cached
            tokens[slot, 1 : 1 + len(draft)] = draft
        adapters = [row.adapter for row in self.rows] + [0] * (size - len(self.rows))
        return ForwardInput(
            mx.array(tokens),
            mx.array(offset),
            self.kv.read_length(int(offset.max()) + width, width, bucketed=self._step.decode_buckets),
            adapters=self._pool.rows(adapters),
            places=self.kv.pending(offset, len(self.rows)),
            every=True,
        )

    def ahead(self, pending: PendingStep | None) -> list[int]:
        """For each row, how many of its tokens the device knows and the host does not."""
        if pending is None:
            return [0] * len(self.rows)
        unread = {id(row): epoch for row, epoch in zip(pending.rows, pending.epochs, strict=True)}
        return [int(unread.get(id(row)) == row.epoch) for row in self.rows]

    def _tokens(self, pending: PendingStep | None, rows: Sequence[Row], size: int) -> mx.array:
        """Each row's newest token, int32 (size,); from the device where the host does not know it yet."""
        if pending is not None and pending.rows == rows and pending.chosen[0].shape[0] == size:
            return pending.chosen[0]
        index_of = {} if pending is None else {id(row): index for index, row in enumerate(pending.rows)}
        known, source = np.zeros(size, dtype=np.int32), np.full(size, -1, dtype=np.int32)
        for slot, (row, ahead) in enumerate(zip(rows, self.ahead(pending), strict=False)):
            if ahead:
                source[slot] = index_of[id(row)]
            else:
                known[slot] = row.newest
        if pending is None or source.max() < 0:
            return mx.array(known)
        taken = pending.chosen[0][mx.array(np.maximum(source, 0))]
        return mx.where(mx.array(source >= 0), taken, mx.array(known))


def _adapter(row: Row) -> int | None:
    """The index of a row's adapter, which one of its job may have acquired before it; None: none has."""
    if row.request.adapter is None:
        return BASE
    return next((one.adapter for one in (row, *row.generation.rows) if one.adapter >= 0), None)


def _taken(draft: Sequence[int], found: Sequence[Pick]) -> list[Pick]:
    """Of what was chosen behind the newest token and each of the draft, what ordinary decoding chooses.

    Nothing if a draft gives numbers that are not finite: masked positions are read all the same, and 0 · NaN is NaN.
    """
    if draft and not all(pick.finite for pick in found):
        return []
    right = next((at for at, token in enumerate(draft) if found[at].token_id != token), len(draft))
    return list(found[: right + 1])

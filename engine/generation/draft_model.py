"""A small model of the same vocabulary that drafts for the rows of a large one (Leviathan et al., 2023).

It reads what the rows have, prompts a piece at a time, and says for all of them together what it would go on with, the
likeliest token each time. Its keys and values are its own; those of tokens that did not come are written over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from engine.checkpoints.loading import LoadedModel
from engine.generation.forward_input import ForwardInput
from engine.generation.guess import ROWS, Rate
from engine.generation.row import Row
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Compiled, Step
from engine.models.buckets import bucket
from engine.models.joint import JointKeyValues
from engine.models.key_values import SMALLEST_KV_LENGTH, KeyValues

#: Tokens that a row may be behind, and is still drafted for: the pass that drafts takes them along.
LAG = 16
#: Tokens that are drafted at once, at most.
MOST = 8


@dataclass(eq=False)
class _Seat:
    """A row that the model has read: `cached` tokens of it, and behind them those that were drafted."""

    row: Row
    epoch: int
    cached: int
    fed: list[int] = field(default_factory=list)

    @property
    def stays(self) -> bool:
        """Whether the row decodes still, without having left."""
        return self.row.slot >= 0 and self.row.epoch == self.epoch

    def settle(self) -> None:
        """Count those of the drafted tokens that have come. The newest is read again: a pass needs one to read."""
        for drafted, came in zip(self.fed, self.row.behind(self.cached), strict=False):
            if drafted != came:
                break
            self.cached += 1
        self.cached, self.fed = min(self.cached, self.row.length - 1), []


@dataclass(eq=False)
class _Reading:
    """The row that is being read, into storage of its own."""

    seat: _Seat
    kv: KeyValues


class DraftModel:
    """`model` drafts for a model whose tokens are below `vocabulary`. All in the engine's thread."""

    def __init__(self, model: LoadedModel, vocabulary: int, compiled: Compiled) -> None:
        self.name, self._decoder, self._context = model.name, model.decoder, model.context
        self._vocabulary = vocabulary
        self._step = Step(self._decoder, compiled)
        #: Of all rows together, those that have left included.
        self.rate = Rate(tokens=ROWS)
        self._seats: dict[Row, _Seat] = {}
        self._kv: KeyValues | JointKeyValues | None = None
        self._empty = self._new()
        self._reading: _Reading | None = None

    @property
    def nbytes(self) -> int:
        """What its keys and values take. From any thread."""
        kv, reading = self._kv, self._reading
        return (0 if kv is None else kv.nbytes) + (0 if reading is None else reading.kv.nbytes)

    @property
    def traced(self) -> int:
        """Passes, or parts of them, that were compiled."""
        return self._step.traced

    # --- which rows it knows ---

    def takes(self, row: Row) -> bool:
        """Whether it can draft for a row at all."""
        return row.guess is not None and row.length + LAG + MOST <= self._context

    def ready(self, row: Row) -> bool:
        """Whether it has read so much of a row that the next pass can draft for it."""
        return row in self._seats and self.unread(row) <= LAG

    def unread(self, row: Row) -> int:
        """Tokens of a row that it has not read."""
        seat = self._seats.get(row)
        if seat is None:
            reading = self._reading
            return row.length - (reading.seat.cached if reading is not None and reading.seat.row is row else 0)
        seat.settle()
        return row.length - seat.cached

    def keep(self, rows: Sequence[Row]) -> None:
        """Forget all rows except those of these that are where they were."""
        staying = set(rows)
        for seat in [*self._seats.values(), *([self._reading.seat] if self._reading is not None else [])]:
            if seat.row not in staying or not seat.stays:
                self.forget(seat.row)

    def forget(self, row: Row) -> None:
        """Free what it has of a row."""
        if self._reading is not None and self._reading.seat.row is row:
            self._reading = None
        if row not in self._seats:
            return
        seats = list(self._seats.values())
        slot, last = seats.index(self._seats[row]), seats.pop()
        last.settle()
        assert self._kv is not None
        self._kv.leave(slot, len(seats), last.cached)
        if last.row is not row:
            seats[slot] = last
        self._seats = {seat.row: seat for seat in seats}
        if not seats:
            self._kv = None

    def give_up(self) -> None:
        """Free all that it has of rows: it reads them again where that pays."""
        self._seats, self._kv, self._reading = {}, None, None

    # --- reading ---

    def read(self, row: Row, tokens: int, spare: int) -> int:
        """Read the next `tokens` of a row that is not ready, at most; how many those were. 0: its keys and values would
        take more than `spare` bytes."""
        if row in self._seats:
            return self._catch_up(row, tokens, spare)
        if self._reading is None or self._reading.seat.row is not row:
            self._reading = None
            capacity = bucket(row.length + LAG + tokens, SMALLEST_KV_LENGTH)
            if self._bytes(capacity) + self._growth([row.length]) > spare:
                return 0
            self._reading = _Reading(_Seat(row, row.epoch, 0), KeyValues(self._decoder, 1, capacity))
        reading = self._reading
        chunk = row.behind(reading.seat.cached)[:tokens]
        self._read(reading, chunk)
        reading.seat.cached += len(chunk)
        if row.length - reading.seat.cached <= LAG:
            self._seat(reading, spare)
        return len(chunk)

    def _catch_up(self, row: Row, tokens: int, spare: int) -> int:
        """Read on where the row is, next to the others, which are read on too."""
        unread = min(tokens, self.unread(row))
        if self.growth(2 * tokens) > spare:
            return 0
        ids, offset, _ = self._next(unread)
        self._forward(ids, offset)
        assert self._kv is not None
        mx.eval(self._kv.stored)
        return unread

    def _read(self, reading: _Reading, chunk: Sequence[int]) -> None:
        kv, first, buckets = reading.kv, reading.seat.cached, self._step.prompt_buckets
        many = bucket(len(chunk), 16) if buckets else len(chunk)
        end = first + many
        if end > kv.capacity:
            kv.resize(1, bucket(end, SMALLEST_KV_LENGTH))
        given = ForwardInput(
            mx.array(self._ids([chunk], 1, many)),
            mx.array([first], dtype=mx.int32),
            min(bucket(end, SMALLEST_KV_LENGTH), kv.capacity) if buckets else end,
            exact=not buckets,
        )
        self._step(kv, given)
        mx.eval(kv.stored)

    def _seat(self, reading: _Reading, spare: int) -> None:
        seat, slot = reading.seat, len(self._seats)
        self._reading = None
        if self._growth([seat.row.length]) > spare:
            return  # others have taken the memory meanwhile
        self._fit([*(other.cached for other in self._seats.values()), seat.row.length + LAG + MOST])
        assert self._kv is not None
        self._kv.put(slot, reading.kv, 0, seat.cached)
        self._seats[seat.row] = seat

    # --- drafting ---

    def draft(self, rows: Sequence[Row], count: int) -> bool:
        """Give each of `rows`, which are ready, `count` tokens as its guess: those before one that the other model has
        not, or numbers that are not finite. A row with such numbers is drafted for no more. Whether all were finite."""
        seats = list(self._seats.values())
        found, sound = self._passes(*self._next(max(map(self.unread, rows))), count)
        for slot, seat in enumerate(seats):
            if seat.row in rows:
                self._give(seat, found[slot], sound[slot])
        return self._drop_unsound(seats, sound)

    def _next(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of every row that it has not read, `most` at most, where they begin, and which of them is the last.
        They count as read: what is written behind them is written over."""
        seats = list(self._seats.values())
        for seat in seats:
            seat.settle()
        lines = [seat.row.behind(seat.cached)[:most] for seat in seats]
        many = bucket(most) if self._step.prompt_buckets else most
        self._fit([seat.cached + many + MOST for seat in seats])
        assert self._kv is not None
        size = self._kv.padded(len(seats)) if self._step.decode_buckets else len(seats)
        offset, last = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
        for slot, (seat, line) in enumerate(zip(seats, lines, strict=True)):
            offset[slot], last[slot] = seat.cached, len(line) - 1
            seat.cached += len(line)
        return self._ids(lines, size, many), offset, last

    def _forward(
        self, tokens: np.ndarray | mx.array, offset: np.ndarray, last: np.ndarray | None = None, *, choose: bool = False
    ) -> tuple[mx.array, ...]:
        assert self._kv is not None
        many = tokens.shape[1]
        given = ForwardInput(
            mx.array(tokens),
            mx.array(offset),
            self._kv.read_length(int(offset.max()) + many, many, bucketed=self._step.decode_buckets),
            last=None if last is None or many == 1 else mx.array(last),
            places=self._kv.pending(offset, len(self._seats) or None),
        )
        return self._step(self._kv, given, SamplingBatch() if choose else None)

    def _passes(
        self, tokens: np.ndarray, offset: np.ndarray, last: np.ndarray, count: int
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """`count` passes, each behind the one before: of each row, what it chose, and whether its numbers are
        finite."""
        made: list[tuple[mx.array, ...]] = []
        chosen = self._forward(tokens, offset, last, choose=True)
        for step in range(count):
            if step:
                chosen = self._forward(made[-1][0][:, None], offset + last + step, choose=True)
            mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            made.append(chosen)
        mx.eval(made)
        ids, raw = (np.stack([np.array(chosen[side]) for chosen in made], axis=1) for side in (0, 1))
        return ids.tolist(), np.isfinite(raw).tolist()

    def _give(self, seat: _Seat, tokens: Sequence[int], sound: Sequence[bool]) -> None:
        assert seat.row.guess is not None
        # The last one was chosen, and has not gone through the model.
        seat.fed = list(tokens[:-1])
        right = [each and token < self._vocabulary for token, each in zip(tokens, sound, strict=True)]
        seat.row.guess.set(tokens[: right.index(False)] if False in right else tokens)

    def _drop_unsound(self, seats: Sequence[_Seat], sound: Sequence[Sequence[bool]]) -> bool:
        unsound = [seat for slot, seat in enumerate(seats) if not all(sound[slot])]
        for seat in unsound:
            self.forget(seat.row)
            seat.row.guess = None
        if unsound and self._kv is not None:
            self._kv.clear_beyond([seat.cached for seat in self._seats.values()])
        return not unsound

    def warming(self) -> Iterator[None]:
        """Make the passes that drafting begins with, one at a time, for nobody."""
        self._fit([LAG + MOST])
        for many in (2, 1):
            zeros = np.zeros(1, dtype=np.int32)
            self._passes(np.zeros((1, many), dtype=np.int32), zeros, zeros + many - 1, 1)
            yield
        self.give_up()

    # --- storage ---

    def _ids(self, lines: Sequence[Sequence[int]], size: int, many: int) -> np.ndarray:
        """Padded, int32 (size, many). A token that its table has no row for, which no text has, is another one."""
        ids = np.zeros((size, many), dtype=np.int32)
        for row, line in enumerate(lines):
            ids[row, : len(line)] = line
        ids[ids >= self._decoder.args.vocab] = 0
        return ids

    def _new(self) -> KeyValues | JointKeyValues:
        joint = self._decoder.kv_sizes.joint
        return JointKeyValues(self._decoder) if joint else KeyValues(self._decoder, 0, 0)

    def _fit(self, lengths: Sequence[int]) -> None:
        if self._kv is None:
            self._kv = self._new()
        self._kv.fit(lengths)

    def growth(self, count: int) -> int:
        """Bytes that `draft` of so many tokens would take on top of what there is."""
        return self._growth([], count=count)

    def _growth(self, more: Sequence[int], *, count: int = MOST) -> int:
        """The same with rows of such lengths more."""
        lengths = [length + LAG + count for length in (*(seat.row.length for seat in self._seats.values()), *more)]
        if not lengths:
            return 0
        kv = self._kv
        return self._empty.bytes_of(lengths) if kv is None else max(0, kv.bytes_of(lengths) - kv.nbytes)

    def _bytes(self, capacity: int) -> int:
        """Of a row that is being read."""
        return capacity * self._decoder.kv_sizes.token_bytes

"""How long a step may be: how many rows its pass takes, and how much of which prompts goes before it.

The rows of the best priority that a lane holds are its foreground, all others its background. While both are here, a
pass takes so many rows of the background that it is measured to take at most `STRETCH` times what it takes without
them; prompts of the background go through the model in one step of `EVERY` alone, its turn. So less than one token in
twenty of a stream waits for the background, and the background always goes on: where not one of its rows fits, all of
them are in the pass of its turn.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from engine.generation import prefill
from engine.generation.grouping import PASS
from engine.generation.prefill import FEW, PassInTurns, PrefillPacer
from engine.models.buckets import bucket
from stoker.contract.requests import LOWEST_PRIORITY

#: How many times as long a pass may take for the rows of the background in it.
STRETCH = 1.5
#: Steps from one turn of the background to the next.
EVERY = 40
#: Tokens of a chunk to begin with; where launches are most of what a pass takes (GPUs), each further size that is tried
#: costs a tenth of a second for compiling, and this one was right on an H100.
CHUNK, CHUNK_OF_LAUNCHES = 128, 512
#: Turns in which a pass over a long prompt goes through the layers while streams run (Lee et al., "From Tokens to
#: Layers", 2025). Where launches are most of what it takes, fewer tokens take no less, and fewer layers do.
TURNS = 4
#: Of the time since its last turn, how much prompts of the background may take in the next one.
SHARE = 0.25
#: Steps after a turn that the foreground has to itself: they measure what its passes take.
ALONE = 3
#: Tokens of prompts that a pass of rows that decode takes along at least. How much longer than without any it may take
#: for each prompt: passes differ, and it shall stay below twice.
LEAST_MIXED, MIXED = 8, 0.75
#: Passes with prompts after which one goes without, so that it is known what that takes; and how many do so at most
#: where something keeps that from being known, for which no prompt may wait for ever.
WITHOUT, TRIES = 64, 3
#: Passes of one size whose median is what they take, at least and at most.
LEAST, MOST = 3, 9
#: Chunks of prompts, its own included, for which a row that has its first token waits where no row decodes yet: the
#: requests of a burst are read together.
GATHER = 3
#: Turns after which a size that was not run since is unknown again: rows have grown, other processes have ended.
FORGET = 16


@dataclass
class _Passes:
    """Of one size: seconds of the last ones, and the turn after which the last one was."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MOST))
    turn: int = 0


@dataclass(frozen=True)
class Chunk:
    """How much of a prompt goes at once: what `pacer` says, which learns from the `patience` that there was, of each of
    so many `turns`."""

    pacer: PrefillPacer
    patience: float
    turns: int = 1


class MixedPacer:
    """How many tokens of prompts a pass of rows that decode may take along, by what each adds to its seconds."""

    def __init__(self) -> None:
        #: Of a token, as measured lately; 0: unknown.
        self._seconds = 0.0

    def tokens(self, patience: float, guess: float) -> int:
        """As many as add about so many seconds; a token adds those of the `guess` where nothing is known yet."""
        seconds = self._seconds or guess
        return max(LEAST_MIXED, min(prefill.MOST, int(patience / seconds))) if seconds else LEAST_MIXED

    def note(self, tokens: int, added: float) -> None:
        """A pass took `added` seconds longer for so many. Fewer say little: a pass takes some time for any."""
        if tokens >= LEAST_MIXED:
            each = max(added, 0.0) / tokens
            self._seconds = 0.8 * self._seconds + 0.2 * each if self._seconds else each


class LanePacer:
    """`stall`: seconds that a prompt may hold up running streams. `chunk`: tokens of a chunk, to begin with."""

    def __init__(self, stall: float, chunk: int = CHUNK) -> None:
        self._stall = stall
        #: Chunks while streams run: of one prompt, of several that wait, and of long ones in turns. Chunks that hold up
        #: nobody, and chunks of the background.
        self._busy, self._several, self._in_turns = PrefillPacer(chunk), PrefillPacer(chunk), PrefillPacer(chunk)
        self._idle, self._behind = PrefillPacer(256, least=FEW), PrefillPacer(prefill.LEAST)
        #: What goes along with passes of rows that decode, and how many such passes there were since one without.
        self._mixed, self._with_prompts = MixedPacer(), 0
        #: Chunks since the first row came into an empty batch; `GATHER` as soon as it decodes.
        self._gathered = 0
        #: Seconds of a step that only decoded, as measured lately.
        self._decoding = 0.0
        self._passes: dict[int, _Passes] = {}
        self._turns = 0
        #: Steps since the last turn of the background, this one included, and seconds of those before it. 0: all rows
        #: are of one priority.
        self._step, self._seconds = 0, 0.0
        #: The best priority of all rows.
        self.best = 0
        self._alone = True

    def begin(self, priorities: set[int], *, alone: bool = True, empty: bool = True) -> None:
        """A step begins, with rows of these priorities. `alone`: nobody else waits for the device. `empty`: no row
        is through with its prompt."""
        self._alone = alone
        if empty:
            self._gathered = 0
        self.best = min(priorities, default=0)
        if len(priorities) < 2 or self._step >= EVERY:
            self._turns += self._step >= EVERY
            self._step, self._seconds = 0, 0.0
        self._step += len(priorities) > 1

    def note(self, seconds: float, rows: int | None) -> None:
        """The step took `seconds`, with a pass of `rows`; None: with prompts before it. What other lanes took between
        counts too."""
        self._seconds += seconds
        if rows is None:
            return
        self._with_prompts = 0
        self._decoding = 0.8 * self._decoding + 0.2 * seconds if self._decoding else seconds
        passes = self._passes.setdefault(rows, _Passes())
        passes.seconds.append(seconds)
        passes.turn = self._turns

    def note_mixed(self, seconds: float, tokens: int) -> None:
        """A pass that took so many tokens of prompts along took `seconds`."""
        self._with_prompts += self._with_prompts < WITHOUT
        self._mixed.note(tokens, seconds - self._decoding)

    def note_turn(self, turn: PassInTurns, seconds: float) -> None:
        """A step with a turn of prompts took `seconds`: the device is at it while the host goes on to what decodes."""
        turn.took(max(0.0, seconds - self._decoding))

    def mixed_tokens(self, prompts: int) -> int:
        """How many tokens of prompts, of which so many wait or are under way, the next pass takes along; 0: none."""
        if self._with_prompts >= WITHOUT:
            self._with_prompts = (self._with_prompts + 1) % (WITHOUT + TRIES + 1)
            if self._with_prompts:
                return 0
        return self._mixed.tokens(MIXED * self._patience(prompts), self._decoding / PASS)

    def _patience(self, prompts: int) -> float:
        """Seconds for which rows wait: a chunk as long as a decode step at most doubles the time between two tokens.
        Several prompts hold them up as long together as one by one, in fewer passes."""
        return min(self._stall, max(self._decoding, 0.002) * prompts)

    @property
    def gathers(self) -> bool:
        """Whether the rows that have their first tokens let prompts go before their second ones."""
        return self._gathered < GATHER

    def gather(self) -> None:
        """They have let a chunk go before."""
        self._gathered += 1

    def decodes(self) -> None:
        """A pass of the rows that are through with their prompts begins."""
        self._gathered = GATHER

    @property
    def contested(self) -> bool:
        """Whether foreground and background are both here."""
        return self._step > 0

    @property
    def foreground(self) -> range:
        """Its priority."""
        return range(self.best, self.best + 1)

    @property
    def background(self) -> range:
        """Priorities whose prompts may go on in this step too."""
        return range(self.best + 1, LOWEST_PRIORITY + 1) if self._is_turn else range(0)

    @property
    def _is_turn(self) -> bool:
        """Whether this step is the background's turn."""
        return self._step == EVERY

    @property
    def background_seconds(self) -> float:
        """Seconds after the beginning of which no further prompt of the background is begun in its turn. It may take
        twice as long."""
        return min(self._stall, SHARE * self._seconds) / 2

    def chunk(self, priority: int, *, decoding: bool, prompts: int = 1, long: bool = False) -> Chunk:
        """For prompts of this priority, of which so many wait or are under way; `decoding`: whether rows that are as
        good decode meanwhile; `long`: the prompts may take turns."""
        if priority > self.best:
            return Chunk(self._behind, self.background_seconds)
        if decoding and not self.gathers:
            pacer, turns = (self._busy if prompts == 1 else self._several), 1
            if long:
                pacer, turns = self._in_turns, TURNS
            patience = self._patience(prompts)
            pacer.begin_by(self._idle, patience * turns)
            return Chunk(pacer, patience, turns)
        return Chunk(self._idle, 1.0) if self._alone else Chunk(self._behind, self._stall / 2)

    def rows(self, foreground: int, held: int) -> int:
        """How many of the `held` rows the next pass takes; the first of them are the `foreground`.

        Either all, or a size in which passes come (`bucket`): else rows that rest would be in its padding.
        """
        if not self.contested:
            return held
        least = min(held, bucket(foreground)) if foreground else 0
        fits = self._fitting(least, held) if least and (self._is_turn or self._step > ALONE) else least
        return held if self._is_turn and fits == least else fits

    def _fitting(self, least: int, held: int) -> int:
        """The largest size that is not too slow; of sizes that nothing is known of, the next one is tried."""
        alone, size = self._typical(least), least
        if alone is None:
            return least
        while size < held:
            larger = min(held, bucket(size + 1))
            seconds = self._typical(larger)
            if seconds is None:
                return larger
            if seconds > STRETCH * alone:
                break
            size = larger
        return size

    def _typical(self, size: int) -> float | None:
        """What a pass of so many rows takes; None: unknown."""
        passes = self._passes.get(size)
        if passes is None or self._turns - passes.turn > FORGET or len(passes.seconds) < LEAST:
            return None
        return median(passes.seconds)

"""How many tokens of each row a pass takes: the newest alone, or a draft behind it where that is measured to pay.

A pass over several tokens a row takes longer: on a CPU a row that is alone has seven more tokens for a quarter of a
pass, eight rows have three more for nearly a whole one; padding costs as much as drafts. So for each size of a pass its
seconds are measured as it runs, and a draft is tried where the tokens that are expected of it a second are more than
those of ordinary decoding. So are the seconds of a model that drafts, for rows of which nothing better is looked up.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median_low

from engine.generation.batch import Tried
from engine.generation.draft_model import DraftModel
from engine.generation.row import Row
from engine.models.buckets import bucket

log = logging.getLogger(__name__)

#: Tokens of each row that a pass may take: few sizes, each of which may have to be compiled.
WIDTHS = (2, 3, 5, 9)
#: How much faster than ordinary decoding a pass with drafts has to be expected.
GAIN = 1.05
#: How much longer than without drafts a row may wait for a token because others draft.
WAIT = 1.1
#: What a token more of each row is taken to cost, of a pass, where no width was run; else what the last one cost.
GUESS = 0.25
#: Passes of one size whose median is what they take: at least, with drafts and without, and at most.
TRIES, LEAST, MOST = 2, 3, 9
#: Passes after which a size that was not run since is unknown again, and after which one pass goes without drafts.
FORGET, WITHOUT = 128, 64
#: Passes for which it is remembered what a model took, and passes with its drafts: to try it again, it has to read all
#: that came meanwhile.
REMEMBER = 16 * FORGET
#: Tokens that a model that drafts reads of a row at once: as many as take as long as a pass, within these; the first
#: ones say how many those are.
FEWEST_READ, MOST_READ = 32, 512
#: Of the tokens that an answer may have still, how many it is taken to get: what is saved with them pays for reading.
PART = 0.5
#: Passes that it may take as long as to read the rows, where nothing is known of what the model takes to draft.
UNKNOWN = 4


@dataclass(frozen=True)
class Plan:
    """The next pass takes `width` tokens of each row; 1: no drafts. A model drafts for the rows that are `asking`, and
    reads the row `reading` on, so that it can be drafted for later."""

    width: int = 1
    asking: tuple[Row, ...] = ()
    reading: Row | None = None


@dataclass(frozen=True)
class _Hope:
    """A token of a draft comes at this `rate`, if all before it came; there are `most` at most, behind `ahead` others
    that have to come too."""

    rate: float
    most: int
    ahead: int

    def tokens(self, drafted: int) -> float:
        """How many of so many drafted tokens are expected to come."""
        return sum(self.rate ** (self.ahead + step) for step in range(1, min(self.most, drafted) + 1))


@dataclass
class _Passes:
    """Of one size: seconds of the last ones, and how many passes there were when the last one was. `before`: what they
    took when they were forgotten."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MOST))
    last: int = 0
    before: float | None = None


class _Clocked:
    """What passes of each size take, as measured lately."""

    def __init__(self) -> None:
        self._passes: dict[tuple[int, int], _Passes] = {}

    def note(self, rows: int, width: int, seconds: float, now: int) -> None:
        """`now`: how many passes there were, this one included."""
        size = bucket(rows), width
        passes = self._passes.get(size)
        if passes is None or now - passes.last > FORGET:
            # The first one of a size may have been compiled: it says that there was one, and nothing of its time.
            before = self.typical(rows, width, now, REMEMBER)
            passes = self._passes[size] = _Passes(before=before)
        else:
            passes.seconds.append(seconds)
        passes.last = now

    def typical(self, rows: int, width: int, now: int, memory: int = FORGET) -> float | None:
        """What a pass of this size takes; None: unknown. `memory`: passes for which that is remembered."""
        passes = self._passes.get((bucket(rows), width))
        if passes is None or now - passes.last > memory:
            return None
        needed = LEAST if width == 1 else TRIES
        if len(passes.seconds) >= needed:
            return median_low(passes.seconds)
        return passes.before if memory > FORGET else None


class Drafter:
    """One lane's. `model`: what drafts where nothing is looked up; None: nothing does. `clock`: in seconds."""

    def __init__(self, model: DraftModel | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.model, self._clock = model, clock
        self._drafted, self._accepted = 0, 0
        self._passes, self._asked = _Clocked(), _Clocked()
        #: Seconds in which the model reads a token, as measured lately, and how many passes there were then.
        self._reading, self._read_at = 0.0, 0
        self._count, self._drafting = 0, 0
        #: Whether the model has read in this step, and for how many seconds it has drafted.
        self.has_read, self._own = False, 0.0
        self._warned = False

    @property
    def counts(self) -> tuple[int, int]:
        """Tokens that were tried as drafts, and those of them that were right."""
        return self._drafted, self._accepted

    def begin(self, rows: Sequence[Row]) -> None:
        """A step begins, in which these rows decode."""
        self.has_read, self._own = False, 0.0
        if self.model is not None:
            self.model.keep(rows)

    def leave(self, row: Row) -> None:
        """The end of a row."""
        if self.model is not None:
            self.model.forget(row)

    def reset(self) -> None:
        """The end of all rows."""
        if self.model is not None:
            self.model.give_up()

    def count(self, tried: Tried) -> None:
        """A pass with this draft was read."""
        generation, accepted = tried.row.generation, max(0, len(tried.taken) - 1)
        self._drafted += tried.drafted
        self._accepted += accepted
        generation.drafted += tried.drafted
        generation.accepted += accepted

    def note(self, rows: int, width: int, seconds: float) -> None:
        """A pass over `width` tokens of each row took `seconds`, from its launch until its tokens were there, what the
        model took before it included."""
        self._count += 1
        self._drafting = self._drafting + 1 if width > 1 else 0
        self._passes.note(rows, width, seconds - self._own, self._count)

    def plan(self, rows: Sequence[Row], room: int, ahead: int = 0) -> Plan:
        """What the next pass takes, at most `room` tokens of each row. `ahead`: how many tokens are on their way to the
        host, which would have to be those that were looked up."""
        alone = self._passes.typical(len(rows), 1, self._count) if rows else None
        if alone is None or self._drafting >= WITHOUT:
            return Plan()
        looked = [_looked_up(row, ahead) for row in rows]
        speed, width = self._best(looked, 0, alone, room)
        plan, model = Plan(width), self.model
        hopeful = [] if model is None else [row for row in rows if _guesses(row, ahead) and model.takes(row)]
        if model is None or not hopeful:
            return plan
        ready = [row for row in hopeful if model.ready(row)]
        if ready:
            faster, width = self._best(_with_guesses(rows, looked, ready, ahead), len(ready), alone, room)
            if faster > speed:
                speed, plan = faster, Plan(width, tuple(ready))
        behind = [row for row in hopeful if row not in ready]
        if not behind:
            return plan
        faster, _ = self._best(_with_guesses(rows, looked, hopeful, ahead), len(hopeful), alone, room)
        # What is being read already comes first.
        row = min(behind, key=model.unread)
        saved = PART * row.most_drafted * (1 / speed - 1 / faster)
        if saved > model.unread(row) * self._seconds_of_reading or (saved > 0 and self._explores(model, behind, alone)):
            return replace(plan, reading=row)
        return plan

    def _explores(self, model: DraftModel, behind: Sequence[Row], alone: float) -> bool:
        """Whether rows are read to know what the model takes to draft: where they are short."""
        if self._asked.typical(len(behind), WIDTHS[0], self._count, REMEMBER) is not None:
            return False
        return sum(map(model.unread, behind)) * self._seconds_of_reading < UNKNOWN * alone

    @property
    def _seconds_of_reading(self) -> float:
        """Of a token; 0: unknown."""
        return self._reading if self._count - self._read_at <= REMEMBER else 0.0

    def read(self, plan: Plan, rows: int, spare: int) -> None:
        """Let the model read what the plan says, in storage of at most `spare` bytes, next to so many rows."""
        model, row = self.model, plan.reading
        if model is None or row is None:
            return
        alone, token = self._passes.typical(rows, 1, self._count) or 0.0, self._seconds_of_reading
        tokens = min(MOST_READ, max(FEWEST_READ, int(alone / token))) if token else FEWEST_READ
        began, traced = self._clock(), model.traced
        try:
            read = model.read(row, tokens, spare)
        except Exception:
            self._lose(model)
            return
        self.has_read = read > 0
        if read and model.traced == traced:
            # What others take of the device only adds to it, and not each time.
            now = (self._clock() - began) / read
            self._reading, self._read_at = min(now, (now + token) / 2) if token else now, self._count

    def draft(self, plan: Plan, rows: Sequence[Row], spare: int) -> None:
        """Let the model draft what the plan says, of these rows, in at most `spare` bytes more than it has."""
        for row in rows:
            if row.guess is not None:
                row.guess.set(())
        model = self.model
        if model is None or not plan.asking:
            return
        if model.growth(plan.width - 1) > spare:
            model.give_up()
            return
        began = self._clock()
        try:
            sound = model.draft(plan.asking, plan.width - 1)
        except Exception:
            self._lose(model)
            return
        if not (sound or self._warned):
            log.warning("draft model %s gives numbers that are not finite: rows go on without it", model.name)
            self._warned = True
        self._own = self._clock() - began
        self._asked.note(len(plan.asking), plan.width, self._own, self._count + 1)

    def _lose(self, model: DraftModel) -> None:
        """It failed: a draft is wanted by nobody so much that its job should end for it."""
        log.exception("draft model %s failed; rows go on without it until the worker starts again", model.name)
        model.give_up()
        self.model = None

    def _best(self, hopes: Sequence[_Hope | None], asking: int, alone: float, room: int) -> tuple[float, int]:
        """Tokens a second of the best pass, and its width. `asking`: how many rows the model drafts for. `alone`: what
        a pass without drafts takes."""
        rows, sure = len(hopes), [hope for hope in hopes if hope is not None]
        # What a pass makes, and the seconds in which the best so far makes it.
        made, taken, chosen = GAIN * rows, alone, 1
        if not sure:
            return made / taken, chosen
        own, memory = GUESS * alone, REMEMBER if asking else FORGET
        for width, seconds in self._sizes(rows, alone, memory):
            if width > room:
                break
            asked = self._asked.typical(asking, width, self._count, memory) if asking else 0.0
            own = own if asked is None else asked / (width - 1)
            seconds += own * (width - 1)
            further = [hope.tokens(width - 1) for hope in sure]
            least, tokens = min(further) if len(sure) == rows else 0.0, rows + sum(further)
            if tokens * taken > made * seconds and seconds <= WAIT * (1 + least) * alone:
                made, taken, chosen = tokens, seconds, width
            if asked is None:
                break
        return made / taken, chosen

    def _sizes(self, rows: int, alone: float, memory: int) -> Iterator[tuple[int, float]]:
        """Widths, each with what a pass takes: those that were run, and the next one, of which it is guessed. `alone`:
        what a pass without drafts takes."""
        seconds, before, token = alone, 1, GUESS * alone
        for width in WIDTHS:
            known = self._passes.typical(rows, width, self._count, memory)
            if known is None:
                yield width, seconds + token * (width - before)
                return
            yield width, known
            seconds, before, token = known, width, max(0.0, known - seconds) / (width - before)


def _looked_up(row: Row, ahead: int) -> _Hope | None:
    if row.lookup is None or not row.lookup.expects:
        return None
    return _Hope(row.lookup.rate, row.most_drafted - ahead, ahead)


def _guesses(row: Row, ahead: int) -> bool:
    """Whether the model's next token is expected to be right more often than the one that is looked up."""
    hope = _looked_up(row, ahead)
    return row.guess is not None and row.guess.rate > (0.0 if hope is None else hope.rate ** (1 + ahead))


def _with_guesses(
    rows: Sequence[Row], looked: Sequence[_Hope | None], asking: Sequence[Row], ahead: int
) -> list[_Hope | None]:
    """The model sees the tokens that are on their way before it drafts."""
    return [
        _Hope(row.guess.rate, row.most_drafted - ahead, 0) if row.guess is not None and row in asking else hope
        for row, hope in zip(rows, looked, strict=True)
    ]

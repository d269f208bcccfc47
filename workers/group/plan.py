"""What rank 0 and the others say to each other: one JSON object a line, with a limit on each size.

Rank 0 says in which order all ranks make their turns; arrays go over MLX's own group. Every command has a number, and
is answered by it: rank 0 begins no turn of a run that would wait for another rank.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from engine.generation.followed import Admission, Count, LentAdapter
from engine.generation.limits import LaneLimits
from engine.training.followed import RunHeader
from stoker.contract.base import Adapter, Message
from stoker.contract.shown import brief
from stoker.contract.wording import refusal
from stoker.errors import StokerError

#: Of what is written here. Ranks of different ones do not work together.
VERSION = 6
#: Bytes that a line may have: a prompt of a million tokens has half of it.
LONGEST = 1 << 24

Text = Annotated[str, Field(max_length=1000)]
Number = Annotated[int, Field(ge=0, lt=2**53)]


class Hello(Message):
    """The first word of a rank: what has to be alike on all of them. `secret`: rank 0's, which came over the group."""

    said: Literal["hello"] = "hello"
    secret: Text
    rank: Number
    host: Text
    plan: Number
    stoker: Text
    mlx: Text
    device: Text
    precision: Text
    #: Whether it holds its part of each generating model alone.
    shard: bool


class Holds(Message):
    """The models are loaded: name → digest."""

    said: Literal["holds"] = "holds"
    models: dict[str, str]


class Begin(Message):
    said: Literal["begin"] = "begin"
    number: Number
    header: RunHeader


class Advance(Message):
    """Make the next turn of a run."""

    said: Literal["advance"] = "advance"
    number: Number
    run: Text


class Keep(Message):
    """Give the part of a run that rank 0 keeps."""

    said: Literal["keep"] = "keep"
    number: Number
    run: Text


class End(Message):
    """Forget a run."""

    said: Literal["end"] = "end"
    number: Number
    run: Text


class Open(Message):
    """Make the lane of a model that the ranks share, with rank 0's limits, and warm it up."""

    said: Literal["open"] = "open"
    number: Number
    model: Text
    slots: Number
    kv_bytes: Number
    prefix_share: float
    stall: float
    lookup: bool | None

    @classmethod
    def of(cls, number: int, model: str, limits: LaneLimits) -> Open:
        """Without what is each rank's own: `compiled` and `cores`."""
        return cls(
            number=number,
            model=model,
            slots=limits.slots,
            kv_bytes=limits.kv_bytes,
            prefix_share=limits.prefix_share,
            stall=limits.stall,
            lookup=limits.lookup,
        )

    @property
    def limits(self) -> LaneLimits:
        return LaneLimits(
            slots=self.slots,
            kv_bytes=self.kv_bytes,
            prefix_share=self.prefix_share,
            stall=self.stall,
            lookup=self.lookup,
        )


class Lend(Message):
    """Keep an adapter, whose matrices follow."""

    said: Literal["lend"] = "lend"
    number: Number
    model: Text
    adapter: LentAdapter


class Forget(Message):
    """Keep nothing of an adapter's version in memory: it is lent again before its next job comes."""

    said: Literal["forget"] = "forget"
    number: Number
    model: Text
    name: Adapter
    version: Count


class Admit(Message):
    """Take a job into the lane of a model."""

    said: Literal["admit"] = "admit"
    number: Number
    model: Text
    admission: Admission


class Drop(Message):
    """End jobs of that lane, by the numbers of their admissions."""

    said: Literal["drop"] = "drop"
    number: Number
    model: Text
    jobs: tuple[Number, ...]


class Turn(Message):
    """Make the next turn of that lane."""

    said: Literal["turn"] = "turn"
    number: Number
    model: Text
    lookahead: bool


class Measured(Message):
    """What the clock of rank 0 said, or 1 or 0 for what it found: the others go by it when they come to the same
    place."""

    said: Literal["measured"] = "measured"
    seconds: float


class Done(Message):
    """A command was done. `witness`: where it was a turn, of the run's state or of the tokens that it chose."""

    said: Literal["done"] = "done"
    number: Number
    witness: Text = ""


class Beat(Message):
    """The process lives."""

    said: Literal["beat"] = "beat"


class Stop(Message):
    """It is over. `why`: what was wrong; "": nothing."""

    said: Literal["stop"] = "stop"
    why: Text = ""


Command: TypeAlias = Begin | Advance | Keep | End | Open | Lend | Forget | Admit | Drop | Turn
Word: TypeAlias = Hello | Holds | Command | Measured | Done | Beat | Stop
_WORDS: TypeAdapter[Word] = TypeAdapter(Annotated[Word, Field(discriminator="said")])


class NotOfThePlan(StokerError):
    """A line that no rank of this version writes. Never leaves the process."""


def written(word: Word) -> bytes:
    """Raises `NotOfThePlan` for one that is too long to be read."""
    line = word.model_dump_json().encode() + b"\n"
    if len(line) > LONGEST:
        raise NotOfThePlan(f"a word of the plan has {len(line)} bytes; {LONGEST} are allowed.")
    return line


def read(line: bytes) -> Word:
    """Raises `NotOfThePlan`."""
    try:
        return _WORDS.validate_json(line)
    except ValidationError as error:
        shown, why = brief(line[:80].decode(errors="replace")), _explain(error.errors()[0])
        raise NotOfThePlan(f"{shown} given; a word of plan {VERSION} is needed ({why}).") from None


def _explain(problem: ErrorDetails) -> str:
    """What is wrong, behind the word and the field in which it is."""
    if problem["type"] == "json_invalid":
        return "expected JSON"
    said = "no such field" if problem["type"] == "extra_forbidden" else refusal(problem)
    return ": ".join(filter(None, (".".join(map(str, problem["loc"])), said)))

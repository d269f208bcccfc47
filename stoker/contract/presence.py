"""What workers report of themselves: clients read from it which models are warm."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, PlainSerializer

from stoker.contract.base import Message
from stoker.contract.codec import CONTRACT
from stoker.contract.requests import RERANK, EmbedRequest


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


#: Why something is as it is. It may name a file, whose name need not be Unicode: such a byte travels as `\udcff`.
Words = Annotated[str, PlainSerializer(_encodable, when_used="json")]


class Notice(Message):
    """What one side reports to its listeners. Another release may report more; only the fields known here are read."""

    model_config = ConfigDict(extra="ignore")


class ModelCard(Notice):
    """A model that some worker serves."""

    model: str
    architecture: str
    kinds: tuple[str, ...]
    #: Longest input, in tokens.
    context: int
    parameters: int
    #: Length of a vector; 0 for models that make none.
    dim: int = 0
    #: Whether its files have a chat template: then it was trained to answer messages, not to continue texts.
    chat: bool = False
    #: Whether its jobs of kind `embed` are those with a query alone: it scores texts, and makes no vectors.
    reranks: bool = False
    #: Bits in which the worker keeps the numbers of its keys and values; 16: as it computes them.
    kv_bits: int = 16
    #: Tokens of one prompt and its answer whose keys and values the worker's memory holds; 0: not said.
    kv_tokens: int = 0
    #: The version of the contract that the worker speaks: it takes jobs of no other.
    contract: int = CONTRACT
    #: When a worker last said that it serves the model, or may, seconds since the epoch.
    seen: float = 0.0
    #: Why no worker holds it nor may load it any more; "": one does, or may come back that did.
    gone: Words = ""

    def takes(self, model: str, kind: str) -> bool:
        """Whether jobs of this model and kind go to it, from a client of this contract."""
        return self.model == model and kind in self.kinds and self.contract == CONTRACT

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it can do, in the words of `kinds.ABILITIES`."""
        return tuple(RERANK if self.reranks and kind == EmbedRequest.kind else kind for kind in self.kinds)

    @property
    def described(self) -> str:
        """What it can do and how it is kept, for people."""
        kept = f", keys and values in {self.kv_bits} bits" if self.kv_bits < 16 else ""
        return f"{', '.join(self.abilities)}{kept}"


class ModelState(Notice):
    """A model as one worker has it. `state`: `warm`, `loading`, `offered` (it is loaded when a job for it waits) or
    `refused`; another release may know others. `bytes`: of its weights. `idle`: seconds since its last job here.
    `shared`: of what in it each rank of a group has a part, its `heads` or `layers`; "": this process has all of it."""

    model: str
    state: str
    pinned: bool = False
    bytes: int = 0
    idle: float = 0.0
    shared: str = ""
    #: Why it is refused.
    why: Words = ""


#: States of a pinned prefix.
READY, WAITING, REFUSED = "ready", "waiting", "refused"


class PrefixState(Notice):
    """A pinned prefix as one worker has it. `id`: of the pin. `state`: `ready`, `waiting` (it is prefilled when the
    worker is idle) or `refused`; another release may know others. `tokens`: of the prefix; `bytes`: of their keys and
    values; 0: not known. `why`: it is refused, or is not on the disk."""

    model: str
    name: str
    id: str
    state: str
    tokens: int = 0
    bytes: int = 0
    why: Words = ""


def describe_state(state: ModelState | None) -> str:
    """For people; a worker of a release that says no more holds what it names."""
    if state is None:
        return "warm"
    if state.state == "warm":
        shared = f", its {state.shared} shared by the ranks" if state.shared else ""
        return "warm" + (", pinned" if state.pinned else "") + shared
    if state.state == "offered":
        return "loaded when a job waits for it"
    return f"{state.state}: {state.why}" if state.why else state.state


def describe_prefix(state: PrefixState) -> str:
    """For people."""
    return f"{state.state}: {state.why}" if state.why else state.state


def node_of(worker: str) -> str:
    """The name that a worker keeps when it is started again; `worker` is one process of it."""
    return worker.partition("/")[0]


class Presence(Notice):
    """One worker, as of `time` (seconds since the epoch). `worker`: the name of this process, which none had before; up
    to its `/`, the name that it has in Flower, the same each time that it is started."""

    worker: str
    host: str
    pid: int
    device: str
    started: float
    time: float
    models: tuple[ModelCard, ...]
    #: model → adapters in the worker's memory.
    adapters: dict[str, tuple[str, ...]]
    #: kind → jobs held now, jobs that can be held.
    lanes: dict[str, tuple[int, int]]
    memory_bytes: int
    #: kind → why no more of its jobs are held now than there are, though there are slots.
    held_back: dict[str, str] = Field(default_factory=dict)
    #: Models that it loads when a job for one waits and nobody holds it.
    offers: tuple[ModelCard, ...] = ()
    #: Every model that it holds, loads, may load or could not load.
    states: tuple[ModelState, ...] = ()
    #: Every pinned prefix of the models that it holds.
    prefixes: tuple[PrefixState, ...] = ()
    #: Bytes that the weights of its models may take together; 0: not said.
    model_limit: int = 0
    #: Processes that train together as this worker; this one is the first.
    ranks: int = Field(default=1, ge=1)
    #: Whether it was asked to stop: it holds its models, and takes no more jobs.
    stopping: bool = False

    @property
    def place(self) -> str:
        """What it runs on, for people."""
        return self.device if self.ranks == 1 else f"{self.device}, {self.ranks} ranks"

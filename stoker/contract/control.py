"""What a worker is asked besides jobs: to hold a model or to let go of it; and what it answers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import StringConstraints

from stoker.contract.base import Message
from stoker.contract.names import Rule
from stoker.contract.presence import Notice, Words

#: What may be asked about a model.
ModelVerb: TypeAlias = Literal["load", "unload", "pin", "unpin"]
#: Characters of a model's name with its source.
LONGEST_SOURCE = 4096
#: How far a command is: `waiting` behind others, `begun`, and its two ends.
Phase: TypeAlias = Literal["begun", "done", "failed"]


class ModelCommand(Message):
    """`model`: a name, for `load` also NAME=SOURCE, as a worker's `--model`. `id`: names the answer."""

    id: Annotated[str, StringConstraints(pattern=rf"^{Rule.JOB_ID.pattern}$")]
    verb: ModelVerb
    model: Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_SOURCE)]


class ModelReport(Notice):
    """What has become of a command. `made_way`: models that the worker let go of for this one; `memory_bytes`: what its
    arrays take now; `was_warm`: a model that was to be loaded was there already, and its files were not read anew;
    `error` and `message`: the class and the words of what it failed of."""

    id: str
    worker: str
    verb: str
    model: str
    phase: Phase
    seconds: float = 0.0
    made_way: tuple[str, ...] = ()
    memory_bytes: int = 0
    was_warm: bool = False
    error: str = ""
    message: Words = ""

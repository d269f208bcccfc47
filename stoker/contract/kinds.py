"""The kinds of job that there are: the one table that clients, workers and the engine read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from stoker.contract.base import Message
from stoker.contract.requests import RERANK, AdapterRequest, EmbedRequest, GenerateRequest, Request, TrainRequest
from stoker.contract.results import AdapterResult, EmbedReply, GenerateResult, TrainResult


def task_name(kind: str) -> str:
    """The name of the Celery task that runs jobs of a kind: what a message asks for."""
    return f"stoker.{kind}"


#: Messages in the ready list of a queue: enough to keep workers busy between two claims, few enough that a better job
#: that comes later does not wait long.
READY = 8


@dataclass(frozen=True)
class JobKind:
    """`request`: what a client asks for. `result`: what the job's record holds when it is done.

    `ready`: messages in the ready list of one queue. `weight`: its share of the engine's time while several kinds have
    work; None: what `STOKER_TRAIN_SHARE` says. `urgent`: a reader waits for each of its tokens, so that it may go
    before its turn. `grace`: a worker that stops lets it run for a while; without, it goes back to its queue at once.
    """

    request: type[Request]
    result: type[Message]
    ready: int = READY
    weight: float | None = None
    urgent: bool = False
    grace: bool = True

    @property
    def name(self) -> str:
        return self.request.kind

    @property
    def task(self) -> str:
        return task_name(self.name)


EMBED = JobKind(EmbedRequest, EmbedReply, weight=2.0)
GENERATE = JobKind(GenerateRequest, GenerateResult, weight=4.0, urgent=True)
#: May last for hours, so one message is enough, and nothing is gained by waiting for its end.
TRAIN = JobKind(TrainRequest, TrainResult, ready=1, grace=False)
ADAPTERS = JobKind(AdapterRequest, AdapterResult, weight=4.0)

#: Name → kind.
KINDS: Mapping[str, JobKind] = {kind.name: kind for kind in (EMBED, GENERATE, TRAIN, ADAPTERS)}
#: What a client asks for, and a model can do or not -> the kind of the job that does it.
ABILITIES: Mapping[str, JobKind] = {**KINDS, RERANK: EMBED}


def of_queue(queue: str) -> JobKind | None:
    """The kind of the jobs of a queue, `stoker.MODEL.KIND`, with `.vN` behind it from the second contract on. None for
    a queue of no kind: a record that another program wrote may name any."""
    *_, name = re.sub(r"\.v[0-9]+$", "", queue).split(".")
    return KINDS.get(name)


def of_task(task: str) -> JobKind:
    """The kind that a Celery task runs."""
    return KINDS[task.removeprefix("stoker.")]


def of_request(request: type[Request]) -> JobKind:
    return KINDS[request.kind]

"""What was sent to an in-memory client."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TypeVar

from stoker.contract import AdapterRequest, EmbedRequest, GenerateRequest, Request, TrainRequest, decode, encode

R = TypeVar("R", bound=Request)


@dataclass(frozen=True)
class SentJob:
    """One job as it was sent: its request as a worker would read it, and the bytes of its input."""

    job_id: str
    request: Request
    data: bytes
    client: str


class Sent:
    """What was sent, in order: all `jobs`, and the requests of each kind."""

    def __init__(self) -> None:
        self.jobs: list[SentJob] = []

    def __repr__(self) -> str:
        return f"<Sent: {len(self.jobs)} jobs>"

    @property
    def embed(self) -> tuple[EmbedRequest, ...]:
        return tuple(request for request in self._of(EmbedRequest) if request.query is None)

    @property
    def rerank(self) -> tuple[EmbedRequest, ...]:
        """Those with a `query`."""
        return tuple(request for request in self._of(EmbedRequest) if request.query is not None)

    @property
    def generate(self) -> tuple[GenerateRequest, ...]:
        return self._of(GenerateRequest)

    @property
    def train(self) -> tuple[TrainRequest, ...]:
        return self._of(TrainRequest)

    @property
    def load(self) -> tuple[AdapterRequest, ...]:
        return self._of(AdapterRequest)

    def _of(self, kind: type[R]) -> tuple[R, ...]:
        return tuple(job.request for job in self.jobs if isinstance(job.request, kind))


def travelled(request: R) -> R:
    """As a worker reads it: what does not survive JSON is found here too."""
    return decode(type(request), json.loads(json.dumps(encode(request))))

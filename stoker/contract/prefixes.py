"""A prefix that is pinned: the beginning of prompts that the workers of a model keep ready."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import StringConstraints

from stoker.contract.base import NAME_PATTERN
from stoker.contract.codec import build
from stoker.contract.presence import Notice
from stoker.contract.requests import GenerateRequest
from stoker.errors import InvalidRequest

#: Prefixes of one model at most.
MOST_PREFIXES = 16
#: Characters of one as JSON, all that is between the tools and the last message.
LONGEST_PREFIX = 262_144


class PinnedPrefix(Notice):
    """What is pinned: exactly one of `prompt`, `prompt_ids` and `messages`, as in a `GenerateRequest`. `id`: of this
    pin, and no other of the same name; `time`: when it was made, seconds since the epoch; `client`: the key of who
    made it."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    time: float
    client: Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    template: dict[str, Any] | None = None
    adapter: str | None = None

    def request(self, model: str) -> GenerateRequest:
        """A request that goes on from it. Raises `InvalidRequest`."""
        asked = self.model_dump(exclude={"id", "time", "client"}, exclude_none=True)
        return build(GenerateRequest, {"model": model, **asked})

    @property
    def shown(self) -> str:
        """What it begins with, for people."""
        if self.prompt is not None:
            return self.prompt
        if self.messages is not None:
            return " ".join(str(message.get("content") or "") for message in self.messages)
        return f"{len(self.prompt_ids or ())} token ids"


def checked_length(prefix: PinnedPrefix) -> str:
    """Its JSON. Raises `InvalidRequest` for one that is too long."""
    text = prefix.model_dump_json(exclude_none=True)
    if len(text) > LONGEST_PREFIX:
        raise InvalidRequest(f"prefix: {len(text)} characters given as JSON; at most {LONGEST_PREFIX}. Shorten it.")
    return text

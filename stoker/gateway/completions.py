"""`/v1/completions`: a prompt continued as it is, without a chat template."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from stoker.client.options import GenerateOptions
from stoker.contract import GenerateResult, StreamToken
from stoker.contract.shown import as_json
from stoker.gateway.answers import Generation
from stoker.gateway.calls import Call, parsed
from stoker.gateway.errors import Names, Refused
from stoker.gateway.events import Event
from stoker.gateway.logprobs import all_legacy_logprobs, legacy_logprobs
from stoker.gateway.sampling import OpenAIBody
from stoker.gateway.usage import finish_reason, usage_of

NAMES = Names({"prompt_ids": "prompt", "top_logprobs": "logprobs", "adapter": "model"})
#: What OpenAI takes where no limit is given.
DEFAULT_TOKENS = 16


def _one_prompt(value: Any) -> Any:
    """A text, or the ids of its tokens; of a list of prompts, the only one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return value
    many = isinstance(value, list) and len(value) > 1
    hint = ". Send a request for each prompt" if many else ""
    raise ValueError(f"{as_json(value)} given; expected one text, or the ids of its tokens{hint}")


class CompletionBody(OpenAIBody):
    REFUSED: ClassVar[Mapping[str, str]] = {
        "best_of": "say n, and choose by logprobs",
        "echo": "put the prompt before the answer yourself",
        "suffix": "models here continue texts alone; leave it out",
    }
    IDLE: ClassVar[Mapping[str, object]] = {"best_of": 1, "echo": False, "suffix": ""}

    prompt: Annotated[str | Annotated[list[int], Field(fail_fast=True)], BeforeValidator(_one_prompt)]
    max_tokens: int = DEFAULT_TOKENS
    #: Alternatives reported with each token.
    logprobs: int | None = Field(default=None, ge=0, le=20)

    def options(self) -> GenerateOptions:
        return self.sampling() | GenerateOptions(max_tokens=self.max_tokens, top_logprobs=self.logprobs or 0)


async def asked(call: Call) -> Generation:
    """Raises `Refused`."""
    call, body = parsed(call, CompletionBody)
    model, adapter = call.model(body.model)
    form = CompletionForm(call.named.id, body.model, body.logprobs is not None, body.include_usage)
    options = body.options()
    return Generation(call.sender(body.user), model, adapter, body.prompt, options, body.seed, form, NAMES, body.stream)


@dataclass
class CompletionForm:
    job_id: str
    model: str
    wants_tokens: bool
    include_usage: bool
    #: Characters of each completion so far.
    _offsets: dict[int, int] = field(default_factory=dict)
    _created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, choices: Sequence[dict[str, object]]) -> dict[str, object]:
        return {
            "id": f"cmpl-{self.job_id}", "object": "text_completion", "created": self._created, "model": self.model,
            "choices": choices,
        }  # fmt: skip

    def whole(self, result: GenerateResult, tokens: Sequence[StreamToken]) -> dict[str, object]:
        choices = []
        for index, completion in enumerate(result.completions):
            own = [token for token in tokens if token.completion == index]
            said = all_legacy_logprobs(own) if self.wants_tokens else None
            reason = finish_reason(completion.finish_reason)
            choices.append({"index": index, "text": completion.text, "logprobs": said, "finish_reason": reason})
        return self._object(choices) | {"usage": usage_of(result)}

    def first(self) -> Iterator[Event]:
        return iter(())

    def token(self, token: StreamToken) -> Iterator[Event]:
        index = token.completion
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(token.text)
        reason = None if token.finish_reason is None else finish_reason(token.finish_reason)
        if not token.text and reason is None and not self.wants_tokens:
            return
        said = legacy_logprobs([token], offset) if self.wants_tokens else None
        choice = {"index": index, "text": token.text, "logprobs": said, "finish_reason": reason}
        usage: dict[str, object] = {"usage": None} if self.include_usage else {}
        yield Event(self._object([choice]) | usage)

    def last(self, result: GenerateResult) -> Iterator[Event]:
        if self.include_usage:
            yield Event(self._object([]) | {"usage": usage_of(result)})
        yield Event("[DONE]")

    def failed(self, refused: Refused) -> Iterator[Event]:
        yield Event(refused.openai())

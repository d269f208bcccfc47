"""`/v1/responses`: OpenAI's newer form of a conversation, of texts and function calls, without stored state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stoker.client.options import GenerateOptions
from stoker.contract.requests import MAX_ENTRIES
from stoker.gateway.answers import Generation
from stoker.gateway.calls import Call, parsed
from stoker.gateway.errors import Names
from stoker.gateway.fields import Body, Items
from stoker.gateway.response_form import Asked, ResponsesForm
from stoker.gateway.response_items import FunctionTool, Item, TextFormat, choice_of, conversation_of, items_of
from stoker.gateway.sampling import TIERS, GenerateBody
from stoker.gateway.tools import Choice, chosen, tool_options

NAMES = Names({"max_tokens": "max_output_tokens", "json_schema": "text", "adapter": "model", "messages": "input"})
_STORED = "nothing is stored here; send the whole conversation as input"


class TextOptions(Body):
    format: TextFormat = Field(default_factory=lambda: TextFormat(type="text"))


class ResponsesBody(GenerateBody):
    REFUSED: ClassVar[Mapping[str, str]] = {
        "access_programs": "leave it out",
        "background": "send it with x-stoker-on-disconnect: continue and an Idempotency-Key",
        "background_options": "leave it out",
        "context_management": "leave it out",
        "conversation": _STORED,
        "image": "models here write texts alone; leave it out",
        "include": "leave it out",
        "max_tool_calls": "functions, which the client calls, are the only tools; leave it out",
        "metadata": "nothing is stored that it could be found by; leave it out",
        "moderation": "leave it out",
        "previous_response_id": _STORED,
        "prompt": _STORED,
        "prompt_cache_key": "prefixes are kept by their tokens; leave it out",
        "prompt_cache_options": "prefixes are kept by their tokens; leave it out",
        "prompt_cache_retention": "prefixes are kept by their tokens; leave it out",
        "reasoning": "a model thinks as its chat template has it; leave it out",
        "safety_identifier": "name the sender with user",
        "stream_options": "counts always come with the last event; leave it out",
        "top_logprobs": "ask /v1/chat/completions for them",
    }
    IDLE: ClassVar[Mapping[str, object]] = {
        "background": False,
        "include": [],
        "metadata": {},
        "stream_options": {"include_obfuscation": False},
        "top_logprobs": 0,
    }
    USUAL: ClassVar[Mapping[str, object]] = {"tool_choice": "auto"}

    input: Annotated[Items[Item], BeforeValidator(items_of)] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    tools: Items[FunctionTool] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    truncation: Literal["disabled"] = "disabled"
    store: Literal[False] = False
    service_tier: Literal["auto", "default", "priority", "flex"] = "auto"
    user: str | None = None

    @property
    def usual_priority(self) -> int:
        return TIERS[self.service_tier]

    def choice(self) -> Choice:
        functions = [tool.function for tool in self.tools]
        return chosen(functions, choice_of(self.tool_choice), parallel=self.parallel_tool_calls)

    def options(self, most_tokens: int) -> GenerateOptions:
        options = self.sampling()
        limit = min(most_tokens, MAX_ENTRIES)
        options["max_tokens"] = limit if self.max_output_tokens is None else self.max_output_tokens
        schema = self.choice().schema_of_answer(self.text.format.schema_of_answer(), self.regex, "text.format or regex")
        return options | tool_options([tool.function for tool in self.tools], schema)

    def conversation(self) -> list[dict[str, object]]:
        first: list[dict[str, object]] = []
        if self.instructions is not None:
            first = [{"role": "system", "content": self.instructions}]
        return first + conversation_of(self.input)


async def asked(call: Call) -> Generation:
    """Raises `Refused`."""
    call, body = parsed(call, ResponsesBody)
    model, adapter = call.model(body.model)
    said = Asked(body.temperature, body.top_p, body.instructions, body.max_output_tokens)
    form = ResponsesForm(call.named.id, body.model, body.choice(), body.tools, said)
    options, prompt = body.options(await call.models.most_tokens(model)), body.conversation()
    return Generation(call.sender(body.user), model, adapter, prompt, options, body.seed, form, NAMES, body.stream)

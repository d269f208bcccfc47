"""What a request asks to be continued, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import reduce

import numpy as np

from engine.checkpoints.loading import LoadedModel
from engine.generation.beyond import BeyondMemory
from engine.models.openings import shared_length
from engine.text import chat
from engine.text.templates import choose
from stoker.contract import ChatMessage, GenerateRequest
from stoker.contract.reasoning import OPENER
from stoker.errors import InvalidRequest, TextTooLong

#: What may follow a beginning: a tokenizer joins the end of a text with what comes next, and templates look at it.
FOLLOWING = ("a", "1", " The", "\n\n-")


@dataclass(frozen=True)
class TokenizedPrompt:
    """`in_reasoning`: it ends in a block of reasoning, with which the answer goes on."""

    ids: list[int]
    in_reasoning: bool = False


def tokenize(model: LoadedModel, request: GenerateRequest, sent: float | None = None) -> TokenizedPrompt:
    """The prompt's ids, with room left for an answer. `sent`: when the request was, in seconds since the epoch; None:
    now. A template writes that date, in the time of this machine's place: a job that goes on elsewhere, or behind
    midnight, has the same prompt. Raises `InvalidRequest` and `TextTooLong`."""
    prompt = _tokenized(model, request, sent)
    ids = prompt.ids
    if not ids:
        raise InvalidRequest(f"prompt: {str(request.prompt)[:40]!r} given, which is no token of {request.model}.")
    if len(ids) >= model.context:
        raise TextTooLong(
            f"prompt: {len(ids)} tokens given; {request.model} takes {model.context} together with the answer. "
            "Shorten it."
        )
    return prompt


def of_ids(request: GenerateRequest, ids: Sequence[int]) -> GenerateRequest:
    """The request with these ids for its prompt. A text may have more of them than a client may name."""
    return request.model_copy(update={"prompt": None, "messages": None, "prompt_ids": tuple(ids)})


def beginning_of(model: LoadedModel, request: GenerateRequest) -> list[int]:
    """The ids that prompts have in common which go on from the request's: its text with more behind it, its messages
    with another one. Raises as `tokenize`."""
    if request.prompt_ids is not None:
        return tokenize(model, request).ids
    prompts = [np.asarray(tokenize(model, _followed(request, text)).ids, dtype=np.int32) for text in FOLLOWING]
    shared: list[int] = reduce(lambda left, right: left[: shared_length(left, right)], prompts).tolist()
    return shared


def _followed(request: GenerateRequest, text: str) -> GenerateRequest:
    if request.messages is None:
        return request.model_copy(update={"prompt": f"{request.prompt}{text}"})
    role = "assistant" if request.messages[-1].role in ("user", "tool") else "user"
    return request.model_copy(update={"messages": (*request.messages, ChatMessage(role=role, content=text))})


def check_ids(model: LoadedModel, request: GenerateRequest) -> None:
    """Raise `InvalidRequest` for a token id that the model does not have."""
    vocabulary = model.decoder.args.vocab
    for name in ("prompt_ids", "stop_token_ids", "logit_bias"):
        beyond = [index for index in getattr(request, name) or () if index >= vocabulary]
        if beyond:
            raise InvalidRequest(f"{name}: token {beyond[0]} given; {request.model} has 0 to {vocabulary - 1}.")


def check_memory(tokens: int, most: int, model: str) -> None:
    """Raise `BeyondMemory` for a prompt of more `tokens` than a worker can keep the keys and values of."""
    if tokens >= most:
        raise BeyondMemory(
            f"prompt: {tokens} tokens given; this worker's memory for keys and values holds {most} of {model}. "
            "Shorten it, or raise STOKER_KV_CACHE.",
            tokens,
        )


def _tokenized(model: LoadedModel, request: GenerateRequest, sent: float | None) -> TokenizedPrompt:
    if request.prompt_ids is not None:
        return TokenizedPrompt(list(request.prompt_ids))
    if request.prompt is not None:
        return TokenizedPrompt(model.tokenizer.encode(request.prompt), _ends_open(request.prompt))
    text = _render(model, request, sent)
    # The template writes the special tokens itself, the one at the beginning too.
    return TokenizedPrompt(model.tokenizer.encode(text, special=False), _opened(text, request))


def _ends_open(text: str) -> bool:
    return text.rstrip().endswith(OPENER)


def _opened(text: str, request: GenerateRequest) -> bool:
    """Whether the template has begun the answer's reasoning: a message of the user's may end with the marker too."""
    last = (request.messages or ())[-1]
    said = (last.content or "").rstrip()
    by_user = last.role != "assistant" and bool(said) and text.rstrip().endswith(said)
    return _ends_open(text) and not by_user


def _render(model: LoadedModel, request: GenerateRequest, sent: float | None) -> str:
    tokenizer = model.tokenizer
    return chat.render(
        choose(tokenizer.templates, request.tools is not None, request.model),
        [message.model_dump(mode="json", exclude_none=True) for message in request.messages or ()],
        tools=request.tools,
        names=tokenizer.manners.names,
        extra=request.template,
        moment=None if sent is None else datetime.fromtimestamp(sent),
    )

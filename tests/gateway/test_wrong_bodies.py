"""A body in which much is wrong is refused for the first of it: to look at all would hold up all streams."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from stoker.contract.requests import GenerateRequest
from stoker.gateway import anthropic, batches, chat, completions, embeddings, fine_tuning_body, rerank, responses
from stoker.gateway.errors import Refused
from stoker.gateway.fields import MOST_ITEMS, Body, parse
from tests.stoker.test_wording import all_of, check_words, problems

MESSAGE = {"role": "user", "content": "a"}
MANY = 1000
#: So many names that no field has.
NAMES: Mapping[str, Any] = {f"x{number}": 1 for number in range(MANY)}
BODIES: list[tuple[type[Body], dict[str, Any]]] = [
    (chat.ChatBody, {"messages": [1] * MANY}),
    (chat.ChatBody, {"messages": [{**MESSAGE, **NAMES}]}),
    (chat.ChatBody, {"messages": [{**MESSAGE, "tool_calls": [1] * MANY}]}),
    (chat.ChatBody, {"messages": [MESSAGE], "tools": [{}] * MANY}),
    (chat.ChatBody, {"messages": [MESSAGE], "response_format": {"type": "text", **NAMES}}),
    (chat.ChatBody, {"messages": [MESSAGE], "stop_token_ids": ["a"] * MANY}),
    (chat.ChatBody, {"messages": [MESSAGE], "logit_bias": {str(number): "a" for number in range(2000)}}),
    (completions.CompletionBody, {"prompt": "a", "stream_options": NAMES}),
    (anthropic.MessagesBody, {"max_tokens": 1, "messages": ["a"] * MANY}),
    (anthropic.MessagesBody, {"max_tokens": 1, "messages": [{"role": "user", "content": [1] * MANY}]}),
    (anthropic.MessagesBody, {"max_tokens": 1, "messages": [MESSAGE], "system": [{"type": "x"}] * MANY}),
    (anthropic.MessagesBody, {"max_tokens": 1, "messages": [MESSAGE], "tools": [1] * MANY}),
    (responses.ResponsesBody, {"input": [1] * MANY}),
    (responses.ResponsesBody, {"input": "a", "tools": [{"type": "function"}] * MANY}),
    (batches.BatchBody, {"metadata": NAMES}),
    (fine_tuning_body.FineTuningBody, {"training_file": "f", "metadata": NAMES}),
]  # fmt: skip
#: Fields that a body has to have.
BATCH = {"input_file_id": "f", "endpoint": "/v1/embeddings", "completion_window": "24h"}


def whole(body: type[Body], fields: dict[str, Any]) -> dict[str, Any]:
    return {**BATCH, **fields} if body is batches.BatchBody else {"model": "m", **fields}


@pytest.mark.parametrize(("body", "fields"), BODIES, ids=range(len(BODIES)))
def test_only_the_first_of_what_is_wrong_is_looked_at(body: type[Body], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as wrong:
        body.model_validate(whole(body, fields))
    assert wrong.value.error_count() <= 2
    with pytest.raises(Refused) as refused:
        parse(body, json.dumps(whole(body, fields)).encode())
    assert refused.value.param is not None
    assert refused.value.param.startswith(list(fields)[-1])


def test_a_list_has_as_many_items_as_a_job_has_messages() -> None:
    for count in (MOST_ITEMS, MOST_ITEMS + 1):
        raw = json.dumps({"model": "m", "messages": [MESSAGE] * count}).encode()
        if count <= MOST_ITEMS:
            assert len(parse(chat.ChatBody, raw).messages) == count
        else:
            with pytest.raises(Refused, match="at most 4096 items"):
                parse(chat.ChatBody, raw)


def lists_of(schema: Any) -> Iterator[dict[str, Any]]:
    """Every list that pydantic looks through, with how it does."""
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            yield schema
        for value in schema.values():
            yield from lists_of(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from lists_of(value)


@pytest.mark.parametrize(
    "body",
    [chat.ChatBody, completions.CompletionBody, anthropic.MessagesBody, responses.ResponsesBody,
     embeddings.EmbeddingBody, rerank.RerankBody, batches.BatchBody, fine_tuning_body.FineTuningBody],
)  # fmt: skip
def test_no_list_of_any_body_is_looked_through_behind_its_first_wrong_item(body: type[Body]) -> None:
    assert all(found.get("fail_fast") for found in lists_of(body.__pydantic_core_schema__))


def test_ids_of_a_prompt_are_looked_at_up_to_the_first_wrong_one() -> None:
    with pytest.raises(ValidationError) as wrong:
        GenerateRequest(model="m", prompt_ids=(-1,) * MANY)
    assert wrong.value.error_count() <= 2


@pytest.mark.parametrize("body", all_of(BaseModel, "stoker.gateway"), ids=lambda one: one.__name__)
def test_a_field_of_any_body_is_refused_in_words_that_pydantic_does_not_have(body: type[BaseModel]) -> None:
    for problem in problems(body):
        check_words(problem)

"""Each field of a body arrives in the request of its job, as that and as nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stoker.gateway import anthropic, chat, completions, embeddings, rerank, responses
from stoker.gateway.anthropic import MessagesBody
from stoker.gateway.chat import ChatBody
from stoker.gateway.completions import CompletionBody
from stoker.gateway.embeddings import EmbeddingBody
from stoker.gateway.fields import Body
from stoker.gateway.rerank import RerankBody
from stoker.gateway.responses import ResponsesBody
from stoker.testing import AsyncFakeClient
from tests.gateway.test_rules import MODELS, asking, generating

#: Fields of the body → field of the request, and what it is then.
Row = tuple[dict[str, Any], str, Any]
SAID = [{"role": "user", "content": "a"}]
FUNCTION = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
SCHEMA = {"type": "object", "title": "x"}

SAMPLED: dict[str, Row] = {
    "temperature": ({"temperature": 0.5}, "temperature", 0.5),
    "top_p": ({"top_p": 0.5}, "top_p", 0.5),
    "top_k": ({"top_k": 3}, "top_k", 3),
    "min_p": ({"min_p": 0.25}, "min_p", 0.25),
    "repetition_penalty": ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
    "stop_token_ids": ({"stop_token_ids": [1, 2]}, "stop_token_ids", (1, 2)),
    "ignore_eos": ({"ignore_eos": True}, "ignore_eos", True),
    "lookup": ({"lookup": True}, "lookup", True),
    "regex": ({"regex": "a+"}, "regex", "a+"),
    "priority": ({"priority": 1}, "priority", 1),
    "deadline": ({"deadline": 9.5}, "deadline", 9.5),
    "seed": ({"seed": 6}, "seed", 6),
}
TIER: dict[str, Row] = {"service_tier": ({"service_tier": "flex"}, "priority", 8)}
OPENAI: dict[str, Row] = {
    "stop": ({"stop": ["x", "y"]}, "stop", ("x", "y")),
    "n": ({"n": 2}, "n", 2),
    "presence_penalty": ({"presence_penalty": 0.5}, "presence_penalty", 0.5),
    "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
    "logit_bias": ({"logit_bias": {"5": 1.5}}, "logit_bias", {5: 1.5}),
}
VECTORS: dict[str, Row] = {
    "truncation": ({"truncation": "end"}, "truncation", "end"),
    "normalize": ({"normalize": True}, "normalize", True),
    "prompt": ({"prompt": "query"}, "prompt", "query"),
    "priority": ({"priority": 1}, "priority", 1),
    "deadline": ({"deadline": 9.5}, "deadline", 9.5),
}
#: Endpoint → what answers it, its body, a body that it takes, its fields, and those that other tests are about.
ENDPOINTS: dict[str, tuple[Any, type[Body], dict[str, Any], dict[str, Row], set[str]]] = {
    "chat": (
        generating(chat.asked),
        ChatBody,
        {"model": "smol", "messages": SAID, "max_tokens": 5},
        SAMPLED
        | TIER
        | OPENAI
        | {
            "max_tokens": ({"max_tokens": 7}, "max_tokens", 7),
            "max_completion_tokens": ({"max_tokens": None, "max_completion_tokens": 7}, "max_tokens", 7),
            "top_logprobs": ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", 3),
            "response_format": ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
            "tools": ({"tools": [TOOL], "tool_choice": "none"}, "tools", (TOOL,)),
            "tool_choice": ({"tools": [TOOL], "tool_choice": TOOL | {"function": {"name": "add"}}}, "json_schema", {
                "type": "object"
            }),
            "chat_template_kwargs": ({"chat_template_kwargs": {"a": 1}}, "template", {"a": 1}),
        },
        {"model", "messages", "stream", "stream_options", "user", "logprobs", "parallel_tool_calls", "store"},
    ),
    "completions": (
        generating(completions.asked),
        CompletionBody,
        {"model": "smol", "prompt": "a"},
        SAMPLED
        | TIER
        | OPENAI
        | {
            "max_tokens": ({"max_tokens": 7}, "max_tokens", 7),
            "logprobs": ({"logprobs": 3}, "top_logprobs", 3),
            "prompt": ({"prompt": ["b"]}, "prompt", "b"),
        },
        {"model", "stream", "stream_options", "user"},
    ),
    "messages": (
        generating(anthropic.asked),
        MessagesBody,
        {"model": "smol", "messages": SAID, "max_tokens": 5},
        SAMPLED
        | {
            "max_tokens": ({"max_tokens": 7}, "max_tokens", 7),
            "stop_sequences": ({"stop_sequences": ["x"]}, "stop", ("x",)),
            "tools": (
                {"tools": [{"name": "add", "description": "adds", "input_schema": {"type": "object"}}]},
                "tools",
                (TOOL,),
            ),
        },
        {"model", "messages", "stream", "system", "metadata", "service_tier", "tool_choice"},
    ),
    "responses": (
        generating(responses.asked),
        ResponsesBody,
        {"model": "smol", "input": "a", "max_output_tokens": 5},
        SAMPLED
        | TIER
        | {
            "max_output_tokens": ({"max_output_tokens": 7}, "max_tokens", 7),
            "text": (
                {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}, "json_schema", SCHEMA
            ),
            "tools": ({"tools": [{"type": "function", **FUNCTION}]}, "tools", (TOOL,)),
        },
        {"model", "input", "instructions", "stream", "user", "tool_choice", "parallel_tool_calls"}
        | {"truncation", "store"},
    ),
    "embeddings": (
        embeddings.answered,
        EmbeddingBody,
        {"model": "mini", "input": "a"},
        VECTORS | {"dimensions": ({"dimensions": 4}, "dimensions", 4), "input": ({"input": ["b"]}, "texts", ("b",))},
        {"model", "encoding_format", "user"},
    ),
    "rerank": (
        rerank.answered,
        RerankBody,
        {"model": "judge", "query": "q", "documents": ["a"]},
        VECTORS
        | {
            "query": ({"query": "other"}, "query", "other"),
            "documents": ({"documents": [{"text": "b"}]}, "texts", ("b",)),
        },
        {"model", "top_n", "return_documents", "user"},
    ),
}  # fmt: skip
CASES = [(endpoint, name) for endpoint, row in ENDPOINTS.items() for name in row[3]]


def sent(endpoint: str, **fields: Any) -> dict[str, Any]:
    """The request of the job that a body with these fields sends."""
    answer, _, body, _, _ = ENDPOINTS[endpoint]
    seed = {} if endpoint in ("embeddings", "rerank") else {"seed": 1}

    async def run() -> dict[str, Any]:
        client = AsyncFakeClient(models=MODELS)
        client.script.generate("an answer")
        await answer(asking(client, {**body, **seed, **fields}, None, stays=True))
        (job,) = client.sent.jobs
        return dict.fromkeys(type(job.request).model_fields) | job.request.model_dump()

    return asyncio.run(run())


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_of_a_body_is_known_here(endpoint: str) -> None:
    _, body, _, rows, others = ENDPOINTS[endpoint]
    assert body.model_fields.keys() == rows.keys() | others
    assert not rows.keys() & others


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_a_field_of_a_body_changes_its_own_field_of_the_request(endpoint: str, name: str) -> None:
    fields, field, value = ENDPOINTS[endpoint][3][name]
    plain, asked = sent(endpoint), sent(endpoint, **fields)
    assert plain[field] != value, "the default would show nothing"
    assert asked[field] == value
    also = {"tools"} if "tools" in fields else set()
    assert {each for each in asked if asked[each] != plain[each]} <= {field} | also, "and no other"


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
@pytest.mark.parametrize(("tier", "priority"), [("auto", 5), ("default", 5), ("priority", 2), ("flex", 8)])
def test_a_tier_is_a_priority_and_a_priority_of_its_own_is_more_exact(endpoint: str, tier: str, priority: int) -> None:
    assert sent(endpoint, service_tier=tier)["priority"] == priority
    assert sent(endpoint, service_tier=tier, priority=7)["priority"] == 7
    assert sent(endpoint, service_tier=tier, priority=0)["priority"] == 0

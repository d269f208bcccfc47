"""The gateway over a real broker, a real worker and real weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from stoker import Client
from stoker.local.stack import Stack
from tests.conftest import EMBED_MODEL, GENERATE_MODEL
from tests.gateway.machinery import gateway_of
from tests.gateway.test_chat import WEATHER
from tests.integration.machinery import GOLDENS

pytestmark = pytest.mark.integration

HELLO: Any = [{"role": "user", "content": "What is the weather in Bonn?"}]


@pytest.fixture(scope="module")
def stack(real_stack: Stack) -> Stack:
    return real_stack


@pytest.fixture
def api(stack: Stack, client: Client) -> Iterator[openai.OpenAI]:
    with gateway_of(stack.settings) as opened:
        yield opened


def test_answers_are_those_of_the_client(api: openai.OpenAI, client: Client) -> None:
    golden = GOLDENS[0]
    made = api.completions.create(model=GENERATE_MODEL, prompt=golden["prompt"], max_tokens=8, temperature=0)
    assert len(made.choices[0].text) > 8
    assert golden["text"].startswith(made.choices[0].text)
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(golden["prompt_ids"])
    vectors = api.embeddings.create(model=EMBED_MODEL, input=["a warm model", "a cold start"])
    wanted = client.embed(["a warm model", "a cold start"], model=EMBED_MODEL).result(60)
    assert np.allclose([item.embedding for item in vectors.data], wanted, atol=1e-6)
    assert vectors.usage.prompt_tokens > 4
    assert {model.id for model in api.models.list()} >= {EMBED_MODEL, GENERATE_MODEL}


@pytest.mark.slow
def test_a_forced_call_of_a_real_model_has_arguments_that_fit(api: openai.OpenAI) -> None:
    made = api.chat.completions.create(
        model=GENERATE_MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=64
    )
    for call in made.choices[0].message.tool_calls or ():
        assert call.type == "function"
        assert call.function.name == "weather"
        assert isinstance(json.loads(call.function.arguments)["town"], str)
    assert made.choices[0].message.tool_calls or made.choices[0].finish_reason == "length"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        api.chat.completions.create(
            model=GENERATE_MODEL, messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )  # fmt: skip
    assert caught.value.param == "response_format"


@pytest.mark.slow
def test_a_real_model_that_may_call_a_function_and_does_not_says_what_it_says_without(
    api: openai.OpenAI,
) -> None:
    asked: Any = {"model": GENERATE_MODEL, "messages": HELLO, "tools": [WEATHER], "temperature": 0, "max_tokens": 8}
    without = api.chat.completions.create(**asked, tool_choice="none").choices[0].message.content
    with api.chat.completions.create(**asked, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert without
    assert api.chat.completions.create(**asked).choices[0].message.content == streamed == without

"""The gateway over a real broker and a real worker."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import numpy as np
import openai
import pytest

from stoker import Client, GenerateJob
from stoker.errors import JobCancelled
from stoker.local.stack import Stack
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, wait_until
from tests.gateway.machinery import Process, gateway_of
from tests.gateway.test_chat import WEATHER
from tests.integration.machinery import GOLDENS

pytestmark = pytest.mark.integration

HELLO: Any = [{"role": "user", "content": "What is the weather in Bonn?"}]


@pytest.fixture
def api(stack: Stack, client: Client) -> Iterator[openai.OpenAI]:
    with gateway_of(stack.settings) as opened:
        yield opened


def generated(client: Client, job_id: str) -> GenerateJob:
    job = client.job(job_id)
    assert isinstance(job, GenerateJob)
    return job


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


def test_a_real_model_that_may_call_a_function_and_does_not_says_what_it_says_without(
    api: openai.OpenAI,
) -> None:
    asked: Any = {"model": GENERATE_MODEL, "messages": HELLO, "tools": [WEATHER], "temperature": 0, "max_tokens": 8}
    without = api.chat.completions.create(**asked, tool_choice="none").choices[0].message.content
    with api.chat.completions.create(**asked, stream=True) as stream:
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert without
    assert api.chat.completions.create(**asked).choices[0].message.content == streamed == without


def test_the_same_conversation_has_the_same_answer_in_each_vendors_form(api: openai.OpenAI) -> None:
    fields: Any = {"model": GENERATE_MODEL, "extra_body": {"temperature": 0}}
    chat = api.chat.completions.create(messages=HELLO, max_tokens=8, **fields)
    newer = api.responses.create(input=HELLO[0]["content"], max_output_tokens=8, **fields)
    base_url = str(api.base_url).removesuffix("/v1/")
    with anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0, timeout=60) as claude:
        message = claude.messages.create(messages=HELLO, max_tokens=8, **fields)
        with claude.messages.stream(messages=HELLO, max_tokens=8, **fields) as stream:
            streamed = "".join(stream.text_stream)
    text = chat.choices[0].message.content
    assert text
    assert newer.output_text == text
    assert [block.text for block in message.content if block.type == "text"] == [text]
    assert streamed == text
    assert chat.usage is not None
    counted = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert counted == chat.usage.prompt_tokens > 0


def test_a_client_that_leaves_cancels_its_job(api: openai.OpenAI, client: Client) -> None:
    stream = api.chat.completions.create(model=GENERATE_MODEL, messages=HELLO, max_tokens=2000, stream=True)
    job = generated(client, stream.response.headers["x-request-id"])
    next(iter(stream))
    stream.close()
    with pytest.raises(JobCancelled):
        job.result(30)


def test_a_stream_whose_gateway_was_killed_goes_on_at_another_one(
    stack: Stack, api: openai.OpenAI, client: Client
) -> None:
    body = {"model": GENERATE_MODEL, "prompt": "The furnace was", "max_tokens": 60, "stream": True, "seed": 3}
    first = Process(stack.settings)
    found: list[str] = []
    with httpx2.stream("POST", f"{first.url}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        while len(found) < 9:
            found.append(next(lines))
        first.process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx2.HTTPError):
            found += lines
    first.stop()
    last = [line for line in found if line.startswith("id: ")][-1].removeprefix("id: ")
    # What has no end is not taken: only a whole event counts.
    found = found[: len(found) - found[::-1].index("")]
    with httpx2.stream(
        "POST", f"{api.base_url}completions", json=body, headers={"last-event-id": last}, timeout=60
    ) as response:
        found += response.iter_lines()
    chunks = [json.loads(line[6:]) for line in found if line.startswith("data: {")]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    job = generated(client, last.partition(":")[0])
    assert text == job.result(60).text
    assert len(client.jobs()) == 0
    wait_until(lambda: not client.jobs(), "no job is left")

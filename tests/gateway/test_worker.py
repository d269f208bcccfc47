"""The gateway over a real broker and a real worker: what hangs on no weights."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from stoker import Client, GenerateJob
from stoker.errors import JobCancelled
from stoker.local.stack import Stack
from tests.conftest import GENERATE_MODEL, wait_until
from tests.gateway.machinery import Process, gateway_of

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


def test_the_same_conversation_has_the_same_answer_in_each_vendors_form(api: openai.OpenAI) -> None:
    import anthropic

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

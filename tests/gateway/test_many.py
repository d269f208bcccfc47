"""Many streams at once: each is whole, and its own."""

from __future__ import annotations

import asyncio

import openai
import pytest

from stoker import Client
from stoker.contract import GenerateRequest
from stoker.local.stack import Stack
from stoker.testing import AsyncFakeClient
from tests.conftest import GENERATE_MODEL
from tests.gateway.conftest import CHAT
from tests.gateway.machinery import Served, gateway_of


async def streamed(base_url: str, model: str, prompts: list[str], tokens: int) -> list[str]:
    """The text of each stream; all of them are open at a time."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=300) as client:

        async def one(prompt: str) -> str:
            stream = await client.completions.create(
                model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        return await asyncio.gather(*(one(prompt) for prompt in prompts))


def test_many_streams_at_once_have_each_its_own_text(served: Served, fake: AsyncFakeClient) -> None:
    def answer(request: GenerateRequest) -> str:
        return f"{request.prompt} and so on"

    fake.script.generate(answer, times=None)
    prompts = [f"number {number}" for number in range(60)]
    texts = asyncio.run(streamed(f"{served.url}/v1", CHAT, prompts, 16))
    assert texts == [f"{prompt} and so on" for prompt in prompts]


@pytest.mark.slow
@pytest.mark.integration
def test_two_hundred_streams_of_a_real_worker_are_those_of_the_client(stack: Stack, client: Client) -> None:
    prompts = [f"Number {number} is" for number in range(200)]
    with gateway_of(stack.settings) as gateway:
        texts = asyncio.run(streamed(str(gateway.base_url), GENERATE_MODEL, prompts, 8))
    jobs = [client.generate(prompt, model=GENERATE_MODEL, max_tokens=8) for prompt in prompts[::20]]
    assert [job.result(120).text for job in jobs] == texts[::20]
    assert all(texts)

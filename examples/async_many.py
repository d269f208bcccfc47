"""Many jobs at once from one event loop: they share the worker's running batch, and each keeps its own answer."""

import asyncio

from stoker import AsyncClient

PROMPTS = ["The sea was", "The mountain was", "The city was", "The forest was"]


async def answer(client: AsyncClient, prompt: str) -> str:
    job = await client.generate(prompt, max_tokens=8)
    return prompt + (await job.result(timeout=60)).text


async def main() -> None:
    async with AsyncClient() as client:
        for text in await asyncio.gather(*(answer(client, prompt) for prompt in PROMPTS)):
            print(text.replace("\n", " "))


asyncio.run(main())

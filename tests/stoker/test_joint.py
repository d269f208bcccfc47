"""What several ask at the same time is asked once: of workers, whose answers are the same for all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stoker.client.asynchronously import Joint
from stoker.contract.kinds import GENERATE
from stoker.errors import UnknownModel
from stoker.gateway.calls import Models
from stoker.testing import AsyncFakeClient


class Broker:
    """It answers with how often it was asked, once it may. An answer that is an error is raised."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers: dict[int, Exception] = {}
        self.may_answer = asyncio.Event()

    async def ask(self) -> int:
        self.asked += 1
        number = self.asked
        await self.may_answer.wait()
        if number in self.answers:
            raise self.answers[number]
        return number


async def together(joint: Joint[int], broker: Broker, count: int) -> list[asyncio.Future[int]]:
    asking: list[asyncio.Future[int]] = [asyncio.ensure_future(joint.ask("it", broker.ask)) for _ in range(count)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return asking


def test_all_who_ask_at_once_have_one_answer_and_who_asks_later_another() -> None:
    async def main() -> None:
        joint, broker = Joint[int](), Broker()
        asking = await together(joint, broker, 3)
        broker.may_answer.set()
        assert await asyncio.gather(*asking) == [1, 1, 1]
        assert await joint.ask("it", broker.ask) == 2
        different = await asyncio.gather(joint.ask("it", broker.ask), joint.ask("other", broker.ask))
        assert list(different) == [3, 4]

    asyncio.run(main())


def test_an_error_is_the_answer_of_all_and_is_not_kept() -> None:
    async def main() -> None:
        joint, broker = Joint[int](), Broker()
        broker.answers = {1: UnknownModel("none")}
        asking = await together(joint, broker, 2)
        broker.may_answer.set()
        found = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(error) for error in found] == [UnknownModel, UnknownModel]
        assert await joint.ask("it", broker.ask) == 2

    asyncio.run(main())


def test_one_who_is_cancelled_leaves_the_others_their_answer() -> None:
    async def main() -> None:
        joint, broker = Joint[int](), Broker()
        first, other = await together(joint, broker, 2)
        first.cancel()
        await asyncio.wait({first})
        broker.may_answer.set()
        assert (first.cancelled(), await other) == (True, 1)

    asyncio.run(main())


def test_who_asks_behind_a_change_gets_no_answer_from_before() -> None:
    async def main() -> None:
        joint, broker = Joint[int](), Broker()
        before = await together(joint, broker, 1)
        joint.forget()
        behind = await together(joint, broker, 2)
        broker.may_answer.set()
        assert await asyncio.gather(*before, *behind) == [1, 2, 2]
        assert await joint.ask("it", broker.ask) == 3

    asyncio.run(main())


@pytest.mark.parametrize("asks", ["workers", "models"])
def test_many_jobs_that_are_sent_at_once_ask_for_workers_and_models_once(
    asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice of the model, and the gateway's question how long an answer may be, each once."""

    async def main() -> int:
        client, asked = AsyncFakeClient(models={"m": [GENERATE.name]}), 0
        ask = getattr(client.link, asks)

        async def counted() -> Any:
            nonlocal asked
            asked += 1
            await asyncio.sleep(0)
            return await ask()

        monkeypatch.setattr(client.link, asks, counted)
        twin = client.with_key("other")
        monkeypatch.setattr(twin.link, asks, counted)
        known = Models(client)
        await asyncio.gather(*(one.choose_model("m", GENERATE.name) for one in (client, twin, client)))
        await asyncio.gather(*(known.most_tokens("m") for _ in range(3)))
        return asked

    assert asyncio.run(main()) == {"workers": 1, "models": 2}[asks]


def test_a_model_that_was_loaded_is_found_though_it_was_asked_for_before(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> str:
        client = AsyncFakeClient(models={"other": [GENERATE.name]}, may_load={"m": [GENERATE.name]})
        ask, go_on, asked = client.link.models, asyncio.Event(), 0

        async def held() -> Any:
            nonlocal asked
            asked += 1
            if asked > 1:
                return await ask()
            await go_on.wait()
            raise UnknownModel("nobody serves it")

        monkeypatch.setattr(client.link, "models", held)
        before = asyncio.ensure_future(client.choose_model("m", GENERATE.name))
        await asyncio.sleep(0)
        await client.models.load("m")
        async with asyncio.timeout(10):
            found = await client.choose_model("m", GENERATE.name)
        go_on.set()
        with pytest.raises(UnknownModel):
            await before
        return found

    assert asyncio.run(main()) == "m"

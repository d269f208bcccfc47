"""Scripts go to the broker by their hash."""

from __future__ import annotations

import asyncio
from typing import Any

from redis.exceptions import NoScriptError

from stoker.broker.connection import connect, connect_async
from stoker.broker.ledger.script import LuaScript
from stoker.settings import Settings


class FakeRedis:
    """Forgets its scripts when asked; notes how each call was sent."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.sent: list[str] = []

    def evalsha(self, name: str, *arguments: Any) -> str:
        self.sent.append("hash")
        if name not in self.known:
            raise NoScriptError
        return "reply"

    def eval(self, text: str, *arguments: Any) -> str:
        self.sent.append("text")
        self.known.add(SCRIPT.hash)
        return "reply"


SCRIPT = LuaScript("return {KEYS[1], ARGV[1]}")


def test_the_text_goes_over_once_and_again_after_the_broker_has_forgotten_it() -> None:
    redis = FakeRedis()
    assert [SCRIPT(redis, ["k"], ["a"]) for _ in range(3)] == ["reply"] * 3
    assert redis.sent == ["hash", "text", "hash", "hash"]
    redis.known.clear()
    assert SCRIPT(redis, ["k"], ["a"]) == "reply"
    assert redis.sent[4:] == ["hash", "text"]


def test_both_clients_get_the_reply_of_a_broker_that_has_just_forgotten_its_scripts(broker: Settings) -> None:
    redis = connect(broker)

    async def from_asyncio() -> Any:
        client = connect_async(broker)
        try:
            return [await SCRIPT(client, ["k"], ["a"]) for _ in range(2)]
        finally:
            await client.aclose()

    redis.script_flush()
    assert [SCRIPT(redis, ["k"], ["a"]) for _ in range(2)] == [[b"k", b"a"]] * 2
    redis.script_flush()
    assert asyncio.run(from_asyncio()) == [[b"k", b"a"]] * 2
    redis.close()

"""Raw messages in the ready lists, held messages, and what is published on the channels."""

from __future__ import annotations

import json
import random
from typing import Any

from stoker.broker import keys, letters
from stoker.broker.envelope import envelope
from tests.fuzz import odd
from tests.fuzz.input import Input
from tests.fuzz.world import QUEUES, World, as_json

CHANNELS = (
    keys.CANCELS, f"{keys.PREFIX}/0.celery.pidbox", f"{keys.PREFIX}/0.celeryev/task.x", "/0.celery.pidbox",
    keys.result("nobody"), keys.channel("nobody"),
)  # fmt: skip
#: A message that is larger than any of ours, once in so many.
LARGE_EVERY = 40


def draw(chance: random.Random, number: int) -> Input:
    queue, raw = chance.choice(QUEUES), _raw(chance, number)
    act = chance.choice((_pushed, _pushed, _pushed, _held, _published))
    place = chance.choice(CHANNELS) if act is _published else queue
    side = chance.random() < 0.5
    return Input(f"{act.__name__[1:]} at {place}: {odd.shown(raw)}", lambda world: act(world, place, raw, side))


def _raw(chance: random.Random, number: int) -> bytes:
    queue = chance.choice(QUEUES)
    job_id = f"nobody-{number}"
    message: dict[str, Any] = json.loads(envelope(job_id, queue.split(".")[-1], "tiny", queue))
    message["properties"]["delivery_tag"] = f"{job_id}#1"
    act = chance.randrange(6)
    if act == 0:
        return odd.some_bytes(chance, 400)
    if act == 1:
        return odd.spoiled_bytes(chance, json.dumps(message).encode())
    if act == 2:
        return as_json(odd.json_value(chance))
    if act == 3 and number % LARGE_EVERY == 0:
        message["headers"]["argsrepr"] = "x" * 3_000_000
        return json.dumps(message).encode()
    return as_json(odd.spoiled(chance, message))


def _pushed(world: World, queue: str, raw: bytes, left: bool) -> list[str]:
    world.messages.add(raw[: letters.KEPT])
    push = world.client.redis.lpush if left else world.client.redis.rpush
    push(keys.ready(queue), raw)
    return []


def _held(world: World, queue: str, raw: bytes, whole: bool) -> list[str]:
    """As if a dead worker had held it, in kombu's table or with something else in its place."""
    held = json.dumps([raw.decode(errors="replace"), "", queue]).encode() if whole else raw
    world.messages.add(held[: letters.KEPT])
    tag = f"fuzz-{len(world.messages)}"
    pipeline = world.client.redis.pipeline()
    pipeline.hset(keys.UNACKED, tag, held)
    pipeline.zadd(f"{keys.UNACKED}_index", {tag: 1.0})
    pipeline.execute()
    return []


def _published(world: World, channel: str, raw: bytes, _: bool) -> list[str]:
    world.client.redis.publish(channel, raw)
    return []

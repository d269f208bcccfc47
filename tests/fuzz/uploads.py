"""Inputs that are sent apart from their request: other bytes than were announced, none, or of another type."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from stoker.broker import keys, ledger
from stoker.broker.connection import translated
from stoker.client import Job
from stoker.client.submission import job_record
from stoker.contract import AdapterRequest, TrainRequest, bundle
from stoker.contract.requests import Request
from stoker.contract.uploads import Kind, Upload
from stoker.errors import BrokerUnavailable, JobFailed, JobLost
from tests.chaos.fleet import GENERATE
from tests.fuzz import odd
from tests.fuzz.input import Input
from tests.fuzz.world import REFUSED, World

LINES = b'{"text": "ab ab"}\n{"text": "ab"}'
NAMES = (
    "dataset:{id}", "dataset:other:0123456789abcdef:5:{sha}", "dataset:{id}:0123456789abcdef:999999999999:{sha}",
    "vectors:{id}",
    "worker:../../etc/passwd", "worker:x\x00y", "worker:", "adapter:{id}:0123456789abcdef:0:{sha}", "../job:{id}",
    "{id}",
)  # fmt: skip


def draw(chance: random.Random, number: int) -> Input:
    return chance.choices((_stored, _bundle, _named), (4, 4, 2))[0](chance, number)


def _stored(chance: random.Random, number: int) -> Input:
    """What lies in the broker is not what was sent."""
    kind: Kind = chance.choice(("dataset", "adapter"))
    later, sound = random.Random(chance.random()), chance.random() < 0.1
    act = chance.choice((_as_bytes, _as_bytes, _as_list, _as_nothing))
    job_id = f"upload-{number}"

    def give(world: World) -> list[str]:
        data = LINES if kind == "dataset" else _packed(world, {})
        upload = Upload.of(kind, job_id, data)
        stored = data if sound else odd.spoiled_bytes(later, data)
        return _submitted(world, job_id, str(upload), lambda key: act(world, key, stored))

    return Input(f"an upload of kind {kind} that is {'sound' if sound else act.__name__[1:]}", give)


def _bundle(chance: random.Random, number: int) -> Input:
    """An adapter's files in a bundle that is damaged, or holds something else; what was announced is there."""
    later, job_id = random.Random(chance.random()), f"bundle-{number}"
    files = {
        chance.choice(("../x", "adapter_config.json", "stoker.json", "", "a/b", "\x00", "x.py")): odd.some_bytes(
            chance, 60
        )
    }
    damaged = chance.random() < 0.6

    def give(world: World) -> list[str]:
        data = _packed(world, {} if damaged else files)
        data = odd.spoiled_bytes(later, data) if damaged else data
        upload = Upload.of("adapter", job_id, data)
        return _submitted(world, job_id, str(upload), lambda key: world.client.redis.set(key, data, ex=keys.UPLOAD_TTL))

    return Input("a damaged bundle" if damaged else f"a bundle with {odd.shown(files)}", give)


def _named(chance: random.Random, number: int) -> Input:
    """A request that names something else than its own input."""
    job_id = f"named-{number}"
    name = (
        chance.choice(NAMES).format(id=job_id, sha="0" * 64) if chance.random() < 0.7 else str(odd.TEXTS[number % 20])
    )
    # A key of the broker's is bytes: half a surrogate pair cannot be part of one.
    name = name[:200].encode(errors="replace").decode() or "x"

    def give(world: World) -> list[str]:
        return _submitted(world, job_id, name, lambda key: None)

    return Input(f"a request whose input is {odd.shown(name)}", give)


def _packed(world: World, more: dict[str, bytes]) -> bytes:
    files = {path.name: path.read_bytes() for path in world.adapter_files.iterdir() if path.name in bundle.FILES}
    return bundle.pack(files | more)


def _submitted(world: World, job_id: str, name: str, store: Callable[[str], Any]) -> list[str]:
    """The job whose request names `name`, and which owns that key if it may."""
    given: dict[str, Any] = {"model": GENERATE, "name": "uploaded"}
    request: Request
    if name.startswith("adapter"):
        request = AdapterRequest(upload=name, promote=False, **given)
    else:
        request = TrainRequest(dataset=name, steps=1, rank=2, max_length=16, promote=False, **given)
    store(keys.blob(name))
    try:
        return world.judged(lambda: _sent(world, request, job_id), (*REFUSED, JobLost, JobFailed, BrokerUnavailable))
    finally:
        if store is not None and not name.startswith("worker:"):
            world.client.redis.delete(keys.blob(name))


def _sent(world: World, request: Request, job_id: str) -> Job[Any]:
    with translated(world.client.settings):
        ledger.submit(world.client.redis, job_id, job_record(request, job_id))
    return world.client.job(job_id)


def _as_bytes(world: World, key: str, data: bytes) -> None:
    world.client.redis.set(key, data, ex=keys.UPLOAD_TTL)


def _as_list(world: World, key: str, data: bytes) -> None:
    world.client.redis.rpush(key, data)
    world.client.redis.expire(key, keys.UPLOAD_TTL)


def _as_nothing(world: World, key: str, data: bytes) -> None:
    world.client.redis.delete(key)

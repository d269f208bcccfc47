"""Calls of the client with options of the wrong type, size or name, and requests that no client would let pass."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from stoker.broker import ledger
from stoker.client.options import AdapterOptions, EmbedOptions, GenerateOptions, TrainOptions
from stoker.client.submission import job_record
from stoker.contract import build, encode
from stoker.contract.kinds import KINDS
from stoker.contract.requests import Request
from stoker.errors import ConfigError, JobLost
from tests.chaos.fleet import EMBED, GENERATE
from tests.fuzz import odd
from tests.fuzz.input import Input
from tests.fuzz.world import ADAPTER, REFUSED, World, as_json

ROWS = [{"text": "ab ab"}, {"prompt": "ab", "completion": " ab"}]
TALK = [{"role": "system", "content": "ab"}, {"role": "user", "content": "ab"}]
#: Sound calls: what is given to each, the name that it takes for an adapter's or a model's included.
SOUND: dict[str, dict[str, Any]] = {
    "generate": {
        "prompt": "ab", "model": GENERATE, "seed": 1, "max_tokens": 6, "n": 2, "temperature": 0.7, "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "stop": ["zz"],
        "logit_bias": {3: 1.0}, "stop_token_ids": [5], "ignore_eos": False, "top_logprobs": 2, "lookup": True,
        "priority": 5, "deadline": 20.0,
    },
    "embed": {
        "texts": ["ab", "ab ab"], "model": EMBED, "normalize": True, "truncation": "end", "dimensions": 8,
        "dtype": "int8",
        "prompt": "query: ", "priority": 4, "deadline": 20.0,
    },
    "train": {
        "dataset": ROWS, "model": GENERATE, "steps": 2, "rank": 2, "alpha": 4.0, "targets": ["q_proj"], "dropout": 0.1,
        "batch_size": 2, "accumulation": 1, "max_length": 16, "learning_rate": 1e-3, "schedule": "cosine",
        "warmup_steps": 1,
        "weight_decay": 0.1, "clip": 1.0, "label_smoothing": 0.1, "held_out": 0.0, "spike": 0.0, "checkpoint_every": 5,
        "promote": False, "seed": 3, "priority": 6, "deadline": 30.0,
    },
    "adapters": {"model": GENERATE, "promote": False, "priority": 3, "deadline": 30.0},
}  # fmt: skip
MORE = {
    "generate": GenerateOptions, "embed": EmbedOptions, "train": TrainOptions, "adapters": AdapterOptions,
}  # fmt: skip


def draw(chance: random.Random, number: int) -> Input:
    return chance.choices((_call, _request, _question), (6, 4, 1))[0](chance, number)


def _call(chance: random.Random, number: int) -> Input:
    kind = chance.choice(tuple(SOUND))
    given: dict[str, Any] = dict(SOUND[kind])
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice((*given, *MORE[kind].__annotations__, "job_id", "no_such_option"))
        given[name] = (
            odd.spoiled(chance, given[name], odd.value)
            if chance.random() < 0.4 and name in given
            else odd.value(chance)
        )
    if chance.random() < 0.2 and kind == "generate":
        given["prompt"] = odd.spoiled(chance, TALK, odd.value)
    return Input(f"{kind}({odd.shown(given)})", lambda world: world.judged(lambda: _sent(world, kind, given, number)))


def _sent(world: World, kind: str, given: dict[str, Any], number: int) -> Any:
    client, name = world.client, f"f{number}"
    if kind == "generate":
        return client.generate(**given)
    if kind == "embed":
        return client.embed(**given)
    if kind == "train":
        return client.train(name, **given)
    return client.adapters.load(name, world.adapter_files, **given)


def _sound(kind: str) -> Request:
    fields = {**SOUND[kind], "name": "raw", "dataset": "worker:none", "upload": "none"}
    if kind == "generate":
        fields["messages"], fields["prompt"] = TALK, None
    return build(
        KINDS[kind].request, {name: fields[name] for name in KINDS[kind].request.model_fields if name in fields}
    )


def _request(chance: random.Random, number: int) -> Input:
    """A request that is sent past the client's own checks: only the worker can refuse it."""
    kind, job_id = chance.choice(("generate", "generate", "embed", "train", "adapters")), f"raw-{number}"
    sound = encode(_sound(kind))
    whole = chance.random() < 0.9
    wrong = as_json(odd.spoiled(chance, sound)) if whole else odd.spoiled_bytes(chance, json.dumps(sound).encode())

    def act(world: World) -> list[str]:
        record: dict[str, Any] = {**job_record(_sound(kind), job_id), "request": wrong}
        record.pop("blob", None)
        ledger.submit(world.client.redis, job_id, record)
        return world.judged(lambda: world.client.job(job_id), (*REFUSED, JobLost))

    return Input(f"a request of kind {kind}: {odd.shown(wrong)}", act)


def _question(chance: random.Random, number: int) -> Input:
    """What asks for something by a name."""
    given = odd.value(chance)
    questions: dict[str, Callable[[World], Any]] = {
        "job": lambda world: world.client.job(given),
        "retry": lambda world: world.client.retry(given),
        "adapters.get": lambda world: world.client.adapters.get(given, GENERATE),
        "adapters.list": lambda world: world.client.adapters.list(given),
        "adapters.promote": lambda world: world.client.adapters.promote(given, GENERATE),
        "adapters.rollback": lambda world: world.client.adapters.rollback(given, GENERATE),
        "adapters.unload": lambda world: world.client.adapters.unload(given, GENERATE),
        "adapters.load": lambda world: world.client.adapters.load(f"f{number}", given, model=GENERATE),
        "a version": lambda world: world.client.generate(
            "ab", model=GENERATE, max_tokens=2, adapter=f"{ADAPTER}@{odd.shown(given, 50)}"
        ),
    }
    name = chance.choice(tuple(questions))
    allowed = (*REFUSED, JobLost, ConfigError)
    return Input(f"{name}({odd.shown(given)})", lambda world: world.judged(lambda: questions[name](world), allowed))

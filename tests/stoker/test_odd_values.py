"""Values of any type at any parameter of any call: nothing, or an error of the tree that says what was given."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.numpy
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from stoker import Client
from stoker.broker import connection, keys
from stoker.broker.outcome import read_vectors, vectors_reply
from stoker.client._sync.jobs import GenerateJob
from stoker.client.following import Follower
from stoker.client.options import AdapterOptions, EmbedOptions, GenerateManyOptions, GenerateOptions, TrainOptions
from stoker.contract import EmbedReply, GenerateRequest, StreamToken, Usage, build
from stoker.contract.freeform import MAX_DEPTH
from stoker.contract.requests import MAX_ENTRIES
from stoker.errors import InvalidRequest, JobLost, StokerError
from stoker.settings import Settings

LONGEST_MESSAGE = 1500


class Evil:
    """Cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    __str__ = __repr__


class EvilText(str):
    """Has no length."""

    __slots__ = ()

    def __len__(self) -> int:
        raise RuntimeError("len")


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


def in_itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


NUMBERS: tuple[Any, ...] = (
    0,
    5,
    -1,
    True,
    1.5,
    math.nan,
    math.inf,
    10**30,
    10**5000,
    -(10**400),
    2**63,
    1j,
    decimal.Decimal("nan"),
)
TEXTS: tuple[Any, ...] = ("", "x", "\x00", "a\x00b", "\ud800", "x" * 2_000_000, "../..", "é" * 70, EvilText("x"))
BYTES: tuple[Any, ...] = (b"", b"\xff", bytearray(b"a"), memoryview(b"a"))
LISTS: tuple[Any, ...] = (
    (),
    [[]],
    [None],
    [5],
    [b""],
    ["\ud800"],
    [math.nan],
    [10**400],
    [Evil()],
    [{1: 2}],
    in_itself(),
)
SETS: tuple[Any, ...] = (set(), {1, 2}, {"a"}, frozenset())
DICTS: tuple[Any, ...] = (
    {},
    {"a": b""},
    {1: 2},
    {None: 1},
    {"a": math.nan},
    {"a": 10**5000},
    {"a": {1}},
    {"\ud800": 1},
    {"a": Evil()},
)
MESSAGES: tuple[Any, ...] = tuple([{"role": "user", "content": content}] for content in (b"", 5, "\ud800", ["x"]))
CALLS: tuple[Any, ...] = ([{"a": b""}], [{"role": "user", "content": "hi", "tool_calls": [{"a": {1}}]}])
DEEP: tuple[Any, ...] = (nested(90_000, lambda inner: [inner]), nested(2000, lambda inner: {"a": inner}))
OBJECTS: tuple[Any, ...] = (
    object(),
    object,
    len,
    Exception("x"),
    Evil(),
    NotImplemented,
    ...,
    Path("/nowhere"),
    uuid.UUID(int=1),
)
OTHERS: tuple[Any, ...] = (
    datetime.datetime(2020, 1, 1),
    range(3),
    np.float32(1),
    np.array([1, 2]),
    np.array(["a"]),
    OrderedDict(a=1),
)
ODD: tuple[Any, ...] = (
    None,
    *NUMBERS,
    *TEXTS,
    *BYTES,
    *LISTS,
    *SETS,
    *DICTS,
    *MESSAGES,
    *CALLS,
    *DEEP,
    *OBJECTS,
    *OTHERS,
)

#: Each call, with something right at every parameter that is needed, and the parameters that it has.
PARAMETERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "embed": ({"texts": ["a"], "model": "m"}, ("texts", "model", "job_id", *EmbedOptions.__annotations__)),
    "embed_many": ({"texts": ["a"]}, ("texts", "model", "batch", "in_flight", "attempts", "dtype")),
    "embed_chunks": ({"texts": ["a"]}, ("batch",)),
    "generate": (
        {"prompt": "hi", "model": "m"},
        ("prompt", "model", "seed", "job_id", *GenerateOptions.__annotations__),
    ),
    "generate_many": (
        {"requests": ["a"], "model": "m"},
        ("requests", "model", "seed", "in_flight", "attempts", *GenerateManyOptions.__annotations__),
    ),
    "train": (
        {"name": "n", "dataset": [{"text": "a"}], "model": "m"},
        ("name", "dataset", "model", "job_id", *TrainOptions.__annotations__),
    ),
    "job": ({"job_id": "x"}, ("job_id",)),
    "retry": ({"job_id": "x"}, ("job_id",)),
    "adapters.load": (
        {"name": "n", "folder": "/nowhere", "model": "m"},
        ("name", "folder", "model", "job_id", *AdapterOptions.__annotations__),
    ),
    "adapters.list": ({}, ("model",)),
    "adapters.get": ({"name": "n", "model": "m"}, ("name", "model")),
    "adapters.promote": ({"adapter": "n@1", "model": "m"}, ("adapter", "model")),
    "adapters.rollback": ({"name": "n", "model": "m"}, ("name",)),
    "adapters.unload": ({"adapter": "n@1", "model": "m"}, ("adapter",)),
}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """Of a broker that is away at once, so that all is reached that comes before it; models need no look there."""
    monkeypatch.setattr(connection, "retries", lambda: (NoBackoff(), 0, (RedisConnectionError,)))
    look = Client.choose_model

    def choose(self: Client, model: str | None, kind: str) -> str:
        return model if isinstance(model, str) else look(self, model, kind)

    monkeypatch.setattr(Client, "choose_model", choose)
    with Client(settings=Settings(url="redis://127.0.0.1:1/0", patience=0)) as made:
        yield made


def complaint(call: Callable[..., Any], **parameters: Any) -> str | None:
    """What is wrong with the way in which a call ends."""
    try:
        ended = call(**parameters)
        if isinstance(ended, Iterator):
            list(ended)
    except StokerError as error:
        said = str(error)
        said.encode()
        return None if len(said) <= LONGEST_MESSAGE else f"a message of {len(said)} characters"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


@pytest.mark.parametrize("call", PARAMETERS)
def test_any_value_at_any_parameter_is_taken_or_refused_by_an_error_of_the_tree(client: Client, call: str) -> None:
    right, parameters = PARAMETERS[call]
    ask: Any = client
    for name in call.split("."):
        ask = getattr(ask, name)
    wrong = {}
    for parameter in parameters:
        for number, value in enumerate(ODD):
            if said := complaint(ask, **{**right, parameter: value}):
                wrong[f"{parameter}, {type(value).__name__} number {number}"] = said
    assert not wrong


@pytest.mark.parametrize("name", ["url", "key", "queue_wait"])
def test_any_value_at_any_setting_of_a_client_is_taken_or_refused(name: str) -> None:
    wrong = {}
    for number, value in enumerate(ODD):
        if said := complaint(Client, **{name: value}):
            wrong[f"{type(value).__name__} number {number}"] = said
    assert not wrong


def test_a_time_limit_that_is_no_number_is_refused() -> None:
    job = GenerateJob(cast(Any, None), "x")
    for value in (*TEXTS, *BYTES, *LISTS, *SETS, *DICTS, *DEEP, *OBJECTS, math.inf, -math.inf, math.nan, 10**400):
        with pytest.raises(InvalidRequest, match=r"timeout: .* given; expected seconds"):
            Follower[StreamToken](Settings(), job.id, timeout=cast(Any, value))


# Free-form JSON


def ask_with(**fields: Any) -> GenerateRequest:
    return build(GenerateRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize("field", ["json_schema", "template", "tools"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (nested(MAX_DEPTH, lambda inner: {"a": inner}), "deep"),
        (nested(300, lambda inner: [inner]), "deep"),
        (in_itself(), "deep"),
        (nested(60, lambda inner: [inner, inner]), "more than 250000 values"),
        (2**64, "64 bits"),
        (-(2**63) - 1, "64 bits"),
        (10**5000, "64 bits"),
        (math.nan, "NaN"),
        ("\ud800", "surrogates"),
        ({"\ud800": 1}, "surrogates"),
        ({1: 2}, "names are texts"),
        (b"", "b''"),
        ({1, 2}, "no value"),
        (np.float32(1), "no value"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isascii() else type(value).__name__,
)
def test_free_form_json_is_bounded_in_depth_and_numbers_and_says_what_is_wrong(
    field: str, value: Any, said: str
) -> None:
    inside = {"a": value}
    with pytest.raises(InvalidRequest, match=rf"{field}: .*{said}"):
        ask_with(**{field: [inside] if field == "tools" else inside})


def test_what_is_allowed_travels_as_it_is() -> None:
    schema = {"a": [None, True, 1.5, -(2**63), 2**64 - 1, "é\x00", nested(MAX_DEPTH - 4, lambda inner: [inner])]}
    request = ask_with(json_schema=schema)
    assert json.loads(json.dumps(request.model_dump(mode="json")))["json_schema"] == schema


@pytest.mark.parametrize("fields", [{"n": 16, "top_logprobs": 20, "max_tokens": 32_768}, {"n": 4, "top_logprobs": 20}])
def test_tokens_and_alternatives_of_one_job_are_bounded(fields: dict[str, int]) -> None:
    fits = MAX_ENTRIES // (fields["n"] * (1 + fields["top_logprobs"]))
    assert ask_with(**{**fields, "max_tokens": fits}).max_tokens == fits
    with pytest.raises(InvalidRequest, match=rf"\d+ tokens and alternatives given; at most {MAX_ENTRIES}"):
        ask_with(**{**fields, "max_tokens": fits + 1})


# What others write into results and streams


def reply(job_id: str = "job", **fields: Any) -> EmbedReply:
    return EmbedReply(**{"blob": keys.vectors(job_id), "rows": 1, "dim": 2, "usage": Usage(), **fields})


def test_a_result_that_names_the_vectors_of_another_job_is_none() -> None:
    assert vectors_reply("job", reply().model_dump()) == reply()
    for other in (keys.vectors("other"), "dataset:job", "", "\x00"):
        with pytest.raises(JobLost, match="result cannot be read"):
            vectors_reply("job", reply(blob=other).model_dump())


FLOATS = safetensors.numpy.save({"vectors": np.zeros((1, 2), np.float32)})


def codes(shape: tuple[int, ...] = (1, 2), kind: Any = np.int8, scales: Any = 1, of: Any = np.float32) -> bytes:
    return safetensors.numpy.save({"vectors": np.zeros(shape, kind), "scales": np.zeros(scales, of)})


CODES = codes()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"garbage", b"\xff" * 8, FLOATS[:-1], FLOATS + b"x", CODES, json.dumps({}).encode()),
        safetensors.numpy.save({"other": np.zeros((1, 2), np.float32)}),
        safetensors.numpy.save({"scales": np.zeros(1, np.float32)}),
        safetensors.numpy.save({"vectors": np.zeros((2, 2), np.float32)}),
        safetensors.numpy.save({"vectors": np.zeros((1, 2), np.float64)}),
    ],
)
def test_bytes_that_are_not_the_vectors_of_the_result_are_one_clear_error(data: bytes) -> None:
    assert np.array_equal(cast(Any, read_vectors(reply(), FLOATS)), np.zeros((1, 2)))
    with pytest.raises(JobLost, match="vectors cannot be read"):
        read_vectors(reply(), data)


@pytest.mark.parametrize(
    "data",
    [FLOATS, codes((2, 2)), codes((1, 3)), codes(kind=np.uint8), codes(scales=2), codes(scales=(1, 1)),
     codes(of=np.float16)],
    ids=["floats", "rows", "numbers", "codes", "scales", "shape", "type"],
)  # fmt: skip
def test_codes_and_scales_that_are_not_those_of_the_result_are_the_same_error(data: bytes) -> None:
    asked = reply(dtype="int8")
    assert len(read_vectors(asked, CODES)) == 1
    with pytest.raises(JobLost, match="vectors cannot be read"):
        read_vectors(asked, data)


@pytest.mark.parametrize("index", [1, -5, 10**30])
def test_an_entry_under_the_id_of_another_is_none(index: int) -> None:
    token = StreamToken(index=index, token_id=1, text="x", logit=0.0, logprob=0.0, probability=1.0)
    follower = Follower(Settings(), "job", StreamToken)
    with pytest.raises(JobLost, match="an entry that Stoker did not write"):
        follower.replay([(b"1-0", {b"entry": token.model_dump_json().encode()})])

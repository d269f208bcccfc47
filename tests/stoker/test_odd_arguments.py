"""Arguments of the wrong type, and those that fail when they are looked at: one error of the tree each, at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker.broker import keys, registry
from stoker.broker.envelope import UnreadableMessage, envelope
from stoker.broker.envelope import read as read_message
from stoker.broker.ledger.replies import Claim
from stoker.client.model_choice import Choices, choose_model
from stoker.client.requests import (
    checked_job_id,
    embed_request,
    generate_request,
    known_by,
    read_dataset,
    train_request,
)
from stoker.contract import GenerateRequest, bundle, encode
from stoker.contract.codec import read
from stoker.contract.shown import brief
from stoker.errors import DatasetError, InvalidRequest, UnknownModel


class Unreadable:
    def __repr__(self) -> str:
        raise RuntimeError("this cannot be shown")


def deep(levels: int = 100_000) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


ODD: list[Any] = [
    5,
    1.5,
    b"x",
    [],
    {},
    {"a": b""},
    {1, 2},
    object(),
    Unreadable(),
    deep(),
    (item for item in "ab"),
    int,
]


@pytest.mark.parametrize("given", ODD, ids=lambda given: type(given).__name__)
def test_what_is_no_name_is_refused_where_a_name_is_expected(given: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^model: .* expected a name"):
        Choices().get(given, "generate")
    for verb in (True, False):
        with pytest.raises(InvalidRequest, match=r"^adapter: .* expected a name"):
            registry.wanted(given, version=verb)
    with pytest.raises(InvalidRequest, match=r"^job_id: .* allowed: 1 to 128 letters"):
        checked_job_id(given)
    with pytest.raises(InvalidRequest, match=r"^job_id: .* allowed: 1 to 128 letters"):
        known_by(given)
    with pytest.raises(InvalidRequest, match=r"^folder: .* expected the path"):
        bundle.folder_of(given)


@pytest.mark.parametrize("given", [Unreadable(), deep(), object()], ids=lambda given: type(given).__name__)
def test_an_option_that_cannot_be_shown_is_refused_with_its_type(given: Any) -> None:
    for name in ("max_tokens", "stop", "logit_bias", "json_schema", "regex", "tools"):
        with pytest.raises(InvalidRequest, match=name) as caught:
            generate_request("m", "ab", 1, {name: given})
        assert len(str(caught.value)) < 1000
    with pytest.raises(InvalidRequest, match=r"truncate: .* true and false"):
        embed_request("m", ["ab"], {"truncate": given})
    with pytest.raises(InvalidRequest, match="targets"):
        train_request("m", "n", [{"text": "ab"}], "job", {"targets": given})


def test_a_value_is_shown_in_a_few_letters() -> None:
    assert brief("ab") == "'ab'"
    assert brief("x" * 100, 10) == "'xxxxxxxx…"
    assert brief(Unreadable()) == "an object of type Unreadable that cannot be shown"
    assert brief(deep()) == "an object of type list that cannot be shown"


@pytest.mark.parametrize("path", ["a\x00b", "\ud800"])
def test_a_text_that_is_no_path_is_an_error_that_names_it(path: str) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        read_dataset(path)
    with pytest.raises(InvalidRequest, match=r"cannot be read|no adapter in it"):
        bundle.read_folder(Path(path))
    with pytest.raises(UnknownModel, match="given; no model"):
        choose_model(path, "generate", {}, [])


def test_an_unknown_models_name_is_cut_in_the_error() -> None:
    with pytest.raises(UnknownModel) as caught:
        choose_model("x" * 5000, "generate", {}, [])
    assert len(str(caught.value)) < 1000


def test_a_request_in_bytes_that_are_no_text_is_refused_as_no_json() -> None:
    sound = b'{"contract": 1, "model": "m", "prompt": "ab"}'
    assert read(GenerateRequest, Claim.parse([b"run", b"0", b"0", sound]).request).prompt == "ab"
    for wrong in (sound.replace(b"ab", b"\xff"), b"\xff" + sound, sound[:-1] + b"\xe9}"):
        with pytest.raises(InvalidRequest, match="expected JSON"):
            read(GenerateRequest, Claim.parse([b"run", b"0", b"0", wrong]).request)


def test_a_message_that_is_nested_as_deeply_as_json_may_be_is_unreadable() -> None:
    queue = keys.queue("m", "generate")
    message = json.loads(envelope("job", "generate", "m", queue))
    message["properties"]["delivery_tag"] = "job#1"
    for levels in range(10, 1100, 10):
        raw = json.dumps(message).replace('"eta": null', f'"eta": {"[" * levels}{"]" * levels}').encode()
        with pytest.raises(UnreadableMessage):
            read_message(raw, queue)


def nested(levels: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(levels - 1):
        inner = {"a": [inner]} if len(inner) % 2 else {"a": inner}
    return inner


@pytest.mark.parametrize("levels", [101, 150, 255, 400, 900, 5000])
def test_json_that_is_nested_too_deeply_is_refused_before_it_is_written(levels: int) -> None:
    talk = [{"role": "user", "content": "ab"}]
    for options in (
        {"prompt": "ab", "json_schema": nested(levels)},
        {"messages": talk, "tools": [nested(levels)]},
        {"messages": talk, "template": nested(levels)},
        {"messages": [{"role": "assistant", "tool_calls": [nested(levels)]}]},
    ):
        with pytest.raises(InvalidRequest, match=r"more than 100 deep|that cannot be shown"):
            generate_request("m", None, 1, options)
    sound = generate_request("m", "ab", 1, {"json_schema": nested(40)})
    assert json.loads(json.dumps(encode(sound)))["json_schema"] == nested(40)

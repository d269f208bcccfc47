"""The contract: frozen messages with a limit on every size, and one clear error for each wrong input."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stoker.contract import (
    CONTRACT,
    LORA_TARGETS,
    ChatMessage,
    EmbedRequest,
    GenerateRequest,
    StreamToken,
    TrainReport,
    TrainRequest,
    Usage,
    build,
    decode,
    encode,
    requests,
)
from stoker.contract.base import Message
from stoker.contract.codec import read
from stoker.contract.requests import MAX_ENTRIES
from stoker.contract.vectors import quantize
from stoker.errors import InvalidRequest

VALID: dict[type[Message], dict[str, Any]] = {
    EmbedRequest: {"model": "m", "texts": ("a text",)},
    GenerateRequest: {"model": "m", "prompt": "a prompt"},
    TrainRequest: {"model": "m", "name": "n", "dataset": "dataset:1"},
}

NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=50).filter(str.strip)
SEEDS = st.integers(0, 2**63 - 1)


def plain(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that are 0, or not tiny."""
    return st.floats(low, high).filter(lambda value: value == 0 or abs(value) >= 1e-6)


MESSAGES = st.builds(ChatMessage, role=st.just("user"), content=TEXTS)
REQUESTS = st.one_of(
    st.builds(
        EmbedRequest,
        model=NAMES,
        texts=st.lists(TEXTS, min_size=1, max_size=5).map(tuple),
        normalize=st.none() | st.booleans(),
        truncation=st.sampled_from(["error", "end"]),
        dimensions=st.none() | st.integers(1, 1000),
        dtype=st.sampled_from(["float32", "float16", "int8"]),
    ),
    st.builds(
        GenerateRequest,
        model=NAMES,
        prompt=TEXTS,
        adapter=st.none() | NAMES,
        # With the most completions and alternatives there are.
        max_tokens=st.integers(1, MAX_ENTRIES // (16 * 21)),
        temperature=plain(0, 10),
        top_k=st.integers(0, 1_000_000),
        top_p=st.floats(1e-9, 1),
        min_p=plain(0, 1),
        repetition_penalty=st.floats(0.01, 10),
        presence_penalty=plain(-100, 100),
        frequency_penalty=plain(-100, 100),
        logit_bias=st.none() | st.dictionaries(st.integers(0, 2**31 - 1), plain(-100, 100), max_size=4),
        stop=st.lists(TEXTS, max_size=4).map(tuple),
        stop_token_ids=st.lists(st.integers(0, 100), max_size=4).map(tuple),
        n=st.integers(1, 16),
        top_logprobs=st.integers(0, 20),
        lookup=st.none() | st.booleans(),
        seed=SEEDS,
    ),
    st.builds(
        GenerateRequest,
        model=NAMES,
        messages=st.lists(MESSAGES, min_size=1, max_size=3).map(tuple),
        tools=st.none() | st.just(({"type": "function", "function": {"name": "f"}},)),
        json_schema=st.none() | st.just({"type": "object"}),
    ),
    st.builds(
        TrainRequest,
        model=NAMES,
        name=NAMES,
        dataset=st.text("abc:1", min_size=1, max_size=128),
        steps=st.integers(1, 1_000_000),
        rank=st.integers(1, 256),
        alpha=st.floats(0, 4096, exclude_min=True),
        targets=st.lists(st.sampled_from(LORA_TARGETS), min_size=1, max_size=7).map(tuple),
        learning_rate=st.floats(0, 1, exclude_min=True),
        seed=SEEDS,
    ),
)


def test_requests_and_results_without_drafts_are_what_earlier_releases_know() -> None:
    plain, asked = (GenerateRequest(model="m", prompt="x", lookup=lookup) for lookup in (None, False))
    assert "lookup" not in encode(plain)
    assert encode(asked)["lookup"] is False
    counted = Usage(drafted_tokens=0, accepted_tokens=0).model_dump()
    assert counted.keys() - Usage().model_dump().keys() == {"drafted_tokens", "accepted_tokens"}
    assert (counted["drafted_tokens"], counted["accepted_tokens"]) == (0, 0)


@given(REQUESTS)
def test_what_travels_as_json_arrives_as_it_was(request: Message) -> None:
    payload = json.loads(json.dumps(encode(request)))
    assert payload["contract"] == CONTRACT
    assert decode(type(request), payload) == request


@given(
    st.builds(
        StreamToken,
        index=st.integers(0),
        token_id=st.integers(0),
        text=st.text(st.characters(exclude_categories=["Cs"])),
        logit=st.floats(allow_nan=False, allow_infinity=False),
        logprob=st.floats(allow_nan=False, allow_infinity=False),
        probability=st.floats(0, 1),
        finish_reason=st.sampled_from([None, "stop", "length", "stop_string"]),
    )
)
def test_a_token_arrives_as_it_was(token: StreamToken) -> None:
    assert StreamToken.model_validate_json(token.model_dump_json()) == token
    assert token.is_last == (token.finish_reason is not None)


def test_the_last_report_of_a_run_says_so() -> None:
    report = TrainReport(
        index=0, step=1, steps=2, loss=1.0, learning_rate=0.1, gradient_norm=1.0, tokens=1, tokens_per_second=1.0
    )
    assert not report.is_last
    assert report.model_copy(update={"index": 1, "step": 2, "last": True}).is_last


@pytest.mark.parametrize("message", VALID)
def test_an_unknown_field_is_refused_with_those_there_are(message: type[Message]) -> None:
    with pytest.raises(InvalidRequest) as error:
        build(message, {**VALID[message], "temprature": 1})
    assert str(error.value) == f"temprature: no such field; allowed: {', '.join(message.model_fields)}."


@pytest.mark.parametrize("message", VALID)
def test_a_missing_field_is_named(message: type[Message]) -> None:
    for name in VALID[message]:
        said = "^request: no prompt given" if name == "prompt" else f"^{name}: missing"
        with pytest.raises(InvalidRequest, match=said):
            build(message, {key: value for key, value in VALID[message].items() if key != name})


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prompt": "p", "prompt_ids": (1,)}, "prompt and prompt_ids given; exactly one"),
        ({"prompt": "p", "tools": ({},)}, "tools given without messages"),
        ({"prompt": "p", "json_schema": {}, "regex": "a"}, "json_schema and regex given"),
        ({"prompt": "p", "regex": "a", "ignore_eos": True}, "ignore_eos given with"),
        ({"prompt": "p", "json_schema": {"a": float("nan")}}, "json_schema: not JSON"),
        ({"messages": ({"role": "user", "content": "x" * 999_999},) * 2}, "characters of JSON; at most 1000000"),
        ({"messages": ({"role": "user", "text": "x"},)}, "messages.0.text: no such field"),
        ({"prompt_ids": ()}, "prompt_ids: "),
    ],
)
def test_a_generate_request_must_make_sense_as_a_whole(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        build(GenerateRequest, {"model": "m", **fields})


def test_one_stop_string_may_be_given_alone() -> None:
    assert build(GenerateRequest, {"model": "m", "prompt": "p", "stop": "END"}).stop == ("END",)


@pytest.mark.parametrize("message", VALID)
def test_a_message_cannot_be_changed(message: type[Message]) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build(message, VALID[message]).model = "other"  # type: ignore[attr-defined]


LIMITS = [
    (GenerateRequest, "max_tokens", 1, 32_768, 1),
    (GenerateRequest, "temperature", 0.0, 10.0, 0.5),
    (GenerateRequest, "top_p", 1e-9, 1.0, 0.5),
    (GenerateRequest, "min_p", 0.0, 1.0, 0.5),
    (GenerateRequest, "repetition_penalty", 0.01, 10.0, 0.5),
    (GenerateRequest, "presence_penalty", -100.0, 100.0, 0.5),
    (GenerateRequest, "frequency_penalty", -100.0, 100.0, 0.5),
    (GenerateRequest, "top_k", 0, 1_000_000, 1),
    (GenerateRequest, "seed", 0, 2**63 - 1, 1),
    (TrainRequest, "steps", 1, 1_000_000, 1),
    (TrainRequest, "rank", 1, 256, 1),
    (TrainRequest, "batch_size", 1, 256, 1),
    (TrainRequest, "max_length", 2, 32_768, 1),
    (TrainRequest, "warmup_steps", 0, 1_000_000, 1),
    (TrainRequest, "weight_decay", 0.0, 1.0, 0.5),
    (TrainRequest, "seed", 0, 2**63 - 1, 1),
]


@pytest.mark.parametrize(("message", "name", "low", "high", "step"), LIMITS)
def test_a_number_is_accepted_at_its_limits_and_refused_beyond(
    message: type[Message], name: str, low: float, high: float, step: float
) -> None:
    for value in (low, high):
        assert getattr(build(message, {**VALID[message], name: value}), name) == value
    for value in (low - step, high + step):
        with pytest.raises(
            InvalidRequest, match=rf"^{name}: {value} given; expected (at (least|most)|more than|less than) "
        ):
            build(message, {**VALID[message], name: value})


@pytest.mark.parametrize(
    ("message", "name"),
    [(TrainRequest, "learning_rate"), (TrainRequest, "alpha"), (TrainRequest, "clip")],
)
def test_a_number_that_must_be_above_zero_is_refused_at_zero(message: type[Message], name: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: 0 given; expected more than 0"):
        build(message, {**VALID[message], name: 0})


@pytest.mark.parametrize("name", ["temperature", "min_p", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [5e-324, 1e-40, 9.9e-7])
def test_a_number_that_float32_cannot_be_divided_by_is_refused(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"^{name}: {value!r} given; 0 \(off\) or at least 1e-06"):
        build(GenerateRequest, {**VALID[GenerateRequest], name: value})
    for allowed in (0.0, 1e-6):
        assert getattr(build(GenerateRequest, {**VALID[GenerateRequest], name: allowed}), name) == allowed


def test_a_bias_and_a_repetition_penalty_are_refused_when_they_are_tiny() -> None:
    for name, value in {"repetition_penalty": 1e-40, "top_p": 1e-40, "logit_bias": {3: -1e-40}}.items():
        with pytest.raises(InvalidRequest, match=rf"^{name}.*: -?1e-40 given; "):
            build(GenerateRequest, {**VALID[GenerateRequest], name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "warm", None, [1]])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^temperature: "):
        build(GenerateRequest, {**VALID[GenerateRequest], "temperature": value})


@pytest.mark.parametrize("name", ["", "Model", "a b", "../etc", "/x", "a/b", ".hidden", "-x", "é", "a" * 65, "a\n", 3])
def test_a_name_is_never_a_path(name: object) -> None:
    for field in ("model", "adapter"):
        with pytest.raises(InvalidRequest, match=f"^{field}: "):
            build(GenerateRequest, {**VALID[GenerateRequest], field: name})


def test_the_texts_of_one_job_are_bounded_in_number_and_size() -> None:
    def refused(texts: tuple[str, ...], why: str) -> None:
        with pytest.raises(InvalidRequest, match=why):
            build(EmbedRequest, {"model": "m", "texts": texts})

    assert len(build(EmbedRequest, {"model": "m", "texts": ("x",) * requests.MAX_TEXTS}).texts) == 4096
    refused((), "texts: .* at least 1 item")
    refused(("x",) * (requests.MAX_TEXTS + 1), "texts: .* at most 4096 items")
    refused(("x" * (requests.MAX_TEXT_CHARS + 1),), r"texts\.0: .* at most 1000000 characters")
    refused(("x" * 900_000,) * 9, "8100000 characters in one job; at most 8000000. Send several jobs")


def test_what_is_wrong_within_the_only_item_of_a_list_is_said_alone() -> None:
    with pytest.raises(InvalidRequest, match=r"^messages\.0\.content: 5 given; expected a text\.$"):
        build(GenerateRequest, {"model": "m", "messages": [{"role": "user", "content": 5}]})


@pytest.mark.parametrize("text", ["", " \t\n", "\u3000"])
def test_a_text_of_nothing_is_refused_by_its_place(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^texts\.1: an empty text given"):
        build(EmbedRequest, {"model": "m", "texts": ("fine", text)})


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: "):
        build(GenerateRequest, {"model": "m", "prompt": "half \ud800"})


def test_a_target_that_is_no_name_of_a_layer_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"targets\.1: 'q proj' given"):
        build(TrainRequest, {**VALID[TrainRequest], "targets": ("q_proj", "q proj")})


def test_a_long_value_is_shown_in_part_only() -> None:
    with pytest.raises(InvalidRequest) as error:
        build(GenerateRequest, {**VALID[GenerateRequest], "adapter": "X" * 10_000})
    assert len(str(error.value)) < 300


def test_another_version_of_the_contract_is_refused_with_both_named() -> None:
    payload = encode(build(GenerateRequest, VALID[GenerateRequest]))
    with pytest.raises(InvalidRequest, match=f"version 7 given; this side speaks version {CONTRACT}"):
        decode(GenerateRequest, {**payload, "contract": 7})
    del payload["contract"]
    with pytest.raises(InvalidRequest, match="version None given"):
        decode(GenerateRequest, payload)


@pytest.mark.parametrize("payload", [None, 3, "text", ["contract", 1]])
def test_what_is_no_object_is_refused(payload: object) -> None:
    with pytest.raises(InvalidRequest, match=r"GenerateRequest: a .* given; expected a JSON object"):
        decode(GenerateRequest, payload)


@pytest.mark.parametrize("text", ["", "{", "nonsense", "[" * 100_000, '{"a":' * 100_000, "1" * 5000])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"GenerateRequest: .* given; expected JSON \("):
        read(GenerateRequest, text)


SCALARS = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)


@given(st.sampled_from(list(VALID)), st.dictionaries(st.text(max_size=8), JSON, max_size=4), st.data())
def test_no_payload_raises_more_than_a_clear_refusal(
    message: type[Message], extra: dict[str, Any], data: st.DataObject
) -> None:
    wrong = {name: data.draw(JSON) for name in data.draw(st.sets(st.sampled_from(list(message.model_fields))))}
    with suppress(InvalidRequest):
        assert isinstance(decode(message, {"contract": CONTRACT, **VALID[message], **extra, **wrong}), message)


def test_numbers_of_a_message_are_finite() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Usage(run_seconds=float("nan"))


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ("priority", 9, 10),
        ("priority", 0, -1),
        ("seed", 2**63 - 1, 2**63),
    ],
)
def test_a_bound_of_a_number_is_its_last_good_value(fields: str, good: int, bad: int) -> None:
    assert getattr(build(GenerateRequest, {"model": "m", "prompt": "x", fields: good}), fields) == good
    with pytest.raises(InvalidRequest, match=fields):
        build(GenerateRequest, {"model": "m", "prompt": "x", fields: bad})


def test_the_bounds_of_sizes_are_their_last_good_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_REQUEST_CHARS", 10)
    assert build(EmbedRequest, {"model": "m", "texts": ("12345", "67890")}).texts == ("12345", "67890")
    with pytest.raises(InvalidRequest, match="11 characters in one job; at most 10"):
        build(EmbedRequest, {"model": "m", "texts": ("12345", "678901")})
    monkeypatch.setattr(requests, "MAX_TEXT_CHARS", len('{"a": 1}'))
    assert build(GenerateRequest, {"model": "m", "prompt": "x", "json_schema": {"a": 1}}).json_schema == {"a": 1}
    with pytest.raises(InvalidRequest, match="json_schema: 9 characters of JSON; at most 8"):
        build(GenerateRequest, {"model": "m", "prompt": "x", "json_schema": {"a": 12}})


def test_stopping_early_needs_evaluations() -> None:
    fields = {"model": "m", "name": "x", "dataset": "d", "held_out": 0.5, "stop_after": 1}
    with pytest.raises(InvalidRequest, match="stop_after needs eval_every"):
        build(TrainRequest, fields)
    assert build(TrainRequest, fields | {"eval_every": 1}).stop_after == 1
    with pytest.raises(InvalidRequest, match="need held_out above 0"):
        build(TrainRequest, {"model": "m", "name": "x", "dataset": "d", "eval_every": 1})


def test_the_largest_number_of_a_vector_becomes_127_and_others_the_nearest_code() -> None:
    vectors = np.array([[2.54, -2.54, 0.0301, -0.0299], [0.0, 0.0, 0.0, 0.0]], dtype=np.float32)
    small = quantize(vectors)
    assert small.codes.tolist() == [[127, -127, 2, -1], [0, 0, 0, 0]]
    assert np.abs(small.to_float32() - vectors).max() <= small.scales.max() / 2 + 1e-6
    with np.errstate(all="raise"):
        assert quantize(np.zeros((1, 3), dtype=np.float32)).codes.tolist() == [[0, 0, 0]]


def test_a_list_whose_items_are_wrong_is_not_called_too_short_as_well() -> None:
    with pytest.raises(InvalidRequest, match=r"^texts\.0: 7 given; [^;]*$"):
        build(EmbedRequest, {"model": "m", "texts": (7,)})

"""The last value that is allowed and the first that is not; and answers that are not whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stoker.contract import AdapterRequest, EmbedRequest, GenerateRequest, TrainRequest, build
from stoker.contract.base import LONGEST_SHOWN
from stoker.contract.bundle import pack, source
from stoker.contract.dataset import iterate_lines
from stoker.contract.freeform import MAX_DEPTH, check_json
from stoker.contract.names import Rule, follows
from stoker.contract.requests import ChatMessage
from stoker.contract.results import Completion, RerankResult, ToolCall, Usage
from stoker.contract.shown import as_json, brief, cut, printable
from stoker.contract.vectors import Int8Vectors, is_of
from stoker.errors import DatasetError, InvalidRequest

DAY = 24 * 3600
GENERATE: dict[str, Any] = {"model": "m", "prompt": "x"}
TRAIN: dict[str, Any] = {"model": "m", "name": "style", "dataset": "x"}
EMBED: dict[str, Any] = {"model": "m", "texts": ("x",)}
LOAD: dict[str, Any] = {"model": "m", "name": "style", "upload": "x"}
EVALUATED: dict[str, Any] = {"held_out": 0.5, "eval_every": 1}
SAID = ChatMessage(role="user", content="x")
TALK: dict[str, Any] = {"model": "m", "messages": (SAID,)}
#: Request, fields, field, least and most, and what is too little and too much (None: nothing is).
EDGES: list[tuple[type, dict[str, Any], str, list[Any], list[Any]]] = [
    (GenerateRequest, GENERATE, "priority", [0, 9], [-1, 10]),
    (GenerateRequest, GENERATE, "deadline", [0.001, 30 * DAY], [0.0, -1.0, 30 * DAY + 1]),
    (GenerateRequest, GENERATE, "max_tokens", [1, 32_768], [0, 32_769]),
    (GenerateRequest, GENERATE, "n", [1, 16], [0, 17]),
    (GenerateRequest, GENERATE, "temperature", [0.0, 10.0], [-0.1, 10.1]),
    (GenerateRequest, GENERATE, "top_k", [0, 1_000_000], [-1, 1_000_001]),
    (GenerateRequest, GENERATE, "top_p", [1e-9, 1.0], [0.0, 1.1]),
    (GenerateRequest, GENERATE, "min_p", [0.0, 1.0], [-0.1, 1.1]),
    (GenerateRequest, GENERATE, "repetition_penalty", [0.01, 10.0], [0.0, 10.1]),
    (GenerateRequest, GENERATE, "seed", [0, 2**63 - 1], [-1, 2**63]),
    (GenerateRequest, GENERATE, "top_logprobs", [0, 20], [-1, 21]),
    (GenerateRequest, GENERATE, "stop", [("a",) * 16], [("a",) * 17]),
    (GenerateRequest, GENERATE, "stop_token_ids", [(0, 2**31 - 1), (1,) * 64], [(-1,), (2**31,), (1,) * 65]),
    (GenerateRequest, GENERATE, "logit_bias", [{0: -100.0}, {1: 100.0}], [{0: -100.1}, {1: 100.1}, {-1: 0.0}]),
    (EmbedRequest, EMBED, "dimensions", [1, 65_536], [0, 65_537]),
    (EmbedRequest, EMBED, "texts", [("x",) * 4096], [(), ("x",) * 4097, (" ",)]),
    (TrainRequest, TRAIN, "steps", [1, 1_000_000], [0, 1_000_001]),
    (TrainRequest, TRAIN, "rank", [1, 256], [0, 257]),
    (TrainRequest, TRAIN, "alpha", [0.001, 4096.0], [0.0, 4096.1]),
    (TrainRequest, TRAIN, "dropout", [0.0, 0.9], [-0.1, 0.91]),
    (TrainRequest, TRAIN, "batch_size", [1, 256], [0, 257]),
    (TrainRequest, TRAIN, "accumulation", [1, 1024], [0, 1025]),
    (TrainRequest, TRAIN, "max_length", [2, 32_768], [1, 32_769]),
    (TrainRequest, TRAIN, "learning_rate", [1e-9, 1.0], [0.0, 1.1]),
    (TrainRequest, TRAIN, "weight_decay", [0.0, 1.0], [-0.1, 1.1]),
    (TrainRequest, TRAIN, "clip", [0.001, 1e6], [0.0, 1e6 + 1]),
    (TrainRequest, TRAIN, "label_smoothing", [0.0, 0.9], [-0.1, 0.91]),
    (TrainRequest, TRAIN, "held_out", [0.0, 0.5], [-0.1, 0.51]),
    (TrainRequest, TRAIN, "checkpoint_every", [1, 1_000_000], [0, 1_000_001]),
    (TrainRequest, TRAIN | EVALUATED, "stop_after", [0, 1000], [-1, 1001]),
    (TrainRequest, TRAIN | EVALUATED, "eval_every", [0, 1_000_000], [-1, 1_000_001]),
    (TrainRequest, TRAIN, "held_out_lines", [0, 1_000_000], [-1, 1_000_001]),
    (TrainRequest, TRAIN, "epochs", [1, 10_000], [0, 10_001]),
    (TrainRequest, TRAIN, "warmup_steps", [0, 1_000_000], [-1, 1_000_001]),
    (TrainRequest, TRAIN, "spike", [0.0, 1e6], [-0.1, 1e6 + 1]),
    (TrainRequest, TRAIN, "seed", [0, 2**63 - 1], [-1, 2**63]),
    (TrainRequest, TRAIN, "targets", [("q",), ("q",) * 32, ("a" * 128,)], [(), ("q",) * 33, ("a" * 129,), (".a",)]),
    (TrainRequest, TRAIN, "dataset", ["x", "x" * 512], ["", "x" * 513]),
    (TrainRequest, TRAIN, "schedule", ["constant", "linear", "cosine"], ["", "Cosine"]),
    (AdapterRequest, LOAD, "upload", ["x", "x" * 256], ["", "x" * 257]),
    (EmbedRequest, EMBED, "prompt", ["", "x" * 1000], ["x" * 1001]),
    (EmbedRequest, EMBED, "truncation", ["error", "end"], ["start", ""]),
    (EmbedRequest, EMBED, "dtype", ["float32", "float16", "int8"], ["float64", "bfloat16"]),
    (EmbedRequest, EMBED, "query", ["x", None], ["", " "]),
    (GenerateRequest, GENERATE, "prompt", ["x" * 1_000_000], ["x" * 1_000_001, "", " "]),
    (GenerateRequest, {"model": "m"}, "prompt_ids", [(0,), (1,) * 131_072], [(), (1,) * 131_073, (-1,), (2**31,)]),
    (GenerateRequest, {"model": "m"}, "messages", [(SAID,) * 4096], [(), (SAID,) * 4097]),
    (GenerateRequest, TALK, "tools", [({"a": 1},) * 128], [(), ({},) * 129]),
    (GenerateRequest, TALK, "template", [{}, {str(n): n for n in range(64)}], [{str(n): n for n in range(65)}]),
    (GenerateRequest, GENERATE, "presence_penalty", [-100.0, 0.0, 1e-6, 100.0], [-100.1, 100.1, 9e-7, -9e-7]),
    (GenerateRequest, GENERATE, "frequency_penalty", [-100.0, 0.0, -1e-6, 100.0], [-100.1, 100.1, 9e-7]),
    (GenerateRequest, GENERATE, "regex", ["a", "a" * 16_384], ["", "a" * 16_385]),
    (GenerateRequest, GENERATE, "stop", [("a" * 256,)], [("a" * 257,), ("",)]),
    (GenerateRequest, GENERATE, "adapter", ["style", "style@1", "a" * 64], ["", "style@0", "Style", "style@", "@1"]),
    (ChatMessage, {}, "role", ["user", "a" * 32, "a_-9"], ["", "User", "9a", "a" * 33]),
    (ChatMessage, {"role": "user"}, "content", [None, "", "x" * 1_000_000], ["x" * 1_000_001]),
    (ChatMessage, {"role": "user"}, "reasoning_content", [None, "", "x" * 1_000_000], ["x" * 1_000_001]),
    (ChatMessage, {"role": "user"}, "name", [None, "x" * 128], ["x" * 129]),
    (ChatMessage, {"role": "user"}, "tool_calls", [None, ({},) * 128], [({},) * 129]),
    (ChatMessage, {"role": "user"}, "tool_call_id", [None, "x" * 128], ["x" * 129]),
]
NUMBERS: tuple[object, ...] = (int, float, int | None, float | None)
#: Fields without a bound, and those that other tests are about.
BOUNDLESS = {"normalize", "ignore_eos", "lookup", "json_schema", "model", "name", "promote"} | {
    *("rslora", "dora", "learn_prompts", "gradient_checkpointing", "logit_bias"),
}


@pytest.mark.parametrize("request_", [GenerateRequest, EmbedRequest, TrainRequest, AdapterRequest])
def test_true_and_false_are_no_numbers(request_: type[GenerateRequest]) -> None:
    fields = {GenerateRequest: GENERATE, EmbedRequest: EMBED, TrainRequest: TRAIN, AdapterRequest: LOAD}[request_]
    of_numbers = [name for name, field in request_.model_fields.items() if field.annotation in NUMBERS]
    assert {"priority", "deadline"} <= {*of_numbers}
    for name in of_numbers:
        for value in (True, False):
            with pytest.raises(InvalidRequest, match=rf"^{name}: {value} given; expected a number\.$"):
                build(request_, {**fields, name: value})


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m", "prompt_ids": [1, True]},
        GENERATE | {"stop_token_ids": (False,)},
        GENERATE | {"logit_bias": {1: 2.0, 2: True}},
    ],
)
def test_true_and_false_are_none_of_many_numbers_either(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="true or false is among them; expected numbers"):
        GenerateRequest(**fields)


def test_what_is_true_or_false_is_taken_so() -> None:
    for name in ("ignore_eos", "lookup"):
        assert getattr(GenerateRequest(**GENERATE | {name: True}), name) is True
    assert EmbedRequest(**EMBED, normalize=False).normalize is False
    assert GenerateRequest(**TALK, template={"enable_thinking": False}).template == {"enable_thinking": False}


def test_every_field_of_a_request_has_its_edges_here() -> None:
    for request in (GenerateRequest, EmbedRequest, TrainRequest, AdapterRequest):
        known = {name for each, _, name, _, _ in EDGES if each is request} | {"priority", "deadline"}
        assert request.model_fields.keys() - known <= BOUNDLESS, request
    assert ChatMessage.model_fields.keys() == {name for each, _, name, _, _ in EDGES if each is ChatMessage}


@pytest.mark.parametrize(("request_", "fields", "name", "allowed", "refused"), EDGES, ids=[row[2] for row in EDGES])
def test_a_field_takes_what_it_says_and_nothing_beyond(
    request_: type[GenerateRequest], fields: dict[str, Any], name: str, allowed: list[Any], refused: list[Any]
) -> None:
    for value in allowed:
        assert getattr(request_(**{**fields, name: value}), name) == value
    for value in refused:
        with pytest.raises(ValidationError, match=name):
            request_(**{**fields, name: value})


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        (Rule.NAME, ["a", "9", "a" * 64, "a.b-c_d"], ["", "A", "-a", ".a", "a" * 65, "a b", "a\n"]),
        (Rule.JOB_ID, ["a", "A", "9", "a" * 128, "a.b-c_D"], ["", "-a", ".a", "_a", "a" * 129, "a:b", "a\n"]),
        (Rule.VERSION, ["1", "999999999"], ["", "0", "01", "1000000000", "-1", "1.0", "٣", "1\n"]),
    ],
)
def test_a_name_is_as_long_as_it_may_be_and_no_longer(rule: Rule, allowed: list[str], refused: list[str]) -> None:
    assert [name for name in allowed if not follows(rule, name)] == []
    assert [name for name in refused if follows(rule, name)] == []


def test_of_two_ways_to_say_what_is_held_out_one_is_taken() -> None:
    for fields in ({"held_out": 0.5}, {"held_out_lines": 3}, {"held_out": 0.0, "held_out_lines": 0}):
        TrainRequest(**TRAIN | fields)
    with pytest.raises(ValidationError, match="held_out and held_out_lines given"):
        TrainRequest(**TRAIN | {"held_out": 0.5, "held_out_lines": 3})
    for fields in ({"eval_every": 1}, {"stop_after": 1}, {"held_out": 0.5, "stop_after": 1}):
        with pytest.raises(ValidationError, match="need"):
            TrainRequest(**TRAIN | fields)
    TrainRequest(**TRAIN | {"held_out_lines": 3, "eval_every": 1, "stop_after": 1})


def test_one_of_two_ways_to_ask_for_a_truncation_is_said() -> None:
    assert EmbedRequest(**EMBED | {"truncate": True}).truncation == "end"
    assert EmbedRequest(**EMBED | {"truncate": False}).truncation == "error"
    for also in ("end", "error"):
        with pytest.raises(ValidationError, match="truncate and truncation given"):
            EmbedRequest(**EMBED | {"truncate": True, "truncation": also})


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_json_may_be_so_deep_and_so_large_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    check_json("tools", nested(MAX_DEPTH), 10_000)
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
        check_json("tools", nested(MAX_DEPTH + 1), 10_000)
    monkeypatch.setattr("stoker.contract.freeform.MAX_VALUES", 1000)
    check_json("tools", [0] * 999, 10**7)
    with pytest.raises(ValueError, match="more than 1000 values"):
        check_json("tools", [0] * 1000, 10**7)
    check_json("tools", "abc", 5)
    with pytest.raises(ValueError, match="5 characters of JSON; at most 4"):
        check_json("tools", "abc", 4)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({1: "x"}, "1 as a name; names are texts"),
        ([{None: "x"}], "None as a name"),
        ({"a": b"x"}, "is no value of it"),
        ([float("nan")], r"\(NaN is no value of it\)"),
        ([2**64], "more than 64 bits"),
        ([-(2**63) - 1], "more than 64 bits"),
        (["a \ud800"], r'\("a \\ud800" holds half of a pair of surrogates\)'),
        ({"\ud800": 1}, "half of a pair of surrogates"),
    ],
)
def test_what_is_no_json_is_refused_with_its_reason(value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_json("tools", value, 1000)
    check_json("tools", [2**64 - 1, -(2**63), 1.5, None, True, {"a": "\U0001f600"}], 1000)


def test_the_best_of_a_ranking_are_as_many_as_are_asked_for() -> None:
    result = RerankResult(scores=(0.1, 0.9, 0.9, 0.5), usage=Usage())
    found = {top: [ranked.index for ranked in result.ranking(top)] for top in (None, -2, 0, 1, 3, 9)}
    assert found == {None: [1, 2, 3, 0], -2: [], 0: [], 1: [1], 3: [1, 2, 3], 9: [1, 2, 3, 0]}


def test_a_call_that_was_cut_stays_text() -> None:
    begun = '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"'
    for text, calls, content in (
        (begun, (), begun),
        (f"{begun}}}}}\n</tool_call>", (ToolCall(name="weather", arguments={"town": "Bonn"}),), ""),
    ):
        found = Completion(text=text, token_ids=(1,), finish_reason="length", functions=("weather",))
        assert (found.tool_calls, found.content) == (calls, content)


def test_what_a_terminal_could_take_for_an_order_is_not_shown() -> None:
    assert printable("a\x1b[2Kb\r\nc\u202ed é日") == "a\ufffd[2Kb\ufffd\ufffdc\ufffdd é日"
    assert [brief("x" * 70), brief("x" * 58), cut("x" * 5, 5), cut("x" * 6, 5)] == [
        f"'{'x' * 58}…", f"'{'x' * 58}'", "xxxxx", "xxxx…",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, "true"),
        (None, "null"),
        ([False, 1, 2.5, {"a": None}], '[false, 1, 2.5, {"a": null}]'),
        (float("nan"), "NaN"),
        ('a "b"日\n', '"a \\"b\\"日\\n"'),
        ("\x1b[2K\x9b\u202e\ud800\U000e0001", r'"\u001b[2K\u009b\u202e\ud800\udb40\udc01"'),
        ("x" * 98, f'"{"x" * 98}"'),
        ("x" * 99, f'"{"x" * 98}…'),
        ([1] * 50, f"[{'1, ' * 32}1,…"),
        (b"x", "b'x'"),
    ],
)
def test_a_value_of_a_json_file_is_shown_on_one_line_as_json_spells_it(value: object, shown: str) -> None:
    assert as_json(value) == shown


def test_a_value_that_lies_too_deep_is_shown_by_its_type() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert as_json(deep) == "an object of type list that cannot be shown"


def test_where_a_bundle_comes_from_is_said_if_it_is_one_line() -> None:
    files = {"adapter_config.json": b"{}"}
    assert source(pack(files, "/models/style"), "x") == "/models/style"
    assert (
        source(pack(files, "a\nb"), "x")
        == source(pack(files, "a\x1b[2K"), "x")
        == source(pack(files, None), "x")
        == "x"
    )


def test_vectors_in_eight_bits_have_a_scale_for_each() -> None:
    codes = np.zeros((2, 3), np.int8)
    assert is_of(Int8Vectors(codes, np.ones(2, np.float32)), 2, 3, "int8")
    wrong: list[Any] = [np.ones(3, "f4"), np.ones((2, 1), "f4"), np.ones(2, "f8"), np.ones(0, "f4")]
    for scales in wrong:
        assert not is_of(Int8Vectors(codes, scales), 2, 3, "int8")
    for rows, dim, dtype in ((1, 3, "int8"), (2, 4, "int8"), (2, 3, "float32")):
        assert not is_of(Int8Vectors(codes, np.ones(2, np.float32)), rows, dim, dtype)  # type: ignore[arg-type]
    assert not is_of(Int8Vectors(codes.astype(np.int16), np.ones(2, np.float32)), 2, 3, "int8")


@pytest.mark.parametrize("message", ['{"role": "user"}', '{"role": "user", "content": "a", "name": "b"}', '"a"', "{}"])
def test_a_message_of_a_dataset_has_a_role_and_content_and_nothing_else(message: str) -> None:
    line = f'{{"messages": [{message}, {{"role": "assistant", "content": "b"}}]}}'.encode()
    with pytest.raises(DatasetError, match=r"line 1, message 1: expected an object"):
        list(iterate_lines([line], "x"))


@pytest.mark.parametrize("size", [LONGEST_SHOWN - 1, LONGEST_SHOWN, LONGEST_SHOWN + 1])
def test_a_text_that_is_shown_has_as_many_characters_as_are_allowed_and_says_where_it_was_cut(size: int) -> None:
    shown = repr(GenerateRequest(model="m", prompt="x" * size, seed=1))
    whole = "prompt='" + "x" * size + "'"
    cut = "prompt='" + "x" * (LONGEST_SHOWN - 1) + "'…"
    assert (whole if size <= LONGEST_SHOWN else cut) in shown

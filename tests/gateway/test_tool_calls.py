"""Calls of functions in what a model writes, whole and in pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.contract.parts import ArgumentsReader, Begun, FunctionCall, Item, Reader, TextReader, add, items_of
from stoker.contract.tool_calls import CallReader, object_of

NAMES = ("weather", "time")
CALL = '{"name": "weather", "arguments": {"town": "Bonn"}}'
OTHER = '{"name": "time", "parameters": {}}'
WEATHER, TIME = FunctionCall("weather", '{"town": "Bonn"}'), FunctionCall("time", "{}")


def hermes(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def read(text: str, **options: Any) -> list[Item]:
    return items_of(CallReader(NAMES, **options), text)


def xml(name: str, **values: str) -> str:
    given = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def in_pieces(reader: Reader, pieces: list[str]) -> list[Item]:
    items: list[Item] = []
    for piece in pieces:
        for part in reader.feed(piece):
            add(items, part)
    for part in reader.finish():
        add(items, part)
    return items


CALLS: list[tuple[str, list[Item]]] = [
    # Hermes, Qwen, SmolLM.
    (hermes(CALL), [WEATHER]),
    (f"I look.\n{hermes(CALL)}", ["I look.\n", WEATHER]),
    (f"\n\n{hermes(CALL)}\n{hermes(OTHER)}\n", [WEATHER, TIME]),
    (f"{hermes(CALL)}\n\nDone.", [WEATHER, "\n\nDone."]),
    (f"<tool_call>[{CALL}, {OTHER}]</tool_call>", [WEATHER, TIME]),
    (f"<tool_call>{CALL}", [WEATHER]),
    (f"<tool_call>{CALL}\n<tool_call>{OTHER}", [WEATHER, TIME]),
    # Llama 3, with its marker and without.
    (f"<|python_tag|>{OTHER}", [TIME]),
    (f"\n{OTHER}\n", [TIME]),
    ('{"type": "function", "name": "time", "parameters": {}}', [TIME]),
    # Mistral, with its marker and without.
    (f"[TOOL_CALLS][{CALL}]", [WEATHER]),
    (f"I look.[TOOL_CALLS] [{CALL}, {OTHER}]", ["I look.", WEATHER, TIME]),
    (f" [\n {CALL},\n{OTHER}]", [WEATHER, TIME]),
    # Mistral since 2025, with its markers and without.
    ('[TOOL_CALLS]weather[ARGS]{"town": "Bonn"}', [WEATHER]),
    ('I look.[TOOL_CALLS]weather[ARGS]{"town": "Bonn"}[TOOL_CALLS]time[ARGS]{}', ["I look.", WEATHER, TIME]),
    ('[TOOL_CALLS]weather[CALL_ID]aB3dE6gH9[ARGS]{"town": "Bonn"}\n', [WEATHER]),
    ('weather{"town": "Bonn"}', [WEATHER]),
    (' weather {"town": "Bonn"}time{}', [WEATHER, TIME]),
    # Behind a text, without its markers, as workers send it.
    ('I look.weather{"town": "Bonn"}', ["I look.", WEATHER]),
    ('I look.\nweather{"town": "Bonn"}time{}\n', ["I look.\n", WEATHER, TIME]),
    ('weather{"town": "Bonn"}\ntime{1}', [WEATHER, "\ntime{1}"]),
    ('First time{"a": 1} Hm. weather{"town": "Bonn"}', ['First time{"a": 1} Hm. ', WEATHER]),
    (f'It is time{{"a. {hermes(CALL)}', ['It is time{"a. ', WEATHER]),
    # Qwen3-Coder.
    (xml("weather", town="Bonn"), [WEATHER]),
    (f"I look.\n{xml('weather', town='Bonn')}\n{xml('time')}\n", ["I look.\n", WEATHER, TIME]),
    ("<tool_call><function=weather><parameter=town>Bonn</parameter></function></tool_call>", [WEATHER]),
    (f"{xml('weather', town='Bonn')}\n{hermes(OTHER)}", [WEATHER, TIME]),
    (xml("weather", town="Bonn").removesuffix("</tool_call>"), [WEATHER]),
    # Arguments as the text of an object.
    (hermes('{"name": "weather", "arguments": "{\\"town\\": \\"Bonn\\"}"}'), [WEATHER]),
]

#: What is no call: all of it stays text.
TEXTS = [
    "", " \n", "It was <b>dark</b>.", "<tool_call", "a < b [TOOL_", "<tool_call>",
    "<tool_call></tool_call>", "</tool_call>",
    hermes('{"name": "weather", "arguments": {"town": }}'), hermes('{"name": "weather", "arguments": {"town": "Bo'),
    hermes('{"name": "other", "arguments": {}}'), hermes('{"name": "weather"}'), hermes('{"name": 1, "arguments": {}}'),
    hermes('{"name": "weather", "arguments": []}'), hermes('{"name": "weather", "arguments": "x"}'),
    hermes('{"name": "weather", "arguments": {}, "parameters": {}}'), hermes("[]"), hermes("null"), hermes("17"),
    hermes('{"name": "weather", "arguments": {}, "price": 1}'),
    hermes(f'[{CALL}, {{"name": "other", "arguments": {{}}}}]'),
    hermes('{"name": "weather", "arguments": {"a": NaN}}'), hermes('{"name": "weather", "arguments": {"a": 1e999}}'),
    hermes('{"name": "weather", "arguments": {"a": "\\ud800"}}'), hermes(f"{CALL} and {CALL}"),
    hermes('{"name": "weather", "arguments": ' + '{"a": ' * 20_000), "<function=weather></function>",
    f"{OTHER} and more", f"Here: {OTHER}", f"{OTHER}; {OTHER}", '{"name": "weather", "arg', "[1] says so.", "{}", "[]",
    '[TOOL_CALLS]other[ARGS]{}', "[TOOL_CALLS]time[ARGS]", "[TOOL_CALLS]time[ARGS]{", "[TOOL_CALLS]time[ARGS]{} Hm.",
    "[TOOL_CALLS]time[ARGS][]", "time{", "time{} Hm.", "times{}", "time", "other{}", "time flies.", "[ARGS]{}",
    "some-time{}", "sometime{}", "some_time{}", "Now time{} says so.", 'Now time{"a": 1', "Now time { }", "Now time{a}",
    xml("other"), xml("time")[:20], "<tool_call><function=time></tool_call>",
    "<tool_call><function=time>Hm.</function>",
    "<tool_call><function=time><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
    "<tool_call><function=time><parameter=a>1</function></tool_call>", xml("time", a="\ud800"), "<tool_call><function",
    '{"name": "Ada", "arguments": {}}', "<|python_tag|>print(1)", "[TOOL_CALLS]none", f"[TOOL_CALLS][{CALL}",
]  # fmt: skip


@pytest.mark.parametrize(("text", "items"), CALLS, ids=range(len(CALLS)))
def test_a_call_is_found_in_the_form_of_each_family(text: str, items: list[Item]) -> None:
    assert read(text) == items
    assert in_pieces(CallReader(NAMES), list(text)) == items


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_call_of_the_requests_functions_stays_text_to_the_letter(text: str) -> None:
    assert read(text) == ([text] if text else [])
    assert "".join(str(item) for item in in_pieces(CallReader(NAMES), list(text))) == text


@pytest.mark.parametrize("broken", [text for text in TEXTS if text.startswith("<tool_call>") and len(text) < 1000])
def test_a_broken_call_costs_none_behind_it(broken: str) -> None:
    assert read(f"{broken}\n{hermes(CALL)}") == [f"{broken}\n", WEATHER]


@pytest.mark.parametrize("said", ["</tool_call>", "<tool_call>", '\\"</tool_call>', "[TOOL_CALLS]", "\\\\"])
def test_a_marker_in_a_string_of_an_argument_is_a_part_of_it(said: str) -> None:
    call = f'{{"name": "weather", "arguments": {{"town": "a {said} b"}}}}'
    wanted = json.loads(call)["arguments"]
    for text in (hermes(call), call, f"[TOOL_CALLS][{call}]"):
        (item,) = in_pieces(CallReader(NAMES), list(text))
        assert isinstance(item, FunctionCall)
        assert json.loads(item.arguments) == wanted


@pytest.mark.parametrize("said", ["</tool_call>", "<tool_call>", '"', "</function>", "<b>\n</b>\n", hermes(OTHER)])
def test_what_stands_in_a_value_of_qwen3_coders_form_is_a_part_of_it(said: str) -> None:
    (item,) = in_pieces(CallReader(NAMES), list(xml("weather", town=f"a {said} b")))
    assert isinstance(item, FunctionCall)
    assert json.loads(item.arguments) == {"town": f"a {said} b"}


@pytest.mark.parametrize(
    ("schema", "written", "meant"),
    [
        ({"type": "string"}, "53113", "53113"),
        ({"type": "string"}, "null", "null"),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "true", "true"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "integer"}, "53113", 53113),
        ({"type": "number"}, "0.5", 0.5),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, '["a", 1]', ["a", 1]),
        ({"type": "object"}, '{"a":\n1}', {"a": 1}),
        ({"type": "integer"}, "five", "five"),
        ({}, "53113", 53113),
        ({}, "01234", "01234"),
        (True, "False", "False"),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, "  a\n\nb ", "  a\n\nb "),
    ],
)
def test_a_value_of_qwen3_coders_form_is_of_the_type_that_its_schema_names(
    schema: object, written: str, meant: object
) -> None:
    reader = CallReader({"time": {"properties": {"a": schema}}})
    (item,) = items_of(reader, xml("time", a=written))
    assert isinstance(item, FunctionCall)
    assert json.loads(item.arguments) == {"a": meant}


def test_a_text_passes_at_once_and_what_may_be_a_marker_is_held_back() -> None:
    reader = CallReader(NAMES)
    assert reader.feed("It is") == ["It is"]
    assert reader.feed(" a <tool") == [" a "]
    assert reader.feed("s>") == ["<tools>"]
    assert reader.feed("<tool_call>{") == []
    assert reader.feed("x") == ["<tool_call>", "{x"]
    assert reader.feed(" now ti") == [" now "]
    assert reader.feed("me{") == []
    assert reader.feed("a}") == ["time{a}"]
    assert reader.feed(' weather{"') == [" "]
    assert reader.finish() == ['weather{"']
    assert CallReader(NAMES).feed('{"a": 1') == ['{"a": 1'], "JSON that begins as no call does"


@pytest.mark.parametrize(
    ("held", "then", "said"),
    [
        # JSON that has the name of no function is text as soon as that is there.
        ('{"name": "Bon', 'n", ', '{"name": "Bonn", '),
        ('[{"name": "Bon', 'n", ', '[{"name": "Bonn", '),
        # An object that is no call; and one that is, with a text behind it.
        ('{"type": "function", "id": "7"', "} Yes", '{"type": "function", "id": "7"} Yes'),
        ('time{"a": "}"}', " is so", 'time{"a": "}"} is so'),
        ('time{"a": {}', "1}", 'time{"a": {}1}'),
        ("[TOOL_CALLS]time{}", "!", "[TOOL_CALLS]time{}!"),
        (CALL, "!", f"{CALL}!"),
        (f"[{CALL}, {OTHER}", "]]", f"[{CALL}, {OTHER}]]"),
        (f"[{CALL}, {{", "}", f"[{CALL}, {{}}"),
    ],
)
def test_what_begins_as_a_call_and_is_none_is_passed_on_as_soon_as_that_is_known(
    held: str, then: str, said: str
) -> None:
    reader = CallReader(NAMES)
    assert reader.feed(held) == [], "it may be a call still"
    assert "".join(map(str, reader.feed(then))) == said
    assert reader.feed(" and on") == [" and on"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (hermes(CALL), f"\n{hermes(OTHER)}"),
        (xml("weather", town="Bonn"), xml("time")),
        ('[TOOL_CALLS]weather[ARGS]{"town": "Bonn"}', '[TOOL_CALLS]time[ARGS]{"a": {"b": "}"}}'),
        ('I look.\nweather{"town": "Bonn"}', 'time{"a": {"b": 1}}'),
    ],
)
def test_an_answer_that_is_cut_anywhere_has_the_calls_that_are_whole_and_the_rest_as_text(
    first: str, second: str
) -> None:
    whole = [len(call) for call in (first, first + second)]
    for call in range(2):
        closed = (first, second)[call]
        whole[call] -= next((len(end) for end in ("\n</tool_call>", "</tool_call>") if closed.endswith(end)), 0)
    for cut in range(len(first + second) + 1):
        text = (first + second)[:cut]
        items = read(text)
        calls = [item for item in items if isinstance(item, FunctionCall)]
        assert [call.name for call in calls] == ["weather", "time"][: sum(end <= cut for end in whole)]
        said = "".join(item for item in items if isinstance(item, str))
        if whole[0] <= cut < whole[1]:
            assert said.removeprefix("I look.\n").strip() == text[len(first) :].strip()
        elif cut < whole[0]:
            assert said == text
        # What a stream has by then, and keeps where its job is cancelled: nothing of a call that goes on.
        begun = [part for part in CallReader(NAMES).feed(text) if isinstance(part, Begun)]
        assert len(begun) <= len(calls)


def test_without_parallel_calls_the_first_one_is_the_only_one() -> None:
    for text in (f"a{hermes(CALL)}{hermes(OTHER)}b", f"a{hermes(f'[{CALL}, {OTHER}]')}b"):
        assert read(text, parallel=False) == ["a", WEATHER, "b"]


PIECES = st.lists(
    st.sampled_from(
        ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<", "\n", '"', "\\", "{", "}", "[", "]", ",",
         "Hm. ", '{"name": "weather", "arguments": {"town": "', '"}}', CALL, OTHER, hermes(CALL),
         f"[{CALL},{OTHER}]", '{"name"', "time{}", '{"name": "x"', "}", " ", "[CALL_ID]a1",
         "[ARGS]", "time", 'weather[ARGS]{"town": "Bonn"}', xml("time"),
         "<function=time>", "<parameter=a>", "</parameter>", "</function>"]
    ),
    max_size=12,
)  # fmt: skip


@given(pieces=PIECES, cuts=st.lists(st.integers(0, 400)), parallel=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_split_of_an_answer_into_pieces_gives_the_same_calls_and_text(
    pieces: list[str], cuts: list[int], parallel: bool
) -> None:
    text = "".join(pieces)
    at = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    split = [text[begin:end] for begin, end in pairwise(at)]
    whole = read(text, parallel=parallel)
    assert in_pieces(CallReader(NAMES, parallel=parallel), split) == whole
    assert in_pieces(CallReader(NAMES, parallel=parallel), list(text)) == whole
    if not any(isinstance(item, FunctionCall) for item in whole):
        assert "".join(str(item) for item in whole) == text


def test_the_readers_of_other_answers_pass_all_on() -> None:
    assert in_pieces(TextReader(), ["a", "", hermes(CALL)]) == [f"a{hermes(CALL)}"]
    assert in_pieces(ArgumentsReader("time"), ['{"a', '": 1}']) == [FunctionCall("time", '{"a": 1}')]
    assert in_pieces(ArgumentsReader("time"), []) == [FunctionCall("time", "")]


def test_arguments_that_were_cut_off_are_no_object() -> None:
    assert object_of('{"town": "Bonn"}') == {"town": "Bonn"}
    assert [object_of(text) for text in ('{"town": "Bo', "[]", "", "{" * 50_000, '{"a": "\\ud800"}')] == [None] * 5

"""What a model thinks before it answers, in any pieces; and what a result consists of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.contract import Completion, GenerateRequest, StreamToken
from stoker.contract.parts import Item, Reader, Reasoning, TextReader, add, items_of
from stoker.contract.reasoning import ReasoningReader, parts_of, reasoning_tokens
from stoker.contract.results import ToolCall
from stoker.contract.tool_calls import CallReader
from stoker.testing import FakeClient

CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Bonn"}}\n</tool_call>'
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def tokens(pieces: list[str], *, within: bool = False, **fields: Any) -> list[StreamToken]:
    """An answer of these pieces; `within`: its prompt ends in a block of reasoning."""
    common: dict[str, Any] = {"token_id": 1, "logit": 0.0, "logprob": -0.5, "probability": 1.0, **fields}
    last = len(pieces) - 1
    return [
        StreamToken(index=at, text=piece, in_reasoning=within and at == 0,
                    finish_reason="stop" if at == last else None, **common)
        for at, piece in enumerate(pieces)
    ]  # fmt: skip


def streamed(pieces: list[str], inner: Reader, *, within: bool) -> list[Item]:
    reader, items = ReasoningReader(inner), list[Item]()
    for token in tokens(pieces, within=within):
        for part in parts_of(reader, token):
            assert part not in ("", Reasoning("")), "no part is empty"
            add(items, part)
    return items


def expected(text: str, *, within: bool) -> tuple[str, str]:
    """Reasoning and the rest, of the whole text at once."""
    begins = text.lstrip()
    if begins.startswith("<think>"):
        text, within = begins.removeprefix("<think>"), True
    if not within:
        return "", text
    said, marker, rest = text.partition("</think>")
    return (said.strip(), rest.lstrip()) if marker else (said.lstrip(), "")


CASES: list[tuple[str, bool, list[Item]]] = [
    ("<think>\nHm.\n</think>\n\nYes.", False, [Reasoning("Hm."), "Yes."]),
    ("\n <think>a < b</thin </think>c </think>", False, [Reasoning("a < b</thin"), "c </think>"]),
    ("Hm.\n</think>\n\nYes.", True, [Reasoning("Hm."), "Yes."]),
    ("<think>\nHm.</think>Yes.", True, [Reasoning("Hm."), "Yes."]),
    ("<think>\n\n</think>\n\nYes.", False, ["Yes."]),
    ("<think>It goes on </thi", False, [Reasoning("It goes on </thi")]),
    ("It goes on ", True, [Reasoning("It goes on ")]),
    ("<think>Hm.</think>", False, [Reasoning("Hm.")]),
    ("</think>Yes.", True, ["Yes."]),
    # No reasoning: all of it stays text to the letter.
    ("  Yes. <think>Hm.</think>", False, ["  Yes. <think>Hm.</think>"]),
    ("Hm.</think>Yes.", False, ["Hm.</think>Yes."]),
    (" <thin", False, [" <thin"]),
    ("<thinking>Hm.", False, ["<thinking>Hm."]),
    (" \n", False, [" \n"]),
    ("", False, []),
]


@pytest.mark.parametrize(("text", "within", "items"), CASES, ids=range(len(CASES)))
def test_reasoning_is_what_stands_between_the_markers_at_the_beginning(
    text: str, within: bool, items: list[Item]
) -> None:
    assert items_of(ReasoningReader(TextReader(), in_reasoning=within), text) == items
    if text:
        assert streamed(list(text), TextReader(), within=within) == items


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", " ", "Hm. ", "Yes", '"', CALL, "<tool_call>"]),
    max_size=10,
)


@given(pieces=PIECES, cuts=st.lists(st.integers(0, 200)), within=st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_split_of_an_answer_gives_the_same_reasoning_calls_and_text(
    pieces: list[str], cuts: list[int], within: bool
) -> None:
    text = "".join(pieces)
    thought, rest = expected(text, within=within)
    begun: list[Item] = [Reasoning(thought)] if thought else []
    at = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    split = [text[begin:end] for begin, end in pairwise(at)] or [""]
    for pieces_of_it in (split, list(text) or [""], [text]):
        assert streamed(pieces_of_it, TextReader(), within=within) == begun + ([rest] if rest else [])
        calls = items_of(CallReader(["weather"]), rest)
        assert streamed(pieces_of_it, CallReader(["weather"]), within=within) == begun + calls


def test_text_and_reasoning_pass_at_once_and_what_may_be_a_marker_or_stand_before_one_is_held_back() -> None:
    reader = ReasoningReader(TextReader())
    assert [reader.feed(piece) for piece in ("<th", "ink>", "\nHm", ". \n", "So", " </th")] == [
        [], [], [Reasoning("Hm")], [Reasoning(".")], [Reasoning(" \nSo")], [],
    ]  # fmt: skip
    assert [reader.feed(piece) for piece in ("ink>", "\n\n", " Yes", " ", "<think>")] == [
        [], [], ["Yes"], [" "], ["<think>"],
    ]  # fmt: skip
    assert ReasoningReader(TextReader()).feed("Yes") == ["Yes"]


@pytest.mark.parametrize(
    ("texts", "within", "count"),
    [
        (["<think>", "\n", "Hm", "</think>", "\n", "Yes"], False, 4),
        (["<thi", "nk>Hm</th", "", "ink>Y", "es", ""], False, 4),
        (["Hm", "</think>", "Yes"], True, 2),
        (["Hm", " and", ""], True, 3),
        (["Yes", "</think>"], False, 0),
        (list("<think>Hm</think>Yes"), False, len("<think>Hm</think>")),
        (list("Hm</think>"), True, len("Hm</think>")),
        ([], True, 0),
    ],
)
def test_tokens_of_the_reasoning_are_counted_with_its_markers(texts: list[str], within: bool, count: int) -> None:
    assert reasoning_tokens(texts, in_reasoning=within) == count


@pytest.mark.parametrize("within", [False, True])
def test_a_result_has_what_its_text_consists_of(within: bool) -> None:
    opener = "" if within else "<think>"
    pieces = [f"{opener}\nI look", ".\n</think>", "\n\nOne moment.\n", CALL[:20], CALL[20:]]
    fake = FakeClient()
    with fake as client:
        fake.script.generate(tokens(pieces, within=within))
        job = client.generate([{"role": "user", "content": "Weather?"}], tools=TOOLS)
        result = job.result(10)
        assert "".join(token.text for token in job.stream()) == result.text == "".join(pieces)
    assert result.reasoning_content == "I look."
    assert result.content == "One moment.\n"
    assert result.tool_calls == (ToolCall(name="weather", arguments={"town": "Bonn"}),)
    assert result.usage.reasoning_tokens == 2


def test_each_completion_has_its_own_calls_and_none_that_the_request_does_not_name() -> None:
    fake = FakeClient()
    with fake as client:
        fake.script.generate(
            [
                *tokens([CALL]),
                *tokens(
                    ["<think>Hm"],
                    completion=1,
                ),
            ],
            times=None,
        )
        chat: Any = [{"role": "user", "content": "Weather?"}]
        named = client.generate(chat, tools=[{"name": "weather"}], n=2).result(10)
        other = client.generate(chat, tools=[{"name": "time"}], n=2).result(10)
        without = client.generate("Weather?", n=2).result(10)
    assert [len(completion.tool_calls) for completion in named.completions] == [1, 0]
    assert [completion.reasoning_content for completion in named.completions] == [None, "Hm"]
    assert [completion.content for completion in named.completions] == ["", ""]
    for result in (other, without):
        assert (result.tool_calls, result.content) == ((), CALL)


@pytest.mark.parametrize(
    "tool", [{"function": {"name": 1}}, {"function": {}}, {"function": "weather"}, {}, {"name": 2}]
)
def test_a_tool_without_a_name_has_no_calls(tool: dict[str, Any]) -> None:
    request = GenerateRequest(model="m", messages=({"role": "user", "content": "x"},), tools=(tool,))  # type: ignore[arg-type]
    assert request.functions == ()
    assert Completion(text=CALL, token_ids=(), finish_reason="stop", functions=request.functions).tool_calls == ()

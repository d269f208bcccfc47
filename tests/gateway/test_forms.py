"""An answer in each endpoint's form: whole, and as events that add up to the same, wherever its tokens end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.contract import FinishReason, GenerateResult, StreamToken, Usage
from stoker.gateway.anthropic import MessagesForm
from stoker.gateway.chat import ChatForm
from stoker.gateway.completions import CompletionForm
from stoker.gateway.errors import Refused
from stoker.gateway.events import Event
from stoker.gateway.response_form import ResponsesForm
from stoker.gateway.tools import Choice, Function, call_id
from stoker.gateway.writing import written

USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2, reasoning_tokens=1)
OPENAI_USAGE = {
    "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 1},
}  # fmt: skip
RESPONSES_USAGE = {
    "input_tokens": 5, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 1}, "total_tokens": 8,
}  # fmt: skip
ADD, SUB = Function(name="add"), Function(name="sub")
AUTO = Choice("auto", (ADD, SUB))
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "sub", "arguments": {}}\n</tool_call>'
#: Answers: text, reasoning before it, calls behind text and alone, one that was cut, and nothing at all.
TEXTS = (
    "Hello you", "<think>hm, so</think>Hello", "<think>hm", f"Look: {CALL}", f"{CALL}\n{OTHER}", CALL[:40], "", " ",
)  # fmt: skip


def result(text: str, reason: FinishReason = "stop", by: str | None = None) -> GenerateResult:
    return GenerateResult(
        model="m", adapter=None, usage=USAGE, text=text, token_ids=(1,), finish_reason=reason, stopped_by=by
    )


def tokens(text: str, cuts: list[int], reason: FinishReason = "stop") -> list[StreamToken]:
    """The text as tokens that end at `cuts`; the last one says how it ended."""
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [
        StreamToken(
            index=at, token_id=at, text=piece, logit=0, logprob=-0.5, probability=1,
            finish_reason=reason if at == len(pieces) - 1 else None,
        )
        for at, piece in enumerate(pieces)
    ]  # fmt: skip


def events(form: Any, made: list[StreamToken], ended: GenerateResult) -> list[Event]:
    return [*form.first(), *(event for token in made for event in form.token(token)), *form.last(ended)]


def data(found: list[Event]) -> list[Any]:
    """What a client reads."""
    return [event.data if isinstance(event.data, str) else json.loads(json.dumps(event.data)) for event in found]


def test_a_token_without_text_is_a_chunk_of_a_completion_where_it_says_something_else() -> None:
    """Some tokens are the first half of a letter; a client that waits for words needs no word of them."""
    for probabilities, reason, chunks in ((False, None, 0), (True, None, 1), (False, "stop", 1)):
        form = CompletionForm("j", "m", probabilities, include_usage=False)
        (token,) = tokens("", [], "stop")
        assert len(list(form.token(token.model_copy(update={"finish_reason": reason})))) == chunks


def as_sent(answer: dict[str, object]) -> Any:
    return json.loads(asyncio.run(written(answer)))


CUTS = st.lists(st.integers(0, 80), max_size=8)
REASONS = st.sampled_from(["stop", "length", "context", "stop_token", "grammar"])


@settings(max_examples=60)
@given(text=st.sampled_from(TEXTS), cuts=CUTS, reason=REASONS, probabilities=st.booleans(), usage=st.booleans())
def test_the_chunks_of_a_completion_add_up_to_the_whole(
    text: str, cuts: list[int], reason: Any, probabilities: bool, usage: bool
) -> None:
    made, ended = tokens(text, cuts, reason), result(text, reason)
    *chunks, last = data(events(CompletionForm("j", "m", probabilities, usage), made, ended))
    whole = as_sent(CompletionForm("j", "m", probabilities, usage).whole(ended, made))
    assert last == "[DONE]"
    if usage:
        counted = chunks.pop()
        assert (counted["choices"], counted["usage"]) == ([], OPENAI_USAGE)
    head = {"id": "cmpl-j", "object": "text_completion", "model": "m"}
    for chunk in (*chunks, whole):
        assert {name: chunk[name] for name in head} == head
        assert isinstance(chunk["created"], int)
    assert all(chunk.get("usage", 0) == (None if usage else 0) for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == text == whole["choices"][0]["text"]
    said = "length" if reason in ("length", "context") else "stop"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [said]
    assert (whole["choices"][0]["finish_reason"], whole["usage"]) == (said, OPENAI_USAGE)
    if probabilities:
        parts = [choice["logprobs"] for choice in choices]
        joined = {name: [item for part in parts for item in part[name]] for name in parts[0]}
        assert joined == whole["choices"][0]["logprobs"]
    else:
        assert {choice["logprobs"] for choice in (*choices, whole["choices"][0])} == {None}


@pytest.mark.parametrize(
    "make",
    [lambda: CompletionForm("j", "m", True, False), lambda: ChatForm("j", "m", AUTO, True, False, "default")],
    ids=["completions", "chat"],
)
@settings(max_examples=20)
@given(texts=st.tuples(st.sampled_from(TEXTS), st.sampled_from(TEXTS)), cuts=CUTS, order=st.lists(st.booleans()))
def test_completions_that_are_made_at_once_each_stream_as_they_would_alone(
    make: Callable[[], Any], texts: tuple[str, str], cuts: list[int], order: list[bool]
) -> None:
    own = [
        [token.model_copy(update={"completion": number}) for token in tokens(text, cuts)]
        for number, text in enumerate(texts)
    ]
    rest = [list(made) for made in own]
    mixed = [rest[place].pop(0) for place in order if rest[place]] + rest[0] + rest[1]

    def choices(made: list[StreamToken]) -> list[Any]:
        form = make()
        return [choice for token in made for event in form.token(token) for choice in event.data["choices"]]

    together = choices(mixed)
    for number, made in enumerate(own):
        assert [choice for choice in together if choice["index"] == number] == choices(made)


def _chat(deltas: list[Any]) -> dict[str, Any]:
    """The message that a client makes of what came."""
    message: dict[str, Any] = {"content": None}
    calls: dict[int, Any] = {}
    for delta in deltas:
        for name in ("content", "reasoning_content"):
            if delta.get(name) is not None:
                message[name] = (message.get(name) or "") + delta[name]
        for call in delta.get("tool_calls", ()):
            known = calls.setdefault(call["index"], {"function": {"arguments": ""}})
            function = call["function"]
            known["function"] |= {"arguments": known["function"]["arguments"] + function["arguments"]}
            known["function"] |= {"name": function["name"]} if "name" in function else {}
            known |= {name: call[name] for name in ("id", "type") if name in call}
    message["tool_calls"] = [calls[at] for at in sorted(calls)]
    return message


@settings(max_examples=80)
@given(text=st.sampled_from(TEXTS), cuts=CUTS, reason=REASONS, probabilities=st.booleans(), usage=st.booleans())
def test_the_chunks_of_a_chat_add_up_to_the_whole(
    text: str, cuts: list[int], reason: Any, probabilities: bool, usage: bool
) -> None:
    made, ended = tokens(text, cuts, reason), result(text, reason)
    *chunks, last = data(events(ChatForm("j", "m", AUTO, probabilities, usage, "flex"), made, ended))
    whole = as_sent(ChatForm("j", "m", AUTO, probabilities, usage, "flex").whole(ended, made))
    assert last == "[DONE]"
    if usage:
        counted = chunks.pop()
        assert (counted["choices"], counted["usage"]) == ([], OPENAI_USAGE)
    for chunk in chunks:
        assert (chunk["object"], chunk["id"], chunk["model"]) == ("chat.completion.chunk", "chatcmpl-j", "m")
        assert (chunk["service_tier"], chunk.get("usage", 0)) == ("flex", None if usage else 0)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": None, "refusal": None}
    (choice,) = whole["choices"]
    found, message = _chat([each["delta"] for each in choices]), choice["message"]
    assert (found["content"] or "") == (message["content"] or "")
    assert found.get("reasoning_content") == message.get("reasoning_content")
    assert found["tool_calls"] == message.get("tool_calls", [])
    assert [each["finish_reason"] for each in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == choice["finish_reason"]
    cut = reason in ("length", "context")
    assert choice["finish_reason"] == ("length" if cut else "tool_calls" if found["tool_calls"] else "stop")
    assert [call["id"] for call in found["tool_calls"]] == [
        call_id("j", 0, at) for at in range(len(found["tool_calls"]))
    ]
    said = [one for each in choices if each["logprobs"] for one in each["logprobs"]["content"]]
    assert said == ((choice["logprobs"] or {}).get("content") or [])
    assert len(said) == (len(made) if probabilities else 0)
    assert (whole["object"], whole["service_tier"], whole["usage"]) == ("chat.completion", "flex", OPENAI_USAGE)


@settings(max_examples=80)
@given(text=st.sampled_from(TEXTS), cuts=CUTS, reason=REASONS)
def test_the_blocks_of_a_message_add_up_to_the_whole(text: str, cuts: list[int], reason: Any) -> None:
    made, ended = tokens(text, cuts, reason), result(text, reason)
    found = events(MessagesForm("j", "m", AUTO), made, ended)
    first, *middle, ending, last = data(found)
    assert [event.name for event in found] == [one["type"] for one in data(found)]
    whole: Any = MessagesForm("j", "m", AUTO).whole(ended, ())
    counts: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0}
    begun = whole | {"content": [], "stop_reason": None, "stop_sequence": None, "usage": counts}
    assert first == {"type": "message_start", "message": begun}
    blocks: list[Any] = []
    is_open = False
    for event in middle:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(blocks))
            blocks.append(dict(event["content_block"], json=""))
            is_open = True
            continue
        assert (is_open, event["index"]) == (True, len(blocks) - 1)
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        delta = event["delta"]
        name = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}[delta["type"]]
        blocks[-1]["json" if name == "partial_json" else name] += delta[name]
    assert not is_open
    for block in blocks:
        written = block.pop("json")
        block |= {"input": json.loads(written or "{}")} if block["type"] == "tool_use" else {}
    assert blocks == whole["content"]
    called = any(block["type"] == "tool_use" for block in blocks)
    said = {"length": "max_tokens", "context": "model_context_window_exceeded"}.get(
        reason, "tool_use" if called else "end_turn"
    )
    counts = {"input_tokens": 3, "cache_read_input_tokens": 2, "output_tokens": 3}
    assert ending == {
        "type": "message_delta", "delta": {"stop_reason": said, "stop_sequence": None}, "usage": counts
    }  # fmt: skip
    assert last == {"type": "message_stop"}
    assert (whole["stop_reason"], whole["stop_sequence"], whole["usage"]) == (said, None, counts)


def test_a_message_says_which_text_ended_it() -> None:
    whole: Any = MessagesForm("j", "m", Choice()).whole(result("a", "stop_string", "END"), ())
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "END")
    other: Any = MessagesForm("j", "m", Choice()).whole(result("a", "stop", "END"), ())
    assert (other["stop_reason"], other["stop_sequence"]) == ("end_turn", None)


@settings(max_examples=80)
@given(text=st.sampled_from(TEXTS), cuts=CUTS, reason=REASONS)
def test_the_items_of_a_response_add_up_to_the_whole(text: str, cuts: list[int], reason: Any) -> None:
    made, ended = tokens(text, cuts, reason), result(text, reason)
    found = events(ResponsesForm("j", "m", AUTO, []), made, ended)
    said = data(found)
    assert [event.name for event in found] == [one["type"] for one in said]
    assert [one["sequence_number"] for one in said] == list(range(len(said)))
    whole: Any = ResponsesForm("j", "m", AUTO, []).whole(ended, ())
    cut = reason in ("length", "context")
    assert whole["status"] == ("incomplete" if cut else "completed")
    assert whole["incomplete_details"] == ({"reason": "max_output_tokens"} if cut else None)
    assert whole["usage"] == RESPONSES_USAGE
    begun = [one["type"].removeprefix("response.") for one in said[:2]]
    assert begun == ["created", "in_progress"]
    for one in said[:2]:
        assert (one["response"]["status"], one["response"]["output"]) == ("in_progress", [])
    assert said[-1]["type"] == f"response.{whole['status']}"
    assert {**said[-1]["response"], "created_at": 0} == {**whole, "created_at": 0}
    items = [_item([one for one in said if one.get("output_index") == at]) for at in range(len(whole["output"]))]
    assert items == whole["output"]
    assert [item["status"] for item in items[:-1]] == ["completed"] * (len(items) - 1)
    assert {one["output_index"] for one in said if "output_index" in one} == set(range(len(items)))


def _item(said: list[Any]) -> Any:
    """One item of a stream, whose events have to come in their order: what it is in the end."""
    kinds = [one["type"].removeprefix("response.") for one in said]
    added, done = said[0]["item"], said[-1]["item"]
    assert (kinds[0], kinds[-1], added["status"]) == ("output_item.added", "output_item.done", "in_progress")
    assert all(one["item_id"] == done["id"] for one in said[1:-1])
    deltas = "".join(one["delta"] for one in said if one["type"].endswith(".delta"))
    if done["type"] == "function_call":
        assert set(kinds[1:-2]) <= {"function_call_arguments.delta"}
        assert kinds[-2] == "function_call_arguments.done"
        assert (added["arguments"], deltas, said[-2]["arguments"]) == ("", done["arguments"], done["arguments"])
        return done
    name = "reasoning_text" if done["type"] == "reasoning" else "output_text"
    middle = set(kinds[2:-3])
    assert middle <= {f"{name}.delta"}
    assert (kinds[1], kinds[-3:-1]) == ("content_part.added", [f"{name}.done", "content_part.done"])
    assert (added["content"], said[1]["part"]["text"]) == ([], "")
    assert (said[-2]["part"], deltas, said[-3]["text"]) == (
        done["content"][0],
        done["content"][0]["text"],
        done["content"][0]["text"],
    )
    return done


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: CompletionForm("j", "m", False, False), {"error": {"type": "server_error"}}),
        (lambda: ChatForm("j", "m", AUTO, False, False, "auto"), {"error": {"type": "server_error"}}),
        (lambda: MessagesForm("j", "m", AUTO), {"type": "error", "error": {"type": "api_error"}, "request_id": "j"}),
        (lambda: ResponsesForm("j", "m", AUTO, []), {"type": "error", "code": "job_failed", "sequence_number": 2}),
    ],
)
def test_an_error_behind_the_first_token_is_an_event_in_the_vendors_form(
    make: Callable[[], Any], shown: dict[str, Any]
) -> None:
    form = make()
    list(form.first())
    (event,) = form.failed(Refused(500, "it fell over.", code="job_failed"))
    assert "it fell over." in event.encode().decode()
    for name, value in shown.items():
        got = event.data[name]
        assert (got if not isinstance(value, dict) else {each: got[each] for each in value}) == value
    assert event.name == ("error" if shown.get("type") == "error" else None)


def test_a_stream_that_goes_on_elsewhere_has_the_same_numbers_and_blocks() -> None:
    """Another gateway sees every token, and sends those alone that the client lacks."""
    made, ended = tokens("<think>hm</think>Hello you", [7, 12, 20, 23]), result("<think>hm</think>Hello you")
    for make in (lambda: ResponsesForm("j", "m", AUTO, []), lambda: MessagesForm("j", "m", AUTO)):
        whole = data(events(make(), made, ended))
        form: Any = make()
        rest = data([*(event for token in made for event in form.token(token)), *form.last(ended)])
        assert [_timeless(one) for one in rest] == [_timeless(one) for one in whole[len(whole) - len(rest) :]]


def _timeless(one: Any) -> Any:
    return {**one, "response": {**one["response"], "created_at": 0}} if "response" in one else one

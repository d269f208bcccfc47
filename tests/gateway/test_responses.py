"""`/v1/responses`, asked by OpenAI's own package."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ToolChoiceFunction

from stoker import errors
from stoker.contract.requests import MAX_ENTRIES
from stoker.gateway.app import Gateway
from stoker.gateway.responses import ResponsesBody
from stoker.testing import AsyncFakeClient
from tests.gateway.conftest import CHAT
from tests.gateway.machinery import Served

TEXT = "It was a dark night."
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
NAMED: Any = {"type": "function", "name": "weather"}


def ask(api: openai.OpenAI, **fields: Any) -> Response:
    made = api.responses.create(**{"model": CHAT, "input": "Hello", **fields})
    assert isinstance(made, Response)
    return made


def test_an_answer_has_its_text_its_counts_and_why_it_ended(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate(TEXT)
    answer = ask(api)
    assert (answer.output_text, answer.status, answer.id) == (TEXT, "completed", f"resp_{fake.sent.jobs[0].job_id}")
    assert answer.usage is not None
    assert answer.usage.output_tokens == answer.usage.total_tokens == 5
    fake.script.generate(TEXT)
    cut = ask(api, max_output_tokens=2)
    assert (cut.output_text, cut.status) == ("It was", "incomplete")
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_of_an_answer_that_was_cut_the_last_item_alone_is_incomplete(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("<think>Hm.</think>It was a dark night.", finish_reason="length")
    answer = ask(api)
    shown = [(item.type, item.status) for item in answer.output if item.type in ("reasoning", "message")]
    assert shown == [("reasoning", "completed"), ("message", "incomplete")]


def test_without_a_limit_an_answer_takes_what_the_model_can_and_a_stream_can_hold() -> None:
    body = ResponsesBody.model_validate({"model": CHAT, "input": "Hello"})
    assert [body.options(most)["max_tokens"] for most in (7, MAX_ENTRIES, 10**9)] == [7, MAX_ENTRIES, MAX_ENTRIES]


def test_what_is_asked_for_is_what_the_job_is(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("{}")
    conversation: Any = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"town": "Bonn"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "message", "id": "m1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Rain.", "annotations": []}]},
        {"role": "user", "content": "Thanks."},
    ]  # fmt: skip
    ask(
        api, input=conversation, instructions="You know.", temperature=0.5, top_p=0.9, max_output_tokens=9, user="team",
        service_tier="flex", store=False, tools=[WEATHER], tool_choice="none",
        text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    )  # fmt: skip
    (sent,) = fake.sent.generate
    assert [message.model_dump(exclude_none=True) for message in sent.messages or ()] == [
        {"role": "system", "content": "You know."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": (
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}},)},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "assistant", "content": "Rain."},
        {"role": "user", "content": "Thanks."},
    ]  # fmt: skip
    assert (sent.temperature, sent.top_p, sent.max_tokens, sent.priority) == (0.5, 0.9, 9, 8)
    assert (sent.json_schema, fake.sent.jobs[0].client) == ({"type": "object"}, "team")
    assert sent.tools is not None
    assert sent.tools[0]["function"]["name"] == "weather"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_repeats_what_was_asked_for(api: openai.OpenAI, fake: AsyncFakeClient, stream: bool) -> None:
    fake.script.generate('{"town": "Bonn"}')
    made = api.responses.create(
        model=CHAT, input="Weather?", instructions="You know.", temperature=0.5, top_p=0.9, max_output_tokens=40,
        tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, stream=stream,
    )  # fmt: skip
    said = [made] if isinstance(made, Response) else [e.response for e in made if hasattr(e, "response")]
    assert len(said) == (3 if stream else 1)
    for answer in said:
        found = (answer.instructions, answer.temperature, answer.top_p, answer.max_output_tokens)
        assert found == ("You know.", 0.5, 0.9, 40)
        assert isinstance(answer.tool_choice, ToolChoiceFunction)
        assert answer.tool_choice.name == "weather"


def test_a_call_without_arguments_comes_back_as_one_of_chats_does(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("Rain.")
    call: Any = {"type": "function_call", "call_id": "a", "name": "time", "arguments": ""}
    result: Any = {"type": "function_call_output", "call_id": "a", "output": "noon"}
    ask(api, input=[{"role": "user", "content": "Hello"}, call, result])
    (_, called, _) = fake.sent.generate[0].messages or ()
    assert called.tool_calls is not None
    assert called.tool_calls[0]["function"] == {"name": "time", "arguments": {}}


def test_an_answer_with_several_calls_that_comes_back_is_one_message_as_in_chats(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    fake.script.generate("Rain.", times=2)
    call: Any = {"type": "function_call", "name": "weather", "arguments": "{}"}
    results: list[Any] = [{"type": "function_call_output", "call_id": name, "output": name} for name in "ab"]
    said: list[Any] = [{"role": "assistant", "content": text} for text in ("I look.", " Here", " too.")]
    items = [said[0], {**call, "call_id": "a"}, said[1], said[2], {**call, "call_id": "b"}, *results, *said[:2]]
    ask(api, input=[{"role": "user", "content": "Hello"}, *items])
    calls: list[Any] = [
        {"id": name, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for name in "ab"
    ]
    api.chat.completions.create(
        model=CHAT,
        messages=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "I look. Here too.", "tool_calls": calls},
            *({"role": "tool", "tool_call_id": name, "content": name} for name in "ab"),  # type: ignore[list-item]
            *said[:2],
        ],
    )
    asked, chat = fake.sent.generate
    assert asked.messages == chat.messages


def test_an_answer_of_a_call_alone_has_an_empty_text_which_templates_write_as_any_other(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    fake.script.generate("Rain.")
    call: Any = {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"}
    result: Any = {"type": "function_call_output", "call_id": "a", "output": "rain"}
    ask(api, input=[{"role": "user", "content": "Hello"}, call, result])
    assert [message.content for message in fake.sent.generate[0].messages or ()] == ["Hello", "", "rain"]


def test_a_stream_has_the_same_text_in_pieces(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate(TEXT)
    with api.responses.stream(model=CHAT, input="Hello") as stream:
        found = list(stream)
        final = stream.get_final_response()
    assert "".join(event.delta for event in found if event.type == "response.output_text.delta") == TEXT
    assert (final.output_text, final.status) == (TEXT, "completed")
    assert [event.sequence_number for event in found] == list(range(len(found)))


@pytest.mark.parametrize(
    ("choice", "text"),
    [(NAMED, '{"town": "Bonn"}'), ("required", '{"name": "weather", "arguments": {"town": "Bonn"}}')],
)
def test_a_forced_function_is_called_under_its_schema(
    api: openai.OpenAI, fake: AsyncFakeClient, choice: Any, text: str
) -> None:
    fake.script.generate(text, times=2)
    whole = ask(api, tools=[WEATHER], tool_choice=choice)
    with api.responses.stream(model=CHAT, input="Hello", tools=[WEATHER], tool_choice=choice) as stream:
        streamed = stream.get_final_response()
    for made in (whole, streamed):
        (item,) = made.output
        assert item.type == "function_call"
        assert (item.name, json.loads(item.arguments)) == ("weather", {"town": "Bonn"})
    assert fake.sent.generate[0].json_schema is not None


def test_an_error_behind_the_first_token_is_an_event(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("a b", error=errors.JobFailed("the worker failed."))
    with api.responses.create(model=CHAT, input="Hello", stream=True) as stream:
        last = list(stream)[-1]
    assert last.type == "error"
    assert (last.message, last.code) == ("the worker failed.", "job_failed")


def test_a_broken_stream_goes_on_in_this_form_too(served: Served, fake: AsyncFakeClient) -> None:
    fake.script.generate(TEXT)
    body = {"model": CHAT, "input": "Hello", "stream": True}
    with httpx2.Client(base_url=served.url) as http:
        whole = http.post("/v1/responses", json=body).text.split("\n\n")
        cut = next(index for index, event in enumerate(whole) if '" was"' in event)
        name = next(line[4:] for line in whole[cut].splitlines() if line.startswith("id: "))
        served.over(Gateway(fake))
        rest = http.post("/v1/responses", json=body, headers={"last-event-id": name}).text.split("\n\n")
    assert [_data(event) for event in rest[:-1]] == [_data(event) for event in whole[cut + 1 : -1]]


def _data(event: str) -> Any:
    """Without the time at which the gateway was asked."""
    found = json.loads(next(line[6:] for line in event.splitlines() if line.startswith("data: ")))
    found.get("response", {}).pop("created_at", None)
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
    ({"input": [{"type": "web_search_call"}]}, "input.0.type"),
    ({"input": [{"type": "reasoning"}]}, "input.0"),
    ({"input": [{"type": "reasoning", "summary": "x"}]}, "input.0"),
    ({"input": [{"type": "reasoning", "content": [{"type": "output_text", "text": "x"}]}]}, "input.0"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input.0"),
    ({"input": [{"type": "function_call", "call_id": "x"}]}, "input.0"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"input": [{"type": "function_call", "call_id": "x", "name": "y", "arguments": "["}]}, "input.0"),
    ({"store": True}, "store"),
    ({"truncation": "auto"}, "truncation"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [WEATHER], "tool_choice": NAMED, "text": {"format": {"type": "json_object"}}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"n": 2}, "n"),
    *(({name: {"x": 1}}, name) for name in sorted(ResponsesBody.REFUSED)),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{name}-{at}" for at, (_, name) in enumerate(REFUSED)])
def test_what_cannot_be_done_is_refused_by_name(
    api: openai.OpenAI, fake: AsyncFakeClient, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/responses", body={"model": CHAT, "input": "Hello", **fields}, cast_to=object)
    assert caught.value.param == param
    assert not fake.sent.jobs

"""`/v1/messages`, asked by Anthropic's own package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from stoker import errors
from stoker.gateway.anthropic import MessagesBody
from stoker.gateway.app import Gateway
from stoker.testing import AsyncFakeClient
from tests.gateway.conftest import CHAT
from tests.gateway.machinery import Served

if TYPE_CHECKING:
    import anthropic

HELLO: Any = [{"role": "user", "content": "Hello"}]
TEXT = "It was a dark night."
WEATHER: Any = {
    "name": "weather",
    "description": "Of a town.",
    "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}


def ask(claude: anthropic.Anthropic, **fields: Any) -> anthropic.types.Message:
    import anthropic

    made = claude.messages.create(**{"model": CHAT, "messages": HELLO, "max_tokens": 64, **fields})
    assert isinstance(made, anthropic.types.Message)
    return made


def test_an_answer_has_its_text_its_counts_and_why_it_ended(claude: anthropic.Anthropic, fake: AsyncFakeClient) -> None:
    fake.script.generate(TEXT)
    answer = ask(claude)
    assert [block.text for block in answer.content if block.type == "text"] == [TEXT]
    assert (answer.stop_reason, answer.usage.output_tokens, answer.role) == ("end_turn", 5, "assistant")
    assert answer.id == f"msg_{fake.sent.jobs[0].job_id}"
    for reason, shown in (("length", "max_tokens"), ("context", "model_context_window_exceeded"),
                          ("stop_string", "stop_sequence"), ("stop_token", "end_turn")):  # fmt: skip
        fake.script.generate("a", finish_reason=reason)  # type: ignore[arg-type]
        assert ask(claude).stop_reason == shown


def test_the_package_knows_the_id_of_a_request_that_was_answered_and_of_one_that_was_not(
    claude: anthropic.Anthropic, fake: AsyncFakeClient
) -> None:
    import anthropic

    fake.script.generate(TEXT)
    assert ask(claude)._request_id == fake.sent.jobs[0].job_id  # noqa: SLF001  its public name, says the package
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask(claude, max_tokens=0)
    assert isinstance(refused.value.body, dict)
    assert refused.value.request_id == refused.value.body["request_id"]


def test_what_is_asked_for_is_what_the_job_is(claude: anthropic.Anthropic, fake: AsyncFakeClient) -> None:
    fake.script.generate("a")
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Weather "}, {"type": "text", "text": "there?"}]},
        {"role": "assistant", "content": [
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"town": "Bonn"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "tool_result", "tool_use_id": "t2", "content": "no such town", "is_error": True},
            {"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    ask(
        claude, messages=messages, system="Be kind.", stop_sequences=["x"],
        metadata={"user_id": "team-1"}, tools=[WEATHER], tool_choice={"type": "none"},
        extra_body={"seed": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3},
    )  # fmt: skip
    (sent,) = fake.sent.generate
    assert [message.model_dump(exclude_none=True) for message in sent.messages or ()] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather there?"},
        {"role": "assistant", "content": "I look.", "tool_calls": (
            {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}},)},
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no such town"},
        {"role": "user", "content": "So?"},
    ]  # fmt: skip
    assert (sent.stop, sent.temperature, sent.top_p, sent.top_k, sent.max_tokens, sent.seed) == (
        ("x",), 0.5, 0.9, 3, 64, 7,
    )  # fmt: skip
    assert sent.tools is not None
    assert sent.tools[0]["function"]["parameters"] == WEATHER["input_schema"]
    assert fake.sent.jobs[0].client == "team-1"


def test_a_stream_has_the_same_text_in_pieces(claude: anthropic.Anthropic, fake: AsyncFakeClient) -> None:
    fake.script.generate(TEXT)
    with claude.messages.stream(model=CHAT, messages=HELLO, max_tokens=64) as stream:
        assert list(stream.text_stream) == ["It", " was", " a", " dark", " night."]
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 5)
    assert [block.text for block in final.content if block.type == "text"] == [TEXT]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"type": "tool", "name": "weather"}, '{"town": "Bonn"}'),
        ({"type": "any"}, '{"name": "weather", "arguments": {"town": "Bonn"}}'),
    ],
)
def test_a_forced_tool_is_called_under_its_schema(
    claude: anthropic.Anthropic, fake: AsyncFakeClient, choice: Any, text: str
) -> None:
    fake.script.generate(text, times=2)
    whole = ask(claude, tools=[WEATHER], tool_choice=choice)
    with claude.messages.stream(
        model=CHAT, messages=HELLO, max_tokens=64, tools=[WEATHER], tool_choice=choice
    ) as stream:
        streamed = stream.get_final_message()
    for made in (whole, streamed):
        (block,) = made.content
        assert block.type == "tool_use"
        assert (block.name, block.input, made.stop_reason) == ("weather", {"town": "Bonn"}, "tool_use")
    assert fake.sent.generate[0].json_schema is not None


def test_a_call_that_is_cut_off_is_a_text(claude: anthropic.Anthropic, fake: AsyncFakeClient) -> None:
    fake.script.generate('{"name": "wea', finish_reason="length", times=2)
    whole = ask(claude, tools=[WEATHER], tool_choice={"type": "any"})
    with claude.messages.stream(
        model=CHAT, messages=HELLO, max_tokens=64, tools=[WEATHER], tool_choice={"type": "any"}
    ) as stream:
        streamed = stream.get_final_message()
    for made in (whole, streamed):
        assert [(block.type, made.stop_reason) for block in made.content] == [("text", "max_tokens")]


def test_errors_have_anthropics_form_before_and_behind_the_first_token(
    claude: anthropic.Anthropic, fake: AsyncFakeClient
) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="of the models warm now"):
        ask(claude, model="other")
    fake.script.refuse(errors.QueueFull("full.", wait=3.0))
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(claude)
    assert caught.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    fake.script.generate("a b", error=errors.JobFailed("the worker failed."))
    stream = claude.messages.create(model=CHAT, messages=HELLO, max_tokens=64, stream=True)
    with stream, pytest.raises(anthropic.APIStatusError, match="the worker failed"):
        list(stream)


def test_a_broken_stream_goes_on_in_this_form_too(served: Served, fake: AsyncFakeClient) -> None:
    fake.script.generate(TEXT)
    body = {"model": CHAT, "messages": HELLO, "max_tokens": 64, "stream": True}
    with httpx2.Client(base_url=served.url) as http:
        whole = http.post("/v1/messages", json=body).text.split("\n\n")
        cut = next(index for index, event in enumerate(whole) if " was" in event)
        name = next(line[4:] for line in whole[cut].splitlines() if line.startswith("id: "))
        served.over(Gateway(fake))
        rest = http.post("/v1/messages", json=body, headers={"last-event-id": name}).text.split("\n\n")
    assert rest == whole[cut + 1 :]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages.0.content.0.type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "x"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "id": "y"}]}]}, "messages.0.content.0"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER, WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
    ({"top_k": -1}, "top_k"),
    ({"metadata": {"user_id": "a" * 513}}, "metadata.user_id"),
    ({"n": 2}, "n"),
    *(({name: {}}, name) for name in sorted(MessagesBody.REFUSED)),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{name}-{at}" for at, (_, name) in enumerate(REFUSED)])
def test_what_cannot_be_done_is_refused_by_name(
    claude: anthropic.Anthropic, fake: AsyncFakeClient, fields: dict[str, Any], param: str
) -> None:
    import anthropic

    body = {"model": CHAT, "messages": HELLO, "max_tokens": 64, **fields}
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.post("/v1/messages", body=body, cast_to=anthropic.types.Message)
    error: Any = caught.value.body
    assert error["error"]["message"].startswith(f"{param}: ")
    assert error["error"]["type"] == "invalid_request_error"
    assert not fake.sent.jobs

"""`/v1/chat/completions`, asked by OpenAI's own package."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageToolCallUnion
from pydantic import BaseModel

from stoker.broker import keys
from stoker.contract import Alternative, ModelCard, StreamToken
from stoker.gateway.calls import Models
from stoker.gateway.chat import ChatBody
from stoker.testing import AsyncFakeClient
from tests.gateway.conftest import CHAT

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def ask(api: openai.OpenAI, **fields: Any) -> ChatCompletion:
    made = api.chat.completions.create(**{"model": CHAT, "messages": HELLO, **fields})
    assert isinstance(made, ChatCompletion)
    return made


def called(calls: Sequence[ChatCompletionMessageToolCallUnion] | None) -> list[tuple[str, Any]]:
    """The functions that were called, with their arguments."""
    functions = [call.function for call in calls or () if call.type == "function"]
    return [(function.name, json.loads(function.arguments)) for function in functions]


def test_an_answer_has_its_text_its_counts_and_the_jobs_id(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("It was a dark night.")
    answer = ask(api)
    assert answer.choices[0].message.content == "It was a dark night."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == answer.usage.total_tokens == 5
    assert answer.id == f"chatcmpl-{fake.sent.jobs[0].job_id}"


def test_what_is_asked_for_is_what_the_job_is(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("a b c d")
    ask(
        api, model=f"{CHAT}:house-style@1", n=2, temperature=0.5, top_p=0.9, stop=["x", "y"], seed=7, user="team-1",
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"3": 2}, max_completion_tokens=9,
        service_tier="flex", response_format={"type": "json_object"},
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [5], "deadline": 60,
                    "chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    (sent,) = fake.sent.generate
    asked = sent.model_dump(exclude_defaults=True)
    assert asked.pop("messages") == ({"role": "user", "content": "Hello"},)
    assert asked == {
        "model": CHAT, "adapter": "house-style@1", "n": 2, "temperature": 0.5, "top_p": 0.9, "stop": ("x", "y"),
        "seed": 7, "presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {3: 2.0}, "max_tokens": 9,
        "priority": 8, "json_schema": {"type": "object"}, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1,
        "stop_token_ids": (5,), "deadline": 60.0, "template": {"enable_thinking": False},
    }  # fmt: skip
    assert fake.sent.jobs[0].client == "team-1"


def test_without_a_limit_an_answer_may_fill_the_models_context_as_far_as_a_job_may_have_tokens(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    fake.script.generate("a", times=None)
    ask(api)
    ask(api, n=16, logprobs=True, top_logprobs=20)
    # OpenAI draws where nothing is said; Stoker's own default is greedy.
    assert [request.temperature for request in fake.sent.generate] == [1.0, 1.0]
    assert fake.sent.generate[0].max_tokens == 2048
    assert fake.sent.generate[1].max_tokens == 2048


def test_what_all_completions_of_a_job_may_have_together_is_shared_by_them(
    api: openai.OpenAI, fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker.gateway.chat.MAX_ENTRIES", 4 * 3 * 100 + 11)
    fake.script.generate("a")
    ask(api, n=4, logprobs=True, top_logprobs=2)
    assert fake.sent.generate[0].max_tokens == 100


def test_what_workers_say_of_their_models_is_asked_again_once_it_may_have_changed(
    fake: AsyncFakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = 1000.0, 0

    async def models() -> dict[str, ModelCard]:
        nonlocal asked
        asked += 1
        return {"m": ModelCard(model="m", architecture="a", kinds=("generate",), context=100 * asked, parameters=1)}

    monkeypatch.setattr("stoker.gateway.calls.time.monotonic", lambda: now)
    monkeypatch.setattr(fake, "models", models)
    known = Models(fake)
    said = [asyncio.run(known.most_tokens("m")) for _ in range(2)]
    now += keys.PRESENCE_EVERY
    said += [asyncio.run(known.most_tokens("m"))]
    assert said == [100, 100, 200]


def test_a_stream_has_the_same_text_in_pieces_and_its_counts_if_they_are_asked_for(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    fake.script.generate("It was a dark night.", times=None)
    with api.chat.completions.create(
        model=CHAT, messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    texts = {0: "", 1: ""}
    reasons = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert texts == {0: "It was a dark night.", 1: "It was a dark night."}
    assert reasons == {0: "stop", 1: "stop"}
    assert [chunk.choices[0].delta.role for chunk in chunks[:1]] == ["assistant"]
    assert chunks[-1].usage is not None
    assert all("usage" in chunk.model_fields_set for chunk in chunks), "null before, as OpenAI says it"
    assert chunks[-1].usage.completion_tokens == 10
    assert not chunks[-1].choices
    assert all(chunk.usage is None for chunk in chunks[:-1])
    with api.chat.completions.create(model=CHAT, messages=HELLO, stream=True) as stream:
        assert all(chunk.choices for chunk in stream)


@pytest.mark.parametrize("streamed", [False, True])
def test_log_probabilities_come_with_their_alternatives(
    api: openai.OpenAI, fake: AsyncFakeClient, streamed: bool
) -> None:
    other = Alternative(token_id=9, text="né", logprob=-2.5)
    common: dict[str, Any] = {"logit": 1.0, "probability": 0.5, "alternatives": (other,)}
    tokens = [
        StreamToken(index=0, token_id=1, text="A", logprob=-0.5, **common),
        StreamToken(index=1, token_id=2, text="", logprob=-0.25, finish_reason="stop", is_eos=True, **common),
    ]
    fake.script.generate(tokens)
    if streamed:
        with api.chat.completions.create(
            model=CHAT, messages=HELLO, logprobs=True, top_logprobs=1, stream=True
        ) as stream:
            parts = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
        content = [token for part in parts for token in part.content or []]
    else:
        made = ask(api, logprobs=True, top_logprobs=1).choices[0].logprobs
        assert made is not None
        content = made.content or []
    assert [(token.token, token.logprob) for token in content] == [("A", -0.5), ("", -0.25)]
    assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [("né", -2.5, [110, 195, 169])]


def test_a_conversation_reaches_the_template_whole(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("Yes.")
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bonn"}'}}
    messages: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Weather?", "name": "ada"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    ask(api, messages=messages, tools=[WEATHER], tool_choice="none")
    sent = fake.sent.generate[0]
    assert [message.model_dump(exclude_none=True) for message in sent.messages or ()] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?", "name": "ada"},
        {"role": "assistant", "content": "", "tool_calls": (
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}},)},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]  # fmt: skip
    assert sent.tools == (WEATHER,)
    assert sent.json_schema is None


class Town(BaseModel):
    town: str


@pytest.mark.parametrize("asked", [{"response_format": Town}, {"tools": [openai.pydantic_function_tool(Town)]}])
def test_an_answer_that_the_package_has_parsed_may_come_back_as_it_is(
    api: openai.OpenAI, fake: AsyncFakeClient, asked: Any
) -> None:
    """Its own helper adds fields to what it was answered, and sends them with the message, as its dump has them."""
    choice: Any = {"type": "function", "function": {"name": "Town"}} if "tools" in asked else openai.omit
    fake.script.generate('{"town": "Bonn"}', times=None)
    answer = api.chat.completions.parse(model=CHAT, messages=HELLO, tool_choice=choice, **asked).choices[0].message
    added: Any = {"parsed": True, "tool_calls": {"__all__": {"function": {"parsed_arguments"}}}}
    plain: Any = answer.model_dump(exclude=added)
    whole: Any = answer.model_dump(warnings=False)
    for message in (whole, plain):
        ask(api, messages=[*HELLO, message])
    _, parsed, again = fake.sent.generate
    assert parsed.messages == again.messages


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"type": "function", "function": {"name": "weather"}}, '{"town": "Bonn"}'),
        ("required", '{"name": "weather", "arguments": {"town": "Bonn"}}'),
    ],
)
def test_a_forced_call_is_written_under_a_schema_and_comes_as_a_call(
    api: openai.OpenAI, fake: AsyncFakeClient, choice: Any, text: str
) -> None:
    fake.script.generate(text, times=2)
    whole = ask(api, tools=[WEATHER], tool_choice=choice).choices[0]
    assert called(whole.message.tool_calls) == [("weather", {"town": "Bonn"})]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    schema = fake.sent.generate[0].json_schema
    assert schema is not None
    wanted = WEATHER["function"]["parameters"]
    assert schema == wanted or schema["anyOf"][0]["properties"]["arguments"] == wanted
    assert schema == wanted or schema["anyOf"][0]["additionalProperties"] is False, "and nothing else"

    with api.chat.completions.stream(model=CHAT, messages=HELLO, tools=[WEATHER], tool_choice=choice) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert called(streamed.message.tool_calls) == [("weather", {"town": "Bonn"})]
    assert streamed.finish_reason == "tool_calls"


def test_a_forced_call_that_is_cut_off_is_no_call(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate('{"name": "weather", "arg uments', finish_reason="length")
    whole = ask(api, tools=[WEATHER], tool_choice="required").choices[0]
    assert (whole.finish_reason, whole.message.tool_calls) == ("length", None)


def test_a_schema_is_the_jobs(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate("{}")
    schema = {"type": "object", "properties": {"a": {"enum": [None, 1]}}}
    ask(api, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert fake.sent.generate[0].json_schema == schema


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "required", "regex": "a"}, "tool_choice"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [WEATHER, WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tools"),
    ({"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": 11}, "temperature"),
    ({"n": 17}, "n"),
    ({"n": True}, "n"),
    ({"seed": -1}, "seed"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 1000}}, "logit_bias.1"),
    ({"user": "a" * 513}, "user"),
    ({"service_tier": "scale"}, "service_tier"),
    ({"priority": 10}, "priority"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "ghost", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages.0.audio"),
    ({"chat_template_kwargs": {"a": {"b": float(10)}, "deep": [[[[]]]]}, "model": None}, "model"),
    ({"mesages": []}, "mesages"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param"), REFUSED, ids=[f"{param}-{index}" for index, (_, param) in enumerate(REFUSED)]
)
def test_what_cannot_be_done_is_refused_by_name(
    api: openai.OpenAI, fake: AsyncFakeClient, fields: dict[str, Any], param: str
) -> None:
    body = {"model": CHAT, "messages": HELLO, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        api.post("/chat/completions", body=body, cast_to=ChatCompletion)
    assert caught.value.param == param
    assert str(caught.value.body["message"]).startswith(param)  # type: ignore[index]
    assert not fake.sent.jobs


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stop": [""]}, 'stop.0: "" given; expected at least 1 character.'),
        ({"regex": ""}, 'regex: "" given; expected at least 1 character.'),
        ({"model": f"{CHAT}:A b"}, 'model: "A b" given; expected NAME or NAME@VERSION'),
        ({"model": "none", "stop": [""]}, "model 'none' given; of the models warm now"),
    ],
)
def test_what_only_the_job_finds_wrong_is_shown_as_json_spells_it(
    api: openai.OpenAI, fake: AsyncFakeClient, fields: dict[str, Any], said: str
) -> None:
    body = {"model": CHAT, "messages": HELLO, **fields}
    with pytest.raises(openai.APIStatusError) as caught:
        api.post("/chat/completions", body=body, cast_to=ChatCompletion)
    assert str(caught.value.body["message"]).startswith(said)  # type: ignore[index]
    assert not fake.sent.jobs


@pytest.mark.parametrize("name", sorted(ChatBody.REFUSED))
def test_a_field_that_stoker_does_not_have_is_refused_and_null_is_no_value(
    api: openai.OpenAI, fake: AsyncFakeClient, name: str
) -> None:
    with pytest.raises(openai.BadRequestError, match="not supported by Stoker") as caught:
        ask(api, extra_body={name: "x"})
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")
    fake.script.generate("Yes.")
    ask(api, extra_body={name: None})

"""Calls that the model makes by itself (`tool_choice: auto`), over HTTP, asked by the vendors' own packages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest

from stoker.contract import StreamToken
from stoker.gateway.app import Gateway
from stoker.testing import AsyncFakeClient
from tests.gateway.conftest import CHAT
from tests.gateway.machinery import Served
from tests.gateway.test_anthropic import WEATHER as CLAUDES
from tests.gateway.test_chat import HELLO, WEATHER, ask, called
from tests.gateway.test_responses import WEATHER as NEWER

if TYPE_CHECKING:
    import anthropic

CALL = '{"name": "weather", "arguments": {"town": "Bonn"}}'
FORMS = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "llama": '{"name": "weather", "parameters": {"town": "Bonn"}}',
    "mistral": f"[TOOL_CALLS][{CALL}]",
    "mistral 2025": '[TOOL_CALLS]weather[ARGS]{"town": "Bonn"}',
    "qwen3-coder": "<tool_call>\n<function=weather>\n<parameter=town>\nBonn\n</parameter>\n</function>\n</tool_call>",
}
TWO = f"I look.\n{FORMS['hermes']}\n{FORMS['hermes'].replace('Bonn', 'Köln')}"
BROKEN = '<tool_call>{"name": "weather", "arguments": {"town": }}</tool_call>'
BONN, COLOGNE = ("weather", {"town": "Bonn"}), ("weather", {"town": "Köln"})


def letters(text: str, finish_reason: Any = "stop") -> list[StreamToken]:
    """Every marker is split as far as it can be."""
    last = len(text) - 1
    common: dict[str, Any] = {"token_id": 1, "logit": 0.0, "logprob": -0.5, "probability": 1.0}
    return [
        StreamToken(index=at, text=letter, finish_reason=finish_reason if at == last else None, **common)
        for at, letter in enumerate(text)
    ]


def chats(api: openai.OpenAI, fake: AsyncFakeClient, text: str, reason: Any = "stop", **fields: Any) -> list[Any]:
    """The choice of the same answer, whole and from a stream."""
    fake.script.generate(letters(text, reason), times=2)
    whole = ask(api, tools=[WEATHER], **fields).choices[0]
    with api.chat.completions.stream(model=CHAT, messages=HELLO, tools=[WEATHER], **fields) as stream:
        try:
            return [whole, stream.get_final_completion().choices[0]]
        except openai.LengthFinishReasonError as cut:
            return [whole, cut.completion.choices[0]]


def blocks(message: Any) -> list[tuple[Any, ...]]:
    """What the parts of an answer of Anthropic's say."""
    return [
        ("text", block.text) if block.type == "text" else (block.type, block.name, block.input)
        for block in message.content
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_call_in_the_form_of_any_family_is_a_call(api: openai.OpenAI, fake: AsyncFakeClient, form: str) -> None:
    for choice in chats(api, fake, FORMS[form], tool_choice="auto"):
        assert called(choice.message.tool_calls) == [BONN]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert fake.sent.generate[0].json_schema is None
    assert fake.sent.generate[0].tools == (WEATHER,)


def test_a_value_of_a_call_without_json_is_a_text_where_the_function_takes_one(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    for choice in chats(api, fake, FORMS["qwen3-coder"].replace("Bonn", "53113"), tool_choice="auto"):
        assert called(choice.message.tool_calls) == [("weather", {"town": "53113"})]


def test_several_calls_come_with_the_text_before_them_and_ids_of_their_own(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    for choice in chats(api, fake, TWO):
        assert called(choice.message.tool_calls) == [BONN, COLOGNE]
        assert choice.message.content == "I look.\n"
        ids = [call.id for call in choice.message.tool_calls]
        assert len(set(ids)) == 2
        assert all(len(name) == 9 and name.isalnum() for name in ids), "Mistral's templates take no others"


def test_without_parallel_calls_the_first_one_alone_is_made(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    for choice in chats(api, fake, TWO, parallel_tool_calls=False):
        assert called(choice.message.tool_calls) == [BONN]


@pytest.mark.parametrize("text", ["It rains.", BROKEN, CALL.replace("weather", "other"), "<tool_call"])
def test_an_answer_without_a_call_that_can_be_made_is_its_text(
    api: openai.OpenAI, fake: AsyncFakeClient, text: str
) -> None:
    for choice in chats(api, fake, text):
        assert (choice.message.content, choice.message.tool_calls) == (text, None)
        assert choice.finish_reason == "stop"


def test_an_answer_that_is_cut_off_in_a_call_is_its_text(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    for text, choice in ((FORMS["hermes"][:40], "auto"), (CALL[:30], "required")):
        for made in chats(api, fake, text, "length", tool_choice=choice):
            assert (made.message.content, made.message.tool_calls, made.finish_reason) == (text, None, "length")


def test_an_answer_that_is_cut_off_behind_a_call_was_cut_off(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    for made in chats(api, fake, f"{FORMS['hermes']}\n", "length"):
        assert (called(made.message.tool_calls), made.finish_reason) == ([BONN], "length")


@pytest.mark.parametrize("form", ["hermes", "mistral 2025"])
def test_an_answer_that_is_cut_off_in_its_second_call_makes_the_first(
    api: openai.OpenAI, fake: AsyncFakeClient, form: str
) -> None:
    rest = FORMS[form][:-25]
    for made in chats(api, fake, FORMS[form] + rest, "length"):
        assert (called(made.message.tool_calls), made.finish_reason) == ([BONN], "length")
        assert made.message.content == rest


def test_each_completion_has_calls_and_log_probabilities_of_its_own(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate(FORMS["hermes"], times=2)
    whole = ask(api, tools=[WEATHER], n=2, logprobs=True)
    assert [called(choice.message.tool_calls) for choice in whole.choices] == [[BONN]] * 2
    stream = api.chat.completions.create(
        model=CHAT, messages=HELLO, tools=[WEATHER], n=2, logprobs=True, stream=True,
    )  # fmt: skip
    with stream:
        choices = [choice for chunk in stream for choice in chunk.choices]
    begun = [call for choice in choices for call in choice.delta.tool_calls or () if call.id]
    assert len({call.id for call in begun}) == 2
    assert {choice.finish_reason for choice in choices} == {None, "tool_calls"}
    for index, choice in enumerate(whole.choices):
        said = [token for one in choices if one.index == index and one.logprobs for token in one.logprobs.content or ()]
        assert choice.logprobs is not None
        assert said == choice.logprobs.content


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_a_stream_that_broke_in_a_call_goes_on_with_the_rest_of_it(
    served: Served, fake: AsyncFakeClient, path: str
) -> None:
    fake.script.generate(letters(TWO))
    fields: dict[str, Any] = {
        "chat/completions": {"messages": HELLO, "tools": [WEATHER]},
        "responses": {"input": "Hello", "tools": [NEWER]},
        "messages": {"messages": HELLO, "tools": [CLAUDES], "max_tokens": 500},
    }[path]
    with httpx2.Client(base_url=served.url) as http:
        body = {"model": CHAT, "stream": True, **fields}
        whole = http.post(f"/v1/{path}", json=body).text.split("\n\n")
        cut = next(at for at, event in enumerate(whole) if "id: " in event and "Bonn" in event)
        name = next(line[4:] for line in whole[cut].splitlines() if line.startswith("id: "))
        served.over(Gateway(fake))
        rest = http.post(f"/v1/{path}", json=body, headers={"last-event-id": name}).text.split("\n\n")
    # The last ones of /v1/responses say when the gateway was asked.
    assert [event for event in rest if '"created' not in event] == [
        event for event in whole[cut + 1 :] if '"created' not in event
    ]
    assert "Köln" in "".join(rest)


def test_anthropics_blocks_are_text_and_calls_in_their_order(
    claude: anthropic.Anthropic, fake: AsyncFakeClient
) -> None:
    fake.script.generate(letters(TWO), times=2)
    asked: Any = {"model": CHAT, "messages": HELLO, "max_tokens": 500, "tools": [CLAUDES]}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    said = [
        ("text", "I look.\n"), ("tool_use", "weather", BONN[1]), ("tool_use", "weather", COLOGNE[1])
    ]  # fmt: skip
    assert [blocks(made) for made in (whole, streamed)] == [said, said]
    assert [made.stop_reason for made in (whole, streamed)] == ["tool_use"] * 2
    assert len({block.id for block in whole.content if block.type == "tool_use"}) == 2


def test_anthropics_calls_are_one_where_no_more_are_wanted_and_what_is_broken_is_text(
    claude: anthropic.Anthropic, fake: AsyncFakeClient
) -> None:
    asked: Any = {"model": CHAT, "messages": HELLO, "max_tokens": 500, "tools": [CLAUDES]}
    fake.script.generate(letters(TWO))
    one = claude.messages.create(**asked, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in one.content] == ["text", "tool_use"]
    fake.script.generate(letters(BROKEN), times=2)
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for made in (whole, streamed):
        assert blocks(made) == [("text", BROKEN)]
        assert made.stop_reason == "end_turn"


def test_items_of_responses_are_messages_and_calls_in_their_order(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate(letters(f"{TWO} Done."), times=2)
    whole = api.responses.create(model=CHAT, input="Hello", tools=[NEWER])
    with api.responses.stream(model=CHAT, input="Hello", tools=[NEWER]) as stream:
        events = list(stream)
        streamed = stream.get_final_response()
    for made in (whole, streamed):
        assert [item.type for item in made.output] == ["message", "function_call", "function_call", "message"]
        arguments = [json.loads(item.arguments) for item in made.output if item.type == "function_call"]
        assert (made.output_text, arguments) == ("I look.\n Done.", [BONN[1], COLOGNE[1]])
    done: list[Any] = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in done] == [item.id for item in list[Any](streamed.output)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    fake.script.generate(letters(TWO))
    one = api.responses.create(model=CHAT, input="Hello", tools=[NEWER], parallel_tool_calls=False)
    assert [item.type for item in one.output] == ["message", "function_call"]
    assert not one.parallel_tool_calls


def test_a_conversation_goes_on_with_what_a_tool_said(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate(FORMS["hermes"])
    message = ask(api, tools=[WEATHER]).choices[0].message
    assert message.tool_calls is not None
    fake.script.generate("It rains.")
    said: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    answer = ask(api, messages=[*HELLO, message.model_dump(exclude_none=True), said], tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."


@pytest.mark.parametrize("fields", [{"regex": "a"}, {"response_format": {"type": "json_object"}}])
def test_an_answer_that_can_be_no_call_is_refused_together_with_tools(
    api: openai.OpenAI, fake: AsyncFakeClient, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_choice: auto lets functions be called") as caught:
        ask(api, tools=[WEATHER], extra_body=fields)
    assert caught.value.param == "tool_choice"
    fake.script.generate("a")
    assert ask(api, tools=[WEATHER], tool_choice="none", extra_body=fields).choices[0].message.content == "a"

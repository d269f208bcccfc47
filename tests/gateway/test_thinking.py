"""Reasoning of models that think before they answer, over HTTP, asked by the vendors' own packages."""

from __future__ import annotations

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
from tests.gateway.test_auto import BONN, FORMS, blocks
from tests.gateway.test_chat import HELLO, WEATHER, ask, called
from tests.gateway.test_responses import WEATHER as NEWER

if TYPE_CHECKING:
    import anthropic

ANSWER = f"<think>\nI look.\n</think>\n\nOne moment.\n{FORMS['hermes']}"
CUT = "<think>\nI wonder"


def letters(text: str, *, within: bool = False, completion: int = 0, reason: Any = "stop") -> list[StreamToken]:
    """Every marker is split as far as it can be. `within`: the prompt has the first one."""
    text = text.removeprefix("<think>") if within else text
    common: dict[str, Any] = {"token_id": 1, "logit": 0.0, "logprob": -0.5, "probability": 1.0}
    return [
        StreamToken(index=at, text=letter, completion=completion, in_reasoning=within and at == 0,
                    finish_reason=reason if at == len(text) - 1 else None, **common)
        for at, letter in enumerate(text)
    ]  # fmt: skip


def thought(message: Any) -> Any:
    """OpenAI's package hands on fields that it does not know."""
    return getattr(message, "reasoning_content", None)


@pytest.mark.parametrize("within", [False, True])
def test_a_chat_has_reasoning_text_and_calls_whole_and_streamed(
    api: openai.OpenAI, fake: AsyncFakeClient, within: bool
) -> None:
    fake.script.generate(letters(ANSWER, within=within), times=2)
    answer = ask(api, tools=[WEATHER])
    whole = answer.choices[0]
    assert (thought(whole.message), whole.message.content) == ("I look.", "One moment.\n")
    assert called(whole.message.tool_calls) == [BONN]
    assert whole.finish_reason == "tool_calls"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>\nI look.\n</think>") - 7 * within
    with api.chat.completions.create(model=CHAT, messages=HELLO, tools=[WEATHER], stream=True) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream]
    assert "".join(thought(delta) or "" for delta in deltas) == "I look."
    assert "".join(delta.content or "" for delta in deltas) == "One moment.\n"
    assert sum(bool(delta.tool_calls and delta.tool_calls[0].id) for delta in deltas) == 1
    assert sum(bool(thought(delta)) for delta in deltas) > 3, "reasoning streams as it comes"


def test_each_completion_has_its_own_reasoning(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    one, two = letters("<think>A</think>B", within=True), letters("<think>C", within=True, completion=1)
    made = [token.model_copy(update={"index": at}) for at, token in enumerate([*one, *two])]
    fake.script.generate(made, times=2)
    whole = [(thought(choice.message), choice.message.content) for choice in ask(api, n=2).choices]
    said = {0: ["", ""], 1: ["", ""]}
    with api.chat.completions.create(model=CHAT, messages=HELLO, n=2, stream=True) as stream:
        for choice in (choice for chunk in stream for choice in chunk.choices):
            said[choice.index][0] += thought(choice.delta) or ""
            said[choice.index][1] += choice.delta.content or ""
    assert whole == [("A", "B"), ("C", "")] == [tuple(said[0]), tuple(said[1])]


@pytest.mark.parametrize("within", [False, True])
def test_reasoning_is_an_item_of_a_response(api: openai.OpenAI, fake: AsyncFakeClient, within: bool) -> None:
    fake.script.generate(letters(ANSWER, within=within), times=2)
    whole = api.responses.create(model=CHAT, input="Hello", tools=[NEWER])
    with api.responses.stream(model=CHAT, input="Hello", tools=[NEWER]) as stream:
        events: list[Any] = list(stream)
        streamed = stream.get_final_response()
    for made in (whole, streamed):
        assert [item.type for item in made.output] == ["reasoning", "message", "function_call"]
        first: Any = made.output[0]
        assert [part.text for part in first.content] == ["I look."]
        assert (made.output_text, first.summary, first.status) == ("One moment.\n", [], "completed")
        assert made.usage is not None
        assert made.usage.output_tokens_details.reasoning_tokens > 8
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    (done,) = [event.text for event in events if event.type == "response.reasoning_text.done"]
    assert "".join(deltas) == done == "I look."
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.id for item in items] == [item.id for item in list[Any](streamed.output)]
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("within", [False, True])
def test_reasoning_is_a_thinking_block_of_anthropics(
    claude: anthropic.Anthropic, fake: AsyncFakeClient, within: bool
) -> None:
    fake.script.generate(letters(ANSWER, within=within), times=2)
    asked: Any = {"model": CHAT, "messages": HELLO, "max_tokens": 400, "tools": [CLAUDES]}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    for made in (whole, streamed):
        first: Any = made.content[0]
        assert (first.type, first.thinking) == ("thinking", "I look.")
        rest = made.model_copy(update={"content": made.content[1:]})
        assert blocks(rest) == [("text", "One moment.\n"), ("tool_use", *BONN)]
    assert kinds.count("thinking") > 3, "it streams as it comes"


def test_reasoning_that_is_cut_off_is_all_there_is(
    api: openai.OpenAI, claude: anthropic.Anthropic, fake: AsyncFakeClient
) -> None:
    fake.script.generate(letters(CUT, reason="length"), times=None)
    choice = ask(api).choices[0]
    assert (thought(choice.message), choice.message.content, choice.finish_reason) == ("I wonder", "", "length")
    response = api.responses.create(model=CHAT, input="Hello")
    assert ([item.type for item in response.output], response.status) == (["reasoning"], "incomplete")
    message = claude.messages.create(model=CHAT, messages=HELLO, max_tokens=64)
    assert [block.type for block in message.content] == ["thinking"]
    with claude.messages.stream(model=CHAT, messages=HELLO, max_tokens=64) as stream:
        assert stream.get_final_message().content == message.content


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
def test_a_stream_that_broke_in_its_reasoning_goes_on_with_the_rest_of_it(
    served: Served, fake: AsyncFakeClient, path: str
) -> None:
    fake.script.generate(letters(ANSWER, within=True))
    body: dict[str, Any] = {"model": CHAT, "stream": True}
    body |= {"input": "Hello"} if path == "responses" else {"messages": HELLO}
    body |= {"max_tokens": 400} if path == "messages" else {}
    with httpx2.Client(base_url=served.url, timeout=20) as http:
        whole = http.post(f"/v1/{path}", json=body).text.split("\n\n")
        cut = next(at for at, event in enumerate(whole) if '"oo' in event or '"o"' in event)
        name = next(line[4:] for line in whole[cut].splitlines() if line.startswith("id: "))
        served.over(Gateway(fake))
        rest = http.post(f"/v1/{path}", json=body, headers={"last-event-id": name}).text.split("\n\n")
    dropped = ('"created', "created_at")
    assert len(rest) == len(whole) - cut - 1
    for before, after in zip(whole[cut + 1 :], rest, strict=True):
        if not any(word in before for word in dropped):
            assert after == before


def test_what_a_model_thought_comes_back_to_its_template(
    api: openai.OpenAI, claude: anthropic.Anthropic, fake: AsyncFakeClient
) -> None:
    fake.script.generate(letters("<think>I look.</think>Rain."), times=None)
    more: Any = {"role": "user", "content": "Thanks."}
    message = ask(api).choices[0].message
    ask(api, messages=[*HELLO, message.model_dump(exclude_none=True), more])
    response = api.responses.create(model=CHAT, input="Hello")
    items: Any = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in response.output), more]
    api.responses.create(model=CHAT, input=items)
    said: Any = claude.messages.create(model=CHAT, messages=HELLO, max_tokens=64).content
    claude.messages.create(model=CHAT, messages=[*HELLO, {"role": "assistant", "content": said}, more], max_tokens=64)
    asked = [request for request in fake.sent.generate if len(request.messages or ()) == 3]
    assert len(asked) == 3
    for request in asked:
        assert request.messages is not None
        assert request.messages[1].model_dump(exclude_none=True) == {
            "role": "assistant", "content": "Rain.", "reasoning_content": "I look.",
        }  # fmt: skip


def test_items_of_reasoning_are_a_part_of_what_the_assistant_says_next(
    api: openai.OpenAI, fake: AsyncFakeClient
) -> None:
    fake.script.generate("Yes.")
    part: Any = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "I look."}]}
    call: Any = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    user: Any = {"role": "user", "content": "Hello"}
    api.responses.create(model=CHAT, input=[part, part, call, part, user, part])
    sent = [message.model_dump(exclude_none=True) for message in fake.sent.generate[0].messages or ()]
    thinking = {"role": "assistant", "content": "", "reasoning_content": "I look."}
    assert [message.get("reasoning_content") for message in sent] == ["I look.I look.", "I look.", None, "I look."]
    assert sent[0]["tool_calls"]
    assert [sent[1], sent[3]] == [thinking, thinking]


def test_a_completion_is_all_that_the_model_wrote(api: openai.OpenAI, fake: AsyncFakeClient) -> None:
    fake.script.generate(letters(ANSWER), times=2)
    assert api.completions.create(model=CHAT, prompt="Hello").choices[0].text == ANSWER
    with api.completions.create(model=CHAT, prompt="Hello", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == ANSWER

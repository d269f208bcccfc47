"""Whole answers are written as JSON, and others have their turn meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from stoker.contract import Completion, StreamToken
from stoker.contract.stream import Alternative
from stoker.gateway import logprobs
from stoker.gateway.answers import Form
from stoker.gateway.chat import ChatForm
from stoker.gateway.completions import CompletionForm
from stoker.gateway.tools import Choice
from stoker.gateway.writing import AT_ONCE, written
from tests.gateway.test_forms import result

COUNT = 20 * AT_ONCE
FORMS: dict[str, Callable[[], Form]] = {
    "_said": lambda: ChatForm("j", "m", Choice(), True, False, "default"),
    "_likeliest": lambda: CompletionForm("j", "m", True, False),
}


def tokens(completions: int) -> list[StreamToken]:
    """The tokens of each completion, in turns."""
    other = Alternative(token_id=2, text="other", logprob=-2.0)
    return [
        StreamToken(
            index=at, token_id=1, text=f"{at} ", logit=0, logprob=-1.0, probability=0.5, completion=at % completions,
            alternatives=(other,),
        )
        for at in range(COUNT)
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_with_many_alternatives_is_written_while_others_have_their_turn(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 32,768 tokens with twenty each takes seconds: every stream of the gateway stood still."""
    since, most, say = list[int](), list[int](), getattr(logprobs, name)

    def noted(token: StreamToken) -> Any:
        since.append(token.index)
        return say(token)

    async def others() -> None:
        while True:
            most.append(len(since))
            since.clear()
            await asyncio.sleep(0)

    async def write() -> bytes:
        turns = asyncio.ensure_future(others())
        try:
            return await written(FORMS[name]().whole(result("a"), tokens(1)))
        finally:
            most.append(len(since))
            turns.cancel()

    monkeypatch.setattr(logprobs, name, noted)
    asyncio.run(write())
    assert sum(most) == COUNT
    assert max(most) <= AT_ONCE


@pytest.mark.parametrize("name", FORMS)
def test_each_completion_of_a_whole_answer_has_the_probabilities_of_its_own_tokens(name: str) -> None:
    ended = result("a").model_copy(update={"others": (Completion(text="b", token_ids=(1,), finish_reason="stop"),)})
    answer = json.loads(asyncio.run(written(FORMS[name]().whole(ended, tokens(2)))))
    for number, choice in enumerate(answer["choices"]):
        said, texts = choice["logprobs"], [f"{at} " for at in range(number, COUNT, 2)]
        if name == "_said":
            assert [one["token"] for one in said["content"]] == texts
            assert {one["top_logprobs"][0]["token"] for one in said["content"]} == {"other"}
        else:
            assert said["tokens"] == texts
            assert said["top_logprobs"] == [{"other": -2.0}] * len(texts)


def test_of_alternatives_with_one_text_the_likeliest_is_shown() -> None:
    """Parts of a character have no text of their own, and a completion names alternatives by their text."""
    parts = tuple(Alternative(token_id=at, text="\ufffd", logprob=logprob) for at, logprob in enumerate((-2, -1, -3)))
    (token, *_) = tokens(1)
    shown = logprobs.legacy_logprobs([token.model_copy(update={"alternatives": parts})])
    assert shown["top_logprobs"] == [{"\ufffd": -1}]


def test_what_is_written_is_json_of_the_same() -> None:
    answer: dict[str, object] = {
        "empty": {}, "none": [], "texts": ["ä", '"'], "objects": [{"a": None}, {}, 1, [{"b": [1.5, True]}]],
        "one": "\ud800",
    }  # fmt: skip
    assert json.loads(asyncio.run(written({**answer, "each": iter([{"a": 1}, "b"])}))) == {
        **answer, "each": [{"a": 1}, "b"],
    }  # fmt: skip
    assert json.loads(asyncio.run(written({"each": iter(())}))) == {"each": []}

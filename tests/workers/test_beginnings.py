"""The names of what a prompt begins with: alike where keys and values are, and nowhere else."""

from __future__ import annotations

import pytest

from stoker.contract import ChatMessage, GenerateRequest
from workers.beginnings import BLOCK, MOST, beginnings

#: No two blocks of it are alike.
TEXT = "".join(f"{number:07d} " for number in range(BLOCK))


def names(**asked: object) -> list[str]:
    return beginnings(GenerateRequest.model_validate({"model": "m", **asked}))


def said(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]


#: A message as it is named.
SAID = ChatMessage.model_validate(said(TEXT)[0]).model_dump_json()


def shared(left: list[str], right: list[str]) -> int:
    """Names that both begin with."""
    return next((place for place, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]),
                min(len(left), len(right)))  # fmt: skip


@pytest.mark.parametrize("characters", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK])
def test_a_prompt_has_a_name_for_each_whole_block(characters: int) -> None:
    made = names(prompt=TEXT[:characters])
    assert len(made) == len(set(made)) == characters // BLOCK
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in made)


def test_a_conversation_that_goes_on_has_the_names_of_what_it_was_first() -> None:
    before = names(messages=said(TEXT[: 2 * BLOCK]))
    after = names(messages=said(TEXT[: 2 * BLOCK], "an answer", TEXT[2 * BLOCK : 4 * BLOCK]))
    assert len(before) == 2
    assert shared(before, after) == 2
    assert len(after) == 4


def test_what_a_message_ends_with_is_in_the_next_name() -> None:
    left, right = (names(messages=said(TEXT[: BLOCK + BLOCK // 2] + end, TEXT[:BLOCK])) for end in "xy")
    assert (len(left), shared(left, right)) == (2, 1)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"prompt": TEXT[: 3 * BLOCK]}, {"prompt": TEXT[: 2 * BLOCK] + "x" + TEXT[2 * BLOCK : 3 * BLOCK]}),
        ({"prompt_ids": [*range(9000)]}, {"prompt_ids": [*range(3000), *range(3001, 9001)]}),
        ({"messages": said(TEXT[: 2 * BLOCK], "a")}, {"messages": said(TEXT[: 2 * BLOCK], "b" * BLOCK)}),
    ],
)
def test_prompts_share_the_names_of_what_they_share(left: dict[str, object], right: dict[str, object]) -> None:
    assert 2 <= shared(names(**left), names(**right)) < len(names(**right))


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"}, {"adapter": "a@1"}, {"tools": [{"name": "t"}]}, {"template": {"enable_thinking": False}},
        {"messages": said("x" + TEXT)}, {"messages": None, "prompt": f"{SAID}\n"},
    ],
)  # fmt: skip
def test_what_computes_other_keys_and_values_has_other_names(other: dict[str, object]) -> None:
    asked: dict[str, object] = {"messages": said(TEXT)}
    assert names(**asked)
    assert shared(names(**asked), names(**(asked | other))) == 0


def test_how_the_answer_is_drawn_changes_no_name() -> None:
    assert names(prompt=TEXT, temperature=1.0, seed=4, max_tokens=3, stop=["x"]) == names(prompt=TEXT)


def test_a_prompt_without_end_has_so_many_names_and_no_more() -> None:
    assert len(names(prompt=TEXT * 10)) == MOST

"""From examples to batches: what counts, in what order, and how it is laid out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from engine.checkpoints.loading import LoadedModel
from engine.text.tokenizer import Tokenizer
from engine.training.data import (
    Batches,
    TokenizedExample,
    allowed_length,
    collate,
    dataset_digest,
    divided,
    split,
    tokenize,
    with_steps,
)
from stoker.contract import TrainRequest
from stoker.contract.dataset import Example
from stoker.errors import DatasetError, InvalidRequest
from tests.engine import tiny
from tests.engine.tiny import asking

TEMPLATE = (
    "{% for m in messages %}t{{ {'system': 10, 'user': 11, 'assistant': 12}[m['role']] }} {{ m['content'] }} t2 "
    "{% endfor %}{% if add_generation_prompt %}t12 {% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
#: The part of Qwen3's own template that concerns what was thought.
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if loop.index0 > ns.last and loop.last and m.role == 'assistant' %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
FOLDERS = json.loads((Path(__file__).parents[1] / "goldens" / "text" / "folders.json").read_text())


def example(*tokens: int, start: int = 1) -> TokenizedExample:
    return TokenizedExample.of([(tokens[:start], False), (tokens[start:], True)])


def test_only_the_completion_counts_and_ends_with_the_end_token(model: LoadedModel) -> None:
    rows = [Example("t3 t4", " t5 t6 t7"), Example("", "t8 t9 t10 t11")]
    prompted, plain = tokenize(rows, model.tokenizer, 64)
    assert prompted.tokens.tolist() == [3, 4, 5, 6, 7, tiny.EOS]
    assert prompted.learned.tolist() == [False, False, True, True, True, True]
    assert plain.tokens.tolist() == [8, 9, 10, 11, tiny.EOS]
    assert plain.learned.tolist() == [False, True, True, True, True]
    batch = collate([prompted])
    assert batch.inputs.tolist() == [[3, 4, 5, 6, 7]]
    assert batch.positions.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [5, 6, 7, tiny.EOS]
    assert (batch.count, batch.tokens) == (4, 5)


def test_prompts_are_learned_when_asked(model: LoadedModel) -> None:
    (found,) = tokenize([Example("t3 t4", " t5")], model.tokenizer, 64, learn_prompts=True)
    assert found.learned.tolist() == [False, True, True, True]


def test_of_a_conversation_each_answer_counts_with_its_end(model: LoadedModel) -> None:
    model.tokenizer.templates["default"] = TEMPLATE
    turns = [("system", "t20"), ("user", "t21"), ("assistant", "t22 t23"), ("user", "t24"), ("assistant", "t25")]
    messages = tuple({"role": role, "content": text} for role, text in turns)
    (found,) = tokenize([Example(messages=messages)], model.tokenizer, 64)
    assert found.tokens.tolist() == [10, 20, 2, 11, 21, 2, 12, 22, 23, 2, 11, 24, 2, 12, 25, 2]
    assert found.tokens[found.learned].tolist() == [22, 23, 2, 25, 2]


def conversation(*turns: tuple[str, str]) -> Example:
    return Example(messages=tuple({"role": role, "content": text} for role, text in turns))


def learned(tokenizer: Tokenizer, found: TokenizedExample) -> str:
    return tokenizer.decode(found.tokens[found.learned].tolist(), skip_special=False)


@pytest.fixture
def chatml(tmp_path: Path) -> Tokenizer:
    """A byte-level vocabulary with ChatML's tokens."""
    config = {"extra_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(FOLDERS["bases"]["bytes"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(tmp_path)


@pytest.fixture
def llama(tmp_path: Path) -> Tokenizer:
    """A SentencePiece vocabulary with a space before every text."""
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(FOLDERS["bases"]["sentences"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(tmp_path)


def test_a_prompt_and_its_completion_are_encoded_as_one_text(llama: Tokenizer) -> None:
    (found,) = tokenize([Example("the worker:", " the model")], llama, 64)
    whole = llama.encode("the worker: the model")
    assert found.tokens.tolist() == [*whole, llama.main_eos_id]
    assert llama.inner.id_to_token(whole[-2]) != "▁", "the space is no token of its own"
    assert learned(llama, found) == "the model</s>"
    prompt = llama.encode("the worker:")
    assert found.learned.tolist() == [False] * len(prompt) + [True] * (len(found) - len(prompt))


def test_a_token_across_the_end_of_a_prompt_is_learned(llama: Tokenizer) -> None:
    """In use the model has to write it; without it what is learned would begin in the middle of a word."""
    (found,) = tokenize([Example("the mod", "el")], llama, 64)
    assert learned(llama, found) == "model</s>"
    (found,) = tokenize([Example("the ", "model")], llama, 64)
    assert learned(llama, found) == "model</s>"


def test_an_end_that_the_tokenizer_adds_stands_there_once(llama: Tokenizer) -> None:
    end = llama.main_eos_id
    llama.inner.post_processor = TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", end)])
    (found,) = tokenize([Example("the", " model")], llama, 64)
    assert found.tokens.tolist() == llama.encode("the model")
    assert found.learned.tolist() == [False, False, True, True]


def test_turns_are_encoded_as_one_text(llama: Tokenizer) -> None:
    llama.templates["default"] = LLAMA
    talk = conversation(("user", "the"), ("assistant", "the model"), ("user", "of"), ("assistant", "the worker"))
    (found,) = tokenize([talk], llama, 200)
    text = "<s>[INST] the [/INST] the model </s>[INST] of [/INST] the worker </s>"
    assert found.tokens.tolist() == llama.encode(text, special=False)
    assert learned(llama, found).replace(" ", "") == "themodel</s>theworker</s>"


def test_a_conversation_that_the_assistant_opens_is_learned_from_its_first_word(chatml: Tokenizer) -> None:
    chatml.templates["default"] = CHATML
    talk = conversation(("assistant", "hi"), ("user", "q"), ("assistant", "a"))
    (found,) = tokenize([talk], chatml, 200)
    assert chatml.decode(found.tokens.tolist(), skip_special=False) == (
        "<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    )
    assert learned(chatml, found) == "hi<|im_end|>\na<|im_end|>\n"
    # A word that stands in the template too is found all the same.
    (found,) = tokenize([conversation(("assistant", "assistant"))], chatml, 200)
    assert learned(chatml, found) == "assistant<|im_end|>\n"


def test_a_template_that_takes_no_conversation_of_an_assistants_opening_says_so(chatml: Tokenizer) -> None:
    chatml.templates["default"] = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('the user opens') }}{% endif %}" + CHATML
    )
    with pytest.raises(DatasetError, match=r"example 1: the model's chat template refuses .*: the user opens"):
        tokenize([conversation(("assistant", "hi"), ("user", "q"), ("assistant", "a"))], chatml, 200)


def test_turns_that_a_template_writes_anew_are_each_learned_as_they_are_said(chatml: Tokenizer) -> None:
    """Qwen3's template takes what was thought out of every answer that a question follows."""
    chatml.templates["default"] = QWEN3
    talk = conversation(("user", "q"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))
    first, second = tokenize([talk], chatml, 200)
    assert [learned(chatml, one) for one in (first, second)] == [
        f"<think>\n\n</think>\n\n{answer}<|im_end|>\n" for answer in ("a1", "a2")
    ]
    assert chatml.decode(second.tokens.tolist(), skip_special=False) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\na2<|im_end|>\n"
    )


@pytest.mark.parametrize("within", ["{}", "{{% macro day() %}}{}{{% endmacro %}}{{{{ day() }}}}"])
def test_a_template_that_writes_the_date_makes_the_same_examples_on_any_day(chatml: Tokenizer, within: str) -> None:
    """A run that goes on the next day, or on a worker of another time zone, would be one of another dataset."""
    chatml.templates["default"] = within.format("{{ strftime_now('%d %b %Y, %X.%f') }}") + CHATML
    found = [tokenize([conversation(("user", "q"), ("assistant", "a"))], chatml, 200) for _ in range(2)]
    assert len({dataset_digest(rows) for rows in found}) == 1
    assert chatml.decode(found[0][0].tokens.tolist()).startswith("26 Jul 2024, 00:00:00.000000")


def test_what_a_template_asks_otherwise_than_it_writes_is_learned_from_its_first_word(chatml: Tokenizer) -> None:
    chatml.templates["default"] = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    (found,) = tokenize([conversation(("user", "q"), ("assistant", "a"))], chatml, 200)
    assert learned(chatml, found) == "a<|im_end|>\n"


def test_a_turn_that_cannot_be_distinguished_is_refused_by_the_examples_number(model: LoadedModel) -> None:
    model.tokenizer.templates["default"] = "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}t1"
    messages = ({"role": "user", "content": "t3"}, {"role": "assistant", "content": "t4"})
    with pytest.raises(
        DatasetError, match="example 2: the model's chat template writes message 2, the assistant's, so"
    ):
        tokenize([Example("", "t1"), Example(messages=messages)], model.tokenizer, 64)


def test_messages_for_a_model_without_a_template_are_refused(model: LoadedModel) -> None:
    messages = ({"role": "user", "content": "t3"}, {"role": "assistant", "content": "t4"})
    with pytest.raises(DatasetError, match="example 1: messages given, and the model has no chat template"):
        tokenize([Example(messages=messages)], model.tokenizer, 64)


def test_an_example_that_is_too_long_is_named(model: LoadedModel) -> None:
    rows = [Example("", "t1"), Example("t1 t2", " t3 t4")]
    assert len(tokenize(rows, model.tokenizer, 5)) == 2
    with pytest.raises(DatasetError, match="example 2: 5 tokens given; max_length is 4"):
        tokenize(rows, model.tokenizer, 4)


@pytest.mark.parametrize("row", [Example(f"t3 t{tiny.EOS}", ""), Example("", f"t{tiny.EOS}")])
def test_an_example_of_which_nothing_can_be_learned_is_named(model: LoadedModel, row: Example) -> None:
    """Its loss would be a mean over nothing."""
    with pytest.raises(DatasetError, match=r"^dataset, example 2: no token in it that could be learned"):
        tokenize([Example("t3", " t5"), row], model.tokenizer, 64)


def test_a_dataset_without_examples_says_so(model: LoadedModel) -> None:
    with pytest.raises(DatasetError, match=r"^dataset: no example in it"):
        tokenize([], model.tokenizer, 64)


def test_sizes_are_rounded_up_and_what_pads_weighs_nothing() -> None:
    batch = collate([example(3, 4, 5, start=2), example(6, 7, 8, 9)], align=4)
    assert batch.inputs.tolist() == [[3, 4, 0, 0], [6, 7, 8, 0]]
    assert batch.positions.tolist() == [1, 4, 5, 6]
    wide = collate([example(3, 4)], align=4)
    assert wide.targets.tolist() == [4, 0, 0, 0]
    assert wide.weights.tolist() == [1, 0, 0, 0]
    assert wide.count == 1


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    rows = [example(3, place) for place in range(4, 16)]

    def epochs(seed: int) -> Iterator[list[int]]:
        batches = Batches(rows, 4, seed)
        assert batches.an_epoch == 3
        for number in range(0, 9, 3):
            yield [int(row.tokens[1]) for place in range(3) for row in batches.examples(number + place)]

    first = list(epochs(1))
    assert first == list(epochs(1)) != list(epochs(2))
    assert all(sorted(epoch) == list(range(4, 16)) for epoch in first)
    assert first[0] != first[1] != first[2]


def test_batches_come_in_no_order_of_length_and_in_another_in_each_epoch() -> None:
    """Else a run would learn from short examples first, in every epoch."""
    rows = [example(*range(3, 5 + number)) for number in range(64)]
    batches = Batches(rows, 4, 1)
    lengths = [len(batches.examples(number)[0]) for number in range(3 * batches.an_epoch)]
    epochs = [lengths[start : start + batches.an_epoch] for start in range(0, len(lengths), batches.an_epoch)]
    assert all(epoch not in (sorted(epoch), sorted(epoch, reverse=True)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_any_batch_can_be_had_without_those_before() -> None:
    rows = [example(*range(3, 5 + place % 7)) for place in range(50)]
    in_order = Batches(rows, 4, 7)
    found = [in_order.examples(number) for number in range(30)]
    for number in (29, 3, 17, 0):
        assert Batches(rows, 4, 7).examples(number) == found[number]


def test_batches_hold_examples_of_like_length() -> None:
    random = np.random.default_rng(0)
    rows = [example(*range(3, 5 + int(length))) for length in random.integers(1, 100, 128)]
    batches = Batches(rows, 4, 0)
    spread = [max(map(len, batch)) - min(map(len, batch)) for batch in map(batches.examples, range(batches.an_epoch))]
    assert max(spread) < 20, "unsorted batches spread over 60 tokens and more"
    firsts = [len(batches.examples(number)[0]) for number in range(batches.an_epoch)]
    assert firsts != sorted(firsts), "the batches themselves come in random order"


def test_the_last_lines_are_held_out_with_every_example_that_they_make() -> None:
    rows = [replace(example(3, 4), line=line) for line in (1, 2, 2, 3, 3, 5)]
    for lines, held in ((1, 1), (2, 1), (3, 3), (4, 5)):
        assert divided(rows, asking(held_out_lines=lines)) == (rows[:-held], rows[-held:])
    with pytest.raises(DatasetError, match="held_out_lines: 5 of 5 given; none is left to learn from"):
        divided(rows, asking(held_out_lines=5))
    assert divided(rows, asking()) == (rows, [])


def test_examples_know_their_line_and_epochs_are_steps(model: LoadedModel) -> None:
    found = tokenize([Example("t3 t4", " t5"), Example("t3", " t4")], model.tokenizer, 64)
    assert [one.line for one in found] == [1, 2]
    cases: list[tuple[dict[str, Any], int, int]] = [
        ({"epochs": 3, "batch_size": 2}, 8, 12),
        ({"epochs": 3, "batch_size": 2, "accumulation": 5}, 8, 3),
        # What does not fill a batch waits for another epoch.
        ({"epochs": 2, "batch_size": 3}, 8, 4),
        ({"epochs": 2, "batch_size": 64}, 8, 2),
        ({"steps": 7}, 8, 7),
    ]
    for fields, learned, steps in cases:
        assert with_steps(asking(**fields), learned).steps == steps
    with pytest.raises(InvalidRequest, match="epochs: 10000 given, which are 2000000 steps; at most 1000000"):
        with_steps(asking(epochs=10_000, batch_size=1), 200)


def test_a_batch_is_no_larger_than_the_dataset() -> None:
    assert len(Batches([example(1, 2)], 8, 0).examples(0)) == 1


def test_a_share_is_held_out_by_the_seed_and_nothing_is_lost() -> None:
    rows = [replace(example(3, place), line=place) for place in range(4, 24)]
    learned, held_out = split(rows, 0.25, seed=1)
    assert (len(learned), len(held_out)) == (15, 5)
    assert set(map(id, learned + held_out)) == set(map(id, rows))
    assert split(rows, 0.25, seed=1) == (learned, held_out) != split(rows, 0.25, seed=2)
    assert split(rows, 0.0, seed=1) == (rows, [])


def test_a_conversation_is_held_out_with_every_example_that_it_makes(chatml: Tokenizer) -> None:
    """Its turns hold one another: what is evaluated on would have been learned."""
    chatml.templates["default"] = QWEN3
    talk = conversation(*(("user", "q"), ("assistant", "a")) * 3)
    rows = tokenize([talk] * 8, chatml, 200)
    assert len(rows) == 24, "each turn is an example of its own"
    for seed in range(5):
        learned, held_out = split(rows, 0.25, seed)
        assert (len(learned), len(held_out)) == (18, 6)
        assert not {row.line for row in learned} & {row.line for row in held_out}


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_share_that_leaves_nothing_to_evaluate_on_is_refused(share: float) -> None:
    with pytest.raises(DatasetError, match=r"held_out: .* of 3 examples is 0; both sides need one"):
        split([replace(example(3, 4), line=line) for line in (1, 2, 3)], share, seed=0)


def test_the_digest_distinguishes_datasets() -> None:
    found: list[Any] = [[example(3, 4, 5)], [example(3, 4, 6)], [example(3, 4, 5, start=2)], [example(3, 4, 5)] * 2]
    assert len({dataset_digest(rows) for rows in found}) == 4
    assert dataset_digest([example(3, 4, 5)]) == dataset_digest(found[0])


def test_an_example_may_be_as_long_as_the_model_takes_if_no_length_was_asked_for() -> None:
    silent = TrainRequest(model="tiny", name="style", dataset="dataset:x")
    assert [allowed_length(silent, context) for context in (256, 512, 4096)] == [256, 512, 512]
    assert allowed_length(asking(max_length=256), 256) == 256
    with pytest.raises(InvalidRequest, match="max_length: 257 given; tiny takes 256"):
        allowed_length(asking(max_length=257), 256)

"""Tokenizers rebuilt from GGUF: the ids of the models' own tokenizers, and every text back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.detokenizer import StreamingDetokenizer
from engine.text.gguf_vocabulary import PRE_TOKENIZERS
from engine.text.tokenizer import Tokenizer
from engine.weights.gguf import GGUF
from stoker.errors import ModelError

GOLDENS = Path(__file__).parents[1] / "goldens" / "text"
BYTE_LEVEL = json.loads((GOLDENS / "byte_level.json").read_text())
SPM = json.loads((GOLDENS / "sentencepiece.json").read_text())
#: Tokens of that vocabulary.
COUNT = len(SPM["prefix"]["tokens"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    st.sampled_from("aé 漢👩‍🚀\n字1 \u2581\ufffdthe"), max_size=40
)


def gguf_of(**values: Any) -> GGUF:
    gguf = GGUF.__new__(GGUF)
    gguf.path, gguf.tensors = Path("some.gguf"), {}
    gguf.metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return gguf


def byte_level(**changes: Any) -> Tokenizer:
    values = {"model": "gpt2", "tokens": BYTE_LEVEL["tokens"], "merges": BYTE_LEVEL["merges"], "add_bos_token": False}
    return Tokenizer.from_gguf(gguf_of(**{**values, **changes}))


def spm(golden: str, **changes: Any) -> Tokenizer:
    model = SPM[golden]
    values = {
        "model": "llama",
        "tokens": model["tokens"],
        "scores": np.array(model["scores"], np.float32),
        "token_type": np.array(model["types"], np.int32),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": golden == "prefix",
        "add_bos_token": False,
    }
    return Tokenizer.from_gguf(gguf_of(**{**values, **changes}))


@pytest.mark.parametrize("pre", sorted(BYTE_LEVEL["ids"]))
def test_byte_level_ids_are_those_of_transformers(pre: str) -> None:
    tokenizer = byte_level(pre=pre)
    for text, ids in zip(BYTE_LEVEL["texts"], BYTE_LEVEL["ids"][pre], strict=True):
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize("golden", ["prefix", "no_prefix"])
def test_sentencepiece_ids_are_those_of_sentencepiece(golden: str) -> None:
    tokenizer = spm(golden)
    for text, ids in zip(SPM[golden]["texts"], SPM[golden]["ids"], strict=True):
        if "<tool>" not in text:  # llama.cpp starts anew after a special token, sentencepiece goes on
            assert tokenizer.encode(text) == ids, text


def test_text_after_a_special_token_starts_anew_as_in_llama_cpp() -> None:
    tokenizer = spm("prefix")
    alone = tokenizer.encode("the")
    assert tokenizer.encode("<tool>the</s>the") == [3, *alone, 2, *alone]
    assert tokenizer.decode(tokenizer.encode("the<tool>the")) == "the<tool> the"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "in 1969", ["in", " ", "1", "9", "6", "9"]),
        ("gpt-2", "in 1969", ["in", " 1969"]),
        ("tekken", "HTMLParser don't\n/x", ["HTMLParser", " don", "'t", "\n", "/x"]),
        ("tekken", "iPhone42", ["i", "Phone", "4", "2"]),
        ("default", "a+=1234 b", ["a", "+=", "123", "4", " b"]),
        ("llama-bpe", "1234's", ["123", "4", "'s"]),
        ("falcon3", "1234's", ["123", "4", "'s"]),
        ("midm-2.0", "1234's", ["123", "4", "'s"]),
        ("dbrx", "1234's", ["123", "4", "'s"]),
        ("gpt-4o", "HTMLParser don't1234", ["HTMLParser", " don't", "123", "4"]),
    ],
)
def test_each_family_cuts_a_text_its_own_way(pre: str, text: str, pieces: list[str]) -> None:
    cut = byte_level(pre=pre).inner.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_family_gives_every_text_back(pre: str) -> None:
    tokenizer = byte_level(pre=pre)
    for text in BYTE_LEVEL["texts"]:
        if "\u0301" not in text:  # Qwen composes it
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module", params=["prefix", "no_prefix"])
def sentences(request: pytest.FixtureRequest) -> Tokenizer:
    return spm(request.param)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_text_survives_a_sentencepiece_vocabulary(sentences: Tokenizer, text: str) -> None:
    # The sign for a space reads as a space again: SentencePiece has no other way to write it.
    assert sentences.decode(sentences.encode(text), skip_special=False) == text.replace("\u2581", " ")


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 599) | st.integers(4, 260), max_size=60), skip=st.booleans())
def test_a_stream_of_any_sentencepiece_tokens_is_what_decode_says(
    sentences: Tokenizer, ids: list[int], skip: bool
) -> None:
    stream = StreamingDetokenizer(sentences, skip_special=skip)
    pieces = [stream.add(index) for index in ids] + [stream.finish()]
    assert "".join(pieces) == sentences.decode(ids, skip_special=skip)


def test_beginning_and_end_are_added_where_the_file_asks() -> None:
    bare = spm("prefix").encode("the")
    assert spm("prefix", add_bos_token=True).encode("the") == [1, *bare]
    assert spm("prefix", add_eos_token=True).encode("the") == [*bare, 2]
    both = spm("prefix", add_bos_token=True, add_eos_token=True)
    assert both.encode("the") == [1, *bare, 2]
    assert both.encode("the", special=False) == bare
    assert both.decode(both.encode("the")) == "the"
    default = gguf_of(model="llama", tokens=SPM["prefix"]["tokens"], scores=np.array(SPM["prefix"]["scores"]),
                      token_type=SPM["prefix"]["types"], bos_token_id=1)  # fmt: skip
    assert Tokenizer.from_gguf(default).encode("the") == [1, *bare], "SentencePiece models begin with BOS by default"
    assert byte_level(pre="llama-bpe", bos_token_id=0, add_bos_token=True).encode("") == [0]
    assert byte_level(pre="llama-bpe", bos_token_id=0, add_bos_token=False).encode("") == []


@pytest.mark.parametrize(
    ("pre", "begins"), [("llama-bpe", True), ("falcon3", True), ("midm-2.0", True), ("tekken", True), ("qwen2", False)]
)
def test_a_text_begins_with_bos_in_the_families_of_llama_cpp_where_the_file_does_not_say(
    pre: str, begins: bool
) -> None:
    vocabulary = {"tokens": BYTE_LEVEL["tokens"], "merges": BYTE_LEVEL["merges"]}
    stated, silent = (gguf_of(model="gpt2", pre=pre, bos_token_id=0, **vocabulary, **said)
                    for said in ({"add_bos_token": False}, {}))  # fmt: skip
    assert Tokenizer.from_gguf(stated).encode("the")[:1] != [0]
    assert (Tokenizer.from_gguf(silent).encode("the")[:1] == [0]) is begins


@pytest.mark.parametrize("name", ["eos", "eot", "eom"])
def test_each_token_that_the_file_names_as_an_end_is_one(name: str) -> None:
    found = spm("prefix", **{"eos_token_id": None, f"{name}_token_id": 7})
    assert 7 in found.eos_ids


@pytest.mark.parametrize("kind", [1, 3, 4])
@pytest.mark.parametrize(
    "name", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[EOS]", "<|call|>", "<|fim_pad|>", "<|file_sep|>"]
)
def test_a_name_that_ends_in_every_family_ends_with_every_type(name: str, kind: int) -> None:
    tokens = [*BYTE_LEVEL["tokens"][:-1], name]
    merges = [merge for merge in BYTE_LEVEL["merges"] if merge.replace(" ", "") in tokens]
    found = byte_level(tokens=tokens, token_type=[1] * (len(tokens) - 1) + [kind], merges=merges)
    end = len(tokens) - 1
    assert end in found.eos_ids
    assert found.encode(f"a{name}")[-1] == end
    assert found.decode([end]) == ""


def test_a_name_that_ends_elsewhere_ends_nothing_in_a_vocabulary_that_parts_turns_with_it() -> None:
    names = ["<|return|>", "<|call|>", "<|end|>"]
    for absent, ending in ((0, True), (None, False)):
        added = [name for index, name in enumerate(names) if index != absent]
        tokens = [*BYTE_LEVEL["tokens"], *added]
        found = byte_level(tokens=tokens, token_type=[1] * len(BYTE_LEVEL["tokens"]) + [3] * len(added))
        assert (found.inner.token_to_id("<|end|>") in found.eos_ids) is ending


def test_the_marks_of_filled_in_code_are_special_and_end_nothing() -> None:
    tokens = [*BYTE_LEVEL["tokens"], "<|fim_prefix|>", "<fim_prefix>"]
    found = byte_level(tokens=tokens, token_type=[1] * len(tokens))
    first = len(tokens) - 2
    assert found.encode("<|fim_prefix|>") == [first]
    assert first in found.special_ids - found.eos_ids
    assert first + 1 not in found.special_ids


def test_a_file_names_its_templates_and_special_tokens() -> None:
    gguf = gguf_of(
        model="llama", tokens=SPM["prefix"]["tokens"], scores=np.array(SPM["prefix"]["scores"]),
        token_type=SPM["prefix"]["types"], bos_token_id=1, eos_token_id=2, unknown_token_id=0, seperator_token_id=5,
    )  # fmt: skip
    gguf.metadata |= {"tokenizer.chat_template": "D", "tokenizer.chat_template.tool_use": "T"}
    found = Tokenizer.from_gguf(gguf)
    assert found.templates == {"default": "D", "tool_use": "T"}
    assert dict(found.manners.names) == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": SPM["prefix"]["tokens"][5],
    }  # fmt: skip
    del gguf.metadata["tokenizer.chat_template"]
    assert Tokenizer.from_gguf(gguf).templates == {"tool_use": "T"}


@pytest.mark.parametrize("key", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
@pytest.mark.parametrize("template", [3, ["D"], np.ones(2), False])
def test_a_chat_template_that_is_no_text_is_refused_by_name(key: str, template: object) -> None:
    gguf = gguf_of(model="gpt2", tokens=BYTE_LEVEL["tokens"], merges=BYTE_LEVEL["merges"], pre="qwen2")
    gguf.metadata[key] = template
    with pytest.raises(ModelError, match=r"some\.gguf: the chat template '(default|tool_use)' is a .*, not a text"):
        Tokenizer.from_gguf(gguf)


def test_a_token_of_the_user_is_one_token_and_is_text() -> None:
    """A control token is no text; one that the model's maker added is."""
    types = [1] * (len(BYTE_LEVEL["tokens"]) - 2) + [3, 4]
    tokens = [*BYTE_LEVEL["tokens"][:-2], "<control>", "<added>"]
    merges = [merge for merge in BYTE_LEVEL["merges"] if merge.replace(" ", "") in tokens]
    tokenizer = byte_level(tokens=tokens, token_type=types, merges=merges)
    ids = tokenizer.encode("<control><added>")
    assert ids == [len(tokens) - 2, len(tokens) - 1]
    assert ids[0] in tokenizer.special_ids
    assert ids[1] not in tokenizer.special_ids
    assert tokenizer.decode(ids) == "<added>"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"scores": None}, "scores is missing"),
        ({"scores": np.array([1.0])}, "scores is missing"),
        ({"scores": np.full(600, np.nan)}, "scores is missing"),
        ({"scores": np.ones(COUNT, np.bool_)}, "scores is missing"),
        ({"token_type": np.ones(COUNT, np.float32)}, "token_type is no list of the types 0 to 6"),
        ({"token_type": np.ones(COUNT, np.bool_)}, "token_type is no list of the types 0 to 6"),
        ({"token_type": np.full(COUNT, 7, np.int32)}, "token_type is no list of the types 0 to 6"),
        ({"token_type": np.full(COUNT, -1, np.int32)}, "token_type is no list of the types 0 to 6"),
        ({"token_type": ["3"] * COUNT}, "token_type is no list of the types 0 to 6"),
        ({"token_type": "1" * COUNT}, "token_type is no list of the types 0 to 6"),
        ({"eos_token_id": "1"}, "eos_token_id '1' is no token"),
        ({"eos_token_id": 600}, "eos_token_id 600 is no token"),
        ({"eos_token_id": COUNT}, f"eos_token_id {COUNT} is no token"),
        ({"eot_token_id": [1]}, "eot_token_id [1] is no token"),
        ({"eom_token_id": True}, "eom_token_id True is no token"),
        ({"padding_token_id": 2**32 - 1}, "padding_token_id 4294967295 is no token"),
        ({"token_type": np.ones(5, np.int32)}, "another number of token types"),
        ({"tokens": ["a"] * 600}, "repeats a token"),
        ({"tokens": ["a", "b" * 5000], "token_type": [1, 1]}, "a token of 5000 characters"),
        ({"tokens": ["a", "b" * 1025], "token_type": [1, 1]}, "a token of 1025 characters; 1024 are allowed"),
        ({"tokens": ["a", "<0x41>"], "token_type": [1, 6], "scores": np.zeros(2)}, "lacks 255 of the 256 byte tokens"),
        ({"tokens": ["a", "b"], "token_type": [1, 1], "scores": np.zeros(2), "unknown_token_id": None}, "neither byte"),
        ({"add_bos_token": "yes"}, "'yes', not true or false"),
        ({"add_eos_token": True, "eos_token_id": 600}, "eos_token_id 600 is no token"),
        ({"add_eos_token": True, "eos_token_id": None}, "does not name: tokenizer.ggml.eos_token_id"),
        ({"unknown_token_id": -1}, "unknown_token_id -1 is no token"),
        ({"model": "bert"}, "'bert' is not supported"),
        ({"model": ["llama"]}, "is not supported"),
        ({"model": "gpt2", "pre": ["x"], "merges": ["a b"]}, "is not supported"),
    ],
)
def test_a_damaged_vocabulary_is_refused_by_name(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(ModelError, match=r"some\.gguf") as caught:
        spm("prefix", **changes)
    assert cause in str(caught.value)

"""Tokenizers and the streaming detokenizer, with the demo's real vocabularies."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from engine.checkpoints.loading import LoadedModel
from engine.text.byte_stream import ByteStream
from engine.text.detokenizer import StreamingDetokenizer
from engine.text.gguf_vocabulary import PRE_TOKENIZERS, build
from engine.text.pieces import BYTE_OF
from engine.text.templates import choose
from engine.text.tokenizer import Tokenizer
from engine.weights.gguf import GGUF
from stoker.errors import InvalidRequest, ModelError

GOLDENS = Path(__file__).parents[1] / "goldens"
# Any Unicode text at all, with the scripts and joined emoji that byte-level vocabularies split up.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    st.sampled_from("aé 漢👩‍🚀\n字1 \ufffd")
)


def _spelled(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the vocabulary has a token for each byte: SmolLM2's lacks some control characters and drops them."""
    absent = {byte for symbol, byte in BYTE_OF.items() if tokenizer.inner.token_to_id(symbol) is None}
    return absent.isdisjoint(text.encode())


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> tuple[list[str], str]:
    stream = StreamingDetokenizer(tokenizer, skip_special=skip_special)
    return [stream.add(index) for index in ids], stream.finish()


@example(content=b"a", cuts=[0], strips=True, begun=False)
@given(
    content=st.binary(max_size=20) | TEXTS.map(str.encode),
    cuts=st.lists(st.integers(0, 40), max_size=8),
    strips=st.booleans(),
    begun=st.booleans(),
)
def test_bytes_in_any_pieces_make_the_text_of_the_whole(
    content: bytes, cuts: list[int], strips: bool, begun: bool
) -> None:
    """Pieces of nothing among them, and ends within a character: only one space at the very beginning goes."""
    content = b" " + content
    borders = [0, *sorted(cuts), max(len(content), *cuts, 0)]
    pieces = [content[start:end] for start, end in itertools.pairwise(borders)]
    spelled: Any = pieces.__getitem__
    made: Any = type("Pieces", (), {"strips_space": strips, "__call__": lambda self, index: spelled(index)})()
    stream, whole = ByteStream(made, begun=begun), content.decode(errors="replace")
    found = "".join(map(stream.add, range(len(pieces)))) + stream.finish()
    assert found == (whole.removeprefix(" ") if strips and not begun else whole)
    assert ByteStream(made, begun=begun).text(range(len(pieces))) == found


def test_ids_are_those_of_the_oracles(smollm2: LoadedModel, minilm: LoadedModel) -> None:
    for prompt in json.loads((GOLDENS / "smollm2.json").read_text())["prompts"]:
        assert smollm2.tokenizer.encode(prompt["prompt"]) == prompt["prompt_ids"]
        assert smollm2.tokenizer.decode(prompt["token_ids"]) == prompt["text"]
    texts = json.loads((GOLDENS / "minilm.json").read_text())["texts"]
    assert [len(ids) for ids in minilm.tokenizer.encode_batch([text["text"] for text in texts])] == [
        text["tokens_untruncated"] for text in texts
    ]


def test_special_tokens_are_known(smollm2: LoadedModel, minilm: LoadedModel) -> None:
    # llama.cpp ends at the name of another repository's file too.
    assert smollm2.tokenizer.eos_ids == {0, 2, smollm2.tokenizer.inner.token_to_id("<reponame>")}
    assert smollm2.tokenizer.main_eos_id == 2
    assert (smollm2.tokenizer.bos_id, smollm2.tokenizer.pad_id, smollm2.tokenizer.vocab_size) == (1, 2, 49152)
    assert list(smollm2.tokenizer.templates) == ["default"]
    assert smollm2.tokenizer.decode([1, 504, 2], skip_special=False).startswith("<|im_start|>")
    assert minilm.tokenizer.encode("warm") == [101, 4010, 102]
    assert minilm.tokenizer.encode("warm", special=False) == [4010]
    assert minilm.tokenizer.pad_id == 0


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_any_text_survives_the_round_trip(smollm2: LoadedModel, text: str) -> None:
    assume(_spelled(smollm2.tokenizer, text))
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text), skip_special=False) == text


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_stream_of_a_text_is_that_text(smollm2: LoadedModel, text: str) -> None:
    pieces, rest = streamed(smollm2.tokenizer, smollm2.tokenizer.encode(text), skip_special=False)
    assert "".join(pieces) + rest == text or not _spelled(smollm2.tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151) | st.integers(0, 300) | st.just(60_000), max_size=60), skip=st.booleans())
def test_a_stream_of_any_tokens_is_what_decode_says(smollm2: LoadedModel, ids: list[int], skip: bool) -> None:
    pieces, rest = streamed(smollm2.tokenizer, ids, skip_special=skip)
    assert "".join(pieces) + rest == smollm2.tokenizer.decode(ids, skip_special=skip)


def test_an_incomplete_character_is_held_back_then_flushed(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer.encode("🧵")
    assert len(ids) > 1
    pieces, rest = streamed(smollm2.tokenizer, ids)
    assert pieces == [""] * (len(ids) - 1) + ["🧵"]
    assert rest == ""
    pieces, rest = streamed(smollm2.tokenizer, ids[:-1])
    assert "".join(pieces) == ""
    assert rest == "\ufffd"


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """A vocabulary of SentencePiece's kind: words with their space, and bytes for the rest."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from([[1], [2], [3]]) | st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_byte_fallback_vocabulary_streams_too(byte_fallback: Tokenizer, parts: list[list[int] | str]) -> None:
    ids = [index for part in parts for index in (part if isinstance(part, list) else [4 + b for b in part.encode()])]
    pieces, rest = streamed(byte_fallback, ids)
    assert "".join(pieces) + rest == byte_fallback.decode(ids)


@pytest.fixture(scope="module")
def unusual() -> Tokenizer:
    """Bytes, with a decoder that is not the usual one of its kind: tokens are decoded with their neighbours."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made = Tokenizer(inner)
    assert made.pieces is None
    return made


@given(text=TEXTS)
def test_a_vocabulary_of_no_known_kind_streams_its_characters_whole(unusual: Tokenizer, text: str) -> None:
    assume("\ufffd" not in text)
    pieces, rest = streamed(unusual, list(text.encode()))
    assert "".join(pieces) + rest == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_such_a_text_that_ends_within_a_character_says_so_at_its_end(unusual: Tokenizer) -> None:
    pieces, rest = streamed(unusual, list("a€".encode()[:-1]))
    assert ("".join(pieces), rest.replace("\ufffd", "")) == ("a", "")
    assert rest


def test_a_run_of_what_is_no_character_is_given_out_before_its_end(unusual: Tokenizer) -> None:
    pieces, _ = streamed(unusual, [0x80] * 40)
    assert any(pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 30_521) | st.integers(0, 1100) | st.just(60_000), max_size=50), skip=st.booleans())
def test_a_word_piece_vocabulary_streams_too(minilm: LoadedModel, ids: list[int], skip: bool) -> None:
    pieces, rest = streamed(minilm.tokenizer, ids, skip_special=skip)
    assert "".join(pieces) + rest == minilm.tokenizer.decode(ids, skip_special=skip)


@settings(max_examples=50, deadline=None)
@given(text=TEXTS)
def test_a_text_streams_through_a_word_piece_vocabulary(minilm: LoadedModel, text: str) -> None:
    ids = minilm.tokenizer.encode(text)
    pieces, rest = streamed(minilm.tokenizer, ids)
    assert "".join(pieces) + rest == minilm.tokenizer.decode(ids)


def test_the_window_of_a_general_vocabulary_stays_small(minilm: LoadedModel) -> None:
    stream = StreamingDetokenizer(minilm.tokenizer)
    for index in [101, 4010, 60_000] * 200:
        stream.add(index)
        assert stream.held <= 2


def test_a_general_vocabulary_holds_back_sixteen_tokens_of_one_character() -> None:
    class Slow:
        """A vocabulary of which seventeen tokens make a character."""

        inner, pieces, special_ids = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})), None, frozenset[int]()

        def decode(self, ids: list[int], *, skip_special: bool) -> str:
            return "\ufffd" if 0 < len(ids) < 17 else "é" * (len(ids) // 17)

    stream = StreamingDetokenizer(Slow())  # type: ignore[arg-type]
    assert [stream.add(0) for _ in range(17)] == [""] * 16 + ["é"]
    assert stream.finish() == ""


def test_a_general_vocabulary_reads_a_continuation_behind_eight_tokens_of_its_prompt() -> None:
    class Shouting:
        """Of what follows `^`, up to a space, it makes capitals."""

        tokens = "^ abc"
        inner = tokenizers.Tokenizer(models.WordLevel({c: n for n, c in enumerate(tokens)}))
        inner.decoder = decoders.Fuse()
        pieces, special_ids = None, frozenset({tokens.index("c")})

        def decode(self, ids: list[int], *, skip_special: bool) -> str:
            text = "".join(self.tokens[index] for index in ids)
            return re.sub(r"\^(\w*)", lambda found: found[1].upper(), text)

    def continued(prompt: str, answer: str) -> str:
        ids = [Shouting.tokens.index(c) for c in prompt]
        stream = StreamingDetokenizer(Shouting(), after=ids)  # type: ignore[arg-type]
        return "".join(stream.add(Shouting.tokens.index(c)) for c in answer) + stream.finish()

    assert continued("^abababa", "b") == "B"
    assert continued("^ababacccc", "b") == "B", "special tokens are none of the eight"
    assert continued("^abababa ", "b") == "b"


def test_bytes_that_are_no_utf8_cost_only_themselves(byte_fallback: Tokenizer) -> None:
    ids = [1, 4 + 0x80, 2, 4 + 0xE2, 4 + 0x96, 3, 4 + 0xC3, 4 + 0xA9]
    assert byte_fallback.decode(ids) == "the\ufffd cat\ufffdsé"
    assert byte_fallback.decode([1, 2, 3]) == byte_fallback.inner.decode([1, 2, 3]) == "the cats"


def test_text_that_is_no_unicode_is_refused_clearly(smollm2: LoadedModel) -> None:
    for encode in (smollm2.tokenizer.encode, lambda text: smollm2.tokenizer.encode_batch([text])):
        with pytest.raises(InvalidRequest, match=r"lone surrogate \(U\+D83D\) at character 2"):
            encode("ab\ud83d")
    with pytest.raises(InvalidRequest, match="not bytes"):
        smollm2.tokenizer.encode(b"bytes")  # type: ignore[arg-type]


def gguf_with(tmp_path: Path, **changes: object) -> GGUF:
    gguf = GGUF.__new__(GGUF)
    gguf.path, gguf.tensors = tmp_path / "some.gguf", {}
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "123", "<s>", "<tool>"]
    values = {"model": "gpt2", "tokens": tokens, "merges": ["1 2", "12 3"], "bos_token_id": len(tokens) - 2}
    values |= {"token_type": [1] * (len(tokens) - 2) + [3, 4], **changes}
    gguf.metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return gguf


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("qwen2", ["1", "2", "3"]), ("smollm", ["1", "2", "3"]), ("llama-bpe", ["<s>", "123"]), ("gpt2", ["123"])],
)
def test_pre_tokenizers_cut_numbers_their_own_way(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_gguf(gguf_with(tmp_path, pre=pre))
    assert [tokenizer.inner.id_to_token(index) for index in tokenizer.encode("123")] == pieces
    assert tokenizer.decode(tokenizer.encode("a<tool>b<s>")) == "a<tool>b", "user-defined tokens are text"
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 👩‍🚀")) == "naïve 漢字 👩‍🚀"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [({"pre": "deepseek-llm"}, "'deepseek-llm' is not supported"), ({"model": "bert"}, "'bert' is not supported"),
     ({"tokens": []}, "tokens is missing"), ({"tokens": ["a", "a"]}, "repeats a token"),
     ({"merges": ["12"]}, "not a pair"), ({"merges": ["q zz"]}, "cannot be built"),
     ({"add_bos_token": True, "bos_token_id": 10**6}, "bos_token_id 1000000")],
)  # fmt: skip
def test_a_vocabulary_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], cause: str
) -> None:
    with pytest.raises(ModelError, match=r"some\.gguf") as caught:
        build(gguf_with(tmp_path, **changes))
    assert cause in str(caught.value)
    assert "qwen2" in PRE_TOKENIZERS


def test_the_padding_and_truncation_of_a_training_run_are_forgotten() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.enable_truncation(2)
    inner.enable_padding(length=4)
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode("b") == [1]
    assert tokenizer.encode_batch(["b", "b b b"]) == [[1], [1, 1, 1]]


def test_a_text_ends_at_every_end_token_and_an_example_at_the_one_that_is_named() -> None:
    names = ["<|im_end|>", "</s>", "<mine>"]
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    inner.add_special_tokens(names)
    ends: dict[str, Any] = {name: inner.token_to_id(name) for name in names}
    tokenizer = Tokenizer(inner, eos_ids=[ends["<mine>"]])
    assert tokenizer.eos_ids == set(ends.values())
    assert tokenizer.main_eos_id == ends["<mine>"]
    assert Tokenizer(inner).main_eos_id == ends["<|im_end|>"]


def test_of_several_templates_the_default_is_taken_and_with_tools_the_one_for_them(
    tmp_path: Path, minilm: LoadedModel
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((minilm.path / "tokenizer.json").read_bytes())
    templates = [{"name": "tool_use", "template": "X"}, {"name": "default", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    found = Tokenizer.from_folder(tmp_path).templates
    assert [choose(found, tools, "m") for tools in (False, True)] == ["T", "X"]
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_folder(tmp_path).templates == {"default": "J"}


def test_a_folder_says_how_its_model_ends(tmp_path: Path, minilm: LoadedModel) -> None:
    with pytest.raises(ModelError, match="save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((minilm.path / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "[CLS]"}, "chat_template": [{"name": "default", "template": "T"}]})
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [102, 5]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.main_eos_id, tokenizer.bos_id) == (frozenset({102, 5}), 102, 101)
    assert tokenizer.templates == {"default": "T"}
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ModelError, match=r"config\.json"):
        Tokenizer.from_folder(tmp_path)

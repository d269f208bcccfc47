"""The files around a tokenizer.json: read as transformers reads them (tests/goldens/text/folders.py), or refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, processors

from engine.text import chat
from engine.text.detokenizer import StreamingDetokenizer
from engine.text.templates import choose
from engine.text.tokenizer import Manners, Tokenizer
from stoker.errors import InvalidRequest, ModelError

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "text" / "folders.json").read_text())
#: (folder, place of the text) -> how Stoker's text differs from transformers', on purpose.
BETTER = {
    # tokenizers takes the letters of an added token for bytes.
    ("listed", 5): ("<\ufffd>", "<é>"),
    ("added and listed", 5): ("<\ufffd>", "<é>"),
    # The end of a turn is no text; its flag does not count.
    ("added and listed", 3): ("the<|im_end|>", "the"),
}


def folder(tmp_path: Path, base: str, files: dict[str, Any]) -> Path:
    every = {"config.json": {"model_type": "llama"}, "tokenizer.json": GOLDEN["bases"][base], **files}
    for name, content in every.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("golden", GOLDEN["folders"], ids=lambda golden: golden["name"])
def test_every_file_is_read_as_transformers_reads_it(tmp_path: Path, golden: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path, golden["base"], golden["files"]))
    assert tokenizer.manners.names == golden["names"]
    for index, (text, ids, decoded) in enumerate(zip(GOLDEN["texts"], golden["ids"], golden["decoded"], strict=True)):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == decoded.replace(*BETTER.get((golden["name"], index), ("", "")))
        assert tokenizer.encode_cut(text, 5) == golden["cut"][index]


@pytest.mark.parametrize("golden", GOLDEN["chats"], ids=lambda golden: golden["name"])
def test_the_template_is_that_of_transformers_with_tools_and_without(tmp_path: Path, golden: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path, "named", golden["files"]))
    messages = [{"role": "user", "content": "the model"}]
    for tools, text in zip((None, [{"type": "function"}]), golden["rendered"], strict=True):
        if text is None:
            with pytest.raises(InvalidRequest, match="m has no default chat template, only tool_use; with tools"):
                choose(tokenizer.templates, tools is not None, "m")
            continue
        template = choose(tokenizer.templates, tools is not None, "m")
        names = tokenizer.manners.names
        assert chat.render(template, messages, tools=tools, add_generation_prompt=False, names=names) == text


def test_the_templates_file_of_processors_counts_where_there_is_no_other(tmp_path: Path) -> None:
    path = folder(tmp_path, "named", {"chat_template.json": {"chat_template": "P"}})
    assert Tokenizer.from_folder(path).templates == {"default": "P"}
    folder(tmp_path, "named", {"tokenizer_config.json": {"chat_template": "C"}})
    assert Tokenizer.from_folder(path).templates == {"default": "C"}


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": ["<a>"]}, "added_tokens_decoder is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"one": "<a>"}}, "added_tokens_decoder is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"330": {}}}, r"added_tokens_decoder\[330\] is \{\}"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, not a token's text or object"),
        ("tokenizer_config.json", {"eos_token": ""}, 'eos_token is "", not a token\'s text'),
        ("tokenizer_config.json", {"extra_special_tokens": "<a>"}, 'extra_special_tokens is "<a>", not a list'),
        ("tokenizer_config.json", {"additional_special_tokens": [7]}, r"extra_special_tokens\[0\] is 7"),
        ("tokenizer_config.json", {"truncation_side": "middle"}, 'truncation_side is "middle"; "left" and "right"'),
        ("tokenizer_config.json", {"padding_side": "top"}, 'padding_side is "top"; "left" and "right"'),
        ("tokenizer_config.json", {"split_special_tokens": "yes"}, 'split_special_tokens is "yes", not true or false'),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template is neither a text nor a list"),
        ("tokenizer_config.json", {"eos_token": "\ud83d"}, "half a surrogate pair"),
        ("special_tokens_map.json", {"eos_token": [1]}, "eos_token is"),
        ("added_tokens.json", {"<a>": "x"}, "not an object of tokens and their ids"),
        ("added_tokens.json", {"<a>": True}, "not an object of tokens and their ids"),
        ("added_tokens.json", {"": 7}, "not an object of tokens and their ids"),
        ("chat_template.json", {"chat_template": 3}, "chat_template is neither a text nor a list"),
    ],
)  # fmt: skip
def test_what_cannot_be_understood_is_refused_by_name(tmp_path: Path, name: str, content: Any, cause: str) -> None:
    with pytest.raises(ModelError, match=cause) as caught:
        Tokenizer.from_folder(folder(tmp_path, "bytes", {name: content}))
    assert str(tmp_path) in str(caught.value)


def test_qwens_class_forgets_the_flags_of_its_special_tokens_and_no_other_does(tmp_path: Path) -> None:
    """As in transformers 5.23, which adds them again as they read."""
    named = {"content": "<a>", "lstrip": True, "normalized": False, "__type": "AddedToken"}
    for kind, spaces in (("Qwen2Tokenizer", 1), ("GPT2Tokenizer", 0)):
        files = {"tokenizer_config.json": {"tokenizer_class": kind, "sep_token": named}}
        tokenizer = Tokenizer.from_folder(folder(tmp_path, "bytes", files))
        space = tokenizer.encode(" ")
        assert tokenizer.encode("x <a>").count(space[0]) == spaces


def test_a_class_of_another_vocabulary_names_no_special_tokens(tmp_path: Path) -> None:
    """transformers takes such a folder's tokenizer.json as it is; "<s>" is text there."""
    files = {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}
    tokenizer = Tokenizer.from_folder(folder(tmp_path, "bytes", files))
    assert tokenizer.manners.names == {}
    assert len(tokenizer.encode("<s>")) == len("<s>")


def test_a_vocabulary_without_its_token_for_unknown_words_is_refused_by_name(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "unk_token": "[GONE]"}}
    with pytest.raises(ModelError, match=r"has no token '\[GONE\]', which would stand for every unknown word"):
        Tokenizer.from_folder(folder(tmp_path, "words", files))


def test_a_text_that_a_vocabulary_cannot_hold_is_that_texts_error() -> None:
    """tokenizers raises a plain Exception then."""
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.Unigram([("a", -1.0)], None, byte_fallback=False)))
    assert tokenizer.encode("a") == [0]
    for encode in (
        tokenizer.encode,
        lambda text: tokenizer.encode_batch([text]),
        lambda text: tokenizer.encode_cut(text, 3),
    ):
        with pytest.raises(InvalidRequest, match="fails on the text"):
            encode("b")


def test_a_switch_of_a_class_that_is_no_switch_is_refused(tmp_path: Path) -> None:
    files = {"tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": "no"}}
    with pytest.raises(ModelError, match='do_lower_case is "no", not true or false'):
        Tokenizer.from_folder(folder(tmp_path, "words", files))


def test_a_padding_token_for_which_the_model_has_no_row_is_left_out(tmp_path: Path) -> None:
    size = len(GOLDEN["bases"]["bytes"]["model"]["vocab"])
    config = {"pad_token": "<nothing>", "sep_token": "<extra>"}
    for rows, pad in ((size, None), (size + 2, size + 1)):
        files = {"tokenizer_config.json": config, "config.json": {"model_type": "llama", "vocab_size": rows}}
        tokenizer = Tokenizer.from_folder(folder(tmp_path, "bytes", files))
        assert (tokenizer.pad_id, tokenizer.encode("<extra>")) == (pad, [size])


@pytest.mark.parametrize("special", [True, False])
def test_the_end_of_a_turn_ends_and_is_no_text_with_either_flag(tmp_path: Path, special: bool) -> None:
    listed = {"330": {"content": "<|im_end|>", "special": special}, "331": {"content": "<b>", "special": False}}
    tokenizer = Tokenizer.from_folder(
        folder(tmp_path, "bytes", {"tokenizer_config.json": {"added_tokens_decoder": listed}})
    )
    assert 330 in tokenizer.eos_ids
    assert tokenizer.decode(tokenizer.encode("the<|im_end|><b>")) == "the<b>"


def test_a_special_tokens_name_outside_ascii_reads_as_it_is_written(tmp_path: Path) -> None:
    names = ["<é>", "<｜end▁of▁sentence｜>", "<|конец|>"]
    for base in ("bytes", "sentences"):
        files = {"tokenizer_config.json": {"extra_special_tokens": names}}
        tokenizer = Tokenizer.from_folder(folder(tmp_path, base, files))
        for name in names:
            ids = tokenizer.encode(name, special=False)[-1:]
            assert tokenizer.decode(ids, skip_special=False) == name
            assert tokenizer.spelled(ids[0]) == name
            assert tokenizer.special_within([f"\n{name}user"]) == {ids[0]: name}


def test_a_text_is_cut_as_transformers_cuts_it(tmp_path: Path) -> None:
    for side in ("right", "left"):
        config = {"tokenizer_class": "BertTokenizer", "truncation_side": side}
        tokenizer = Tokenizer.from_folder(folder(tmp_path, "words", {"tokenizer_config.json": config}))
        whole = tokenizer.encode("the model of the model")
        cut = whole[:4] if side == "right" else [whole[0], *whole[-4:-1]]
        assert tokenizer.encode_cut("the model of the model", 5) == [*cut, whole[-1]]
    # Without such a word, as the file's own truncation says.
    base = {**GOLDEN["bases"]["words"], "truncation": {"direction": "Left", "max_length": 9, "strategy": "LongestFirst",
                                                       "stride": 0}}  # fmt: skip
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(base))
    tokenizer = Tokenizer.from_folder(tmp_path)
    whole = tokenizer.encode("the model of the model")
    assert tokenizer.encode_cut("the model of the model", 5) == [whole[0], *whole[-4:]]


@pytest.mark.parametrize("base", ["sentences", "words", "bytes"])
def test_a_continuation_keeps_its_first_space(tmp_path: Path, base: str) -> None:
    """What is written behind a prompt is what both together read, less the prompt."""
    config = {"tokenizer_class": "LlamaTokenizer"} if base == "sentences" else {}
    tokenizer = Tokenizer.from_folder(folder(tmp_path, base, {"tokenizer_config.json": config}))
    prompt = tokenizer.encode("the model", special=False)
    answer = tokenizer.encode("the model of the warm", special=False)[len(prompt) :]
    stream = StreamingDetokenizer(tokenizer, after=prompt)
    text = "".join(map(stream.add, answer)) + stream.finish()
    assert text == " of the warm"
    # A text begins also where only special tokens come before it.
    specials = sorted(tokenizer.special_ids)
    stream = StreamingDetokenizer(tokenizer, after=specials)
    whole = tokenizer.encode("the model", special=False)
    assert "".join(map(stream.add, whole)) + stream.finish() == "the model"


def test_a_token_by_itself_keeps_its_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder(tmp_path, "sentences", {}))
    assert tokenizer.spelled(tokenizer.inner.token_to_id("▁the") or 0) == " the"
    words = Tokenizer.from_folder(folder(tmp_path, "words", {}))
    assert words.spelled(words.inner.token_to_id("the") or 0) == "the"


def test_spaces_are_cleaned_where_transformers_would(tmp_path: Path) -> None:
    clean = {"clean_up_tokenization_spaces": True}
    forced = {**clean, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    for base, config, cleans in (("words", clean, True), ("bytes", clean, False), ("bytes", forced, True),
                                 ("words", {}, False)):  # fmt: skip
        found = Tokenizer.from_folder(folder(tmp_path, base, {"tokenizer_config.json": config}))
        assert found.manners.cleans_spaces is cleans


def test_a_token_that_the_model_names_is_no_text() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, unk_token="a"))
    inner.add_tokens(["<s>"])
    assert Tokenizer(inner, manners=Manners({"bos_token": "<s>"})).decode([1, 0]) == "a"
    assert "<s>" in Tokenizer(inner).decode([1, 0])


@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize("both", [False, True], ids=["two tokens", "one token"])
@pytest.mark.parametrize("filed", ["begun", "begun and ended", "ended"])
def test_a_text_is_begun_and_ended_as_its_files_ask(
    tmp_path: Path, begins: bool | None, both: bool, filed: str
) -> None:
    """Of a decoder that embeds. A model may begin and end its texts with one token, as GPT-2's family does."""
    source = Path(__file__).parents[1] / "goldens" / "architectures" / "mistral"
    inner = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    first, last = 1, 1 if both else 2
    names = [str(inner.id_to_token(index)) for index in (first, last)]
    single = [*names[: "begun" in filed], "$A", *names[1:][: "ended" in filed]]
    tokens = [*dict.fromkeys(zip(names, (first, last), strict=True))]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=tokens)
    inner.save(str(tmp_path / "tokenizer.json"))
    said = {"bos_token": names[0], "eos_token": names[1], "add_eos_token": True}
    said |= {} if begins is None else {"add_bos_token": begins}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.from_folder(tmp_path, ends=True)
    ids = tokenizer.encode("heat and heat", special=False)
    assert tokenizer.encode("heat and heat") == [
        *([first] if "begun" in filed and begins is not False else []),
        *ids,
        last,
    ]


#: Whole words, letters and marks, and the tokens of each of the classes.
_PIECES = (
    ["<pad>", "<s>", "</s>", "<unk>", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "<mask>", "[MASK]"],
    ["▁the", "▁hot", "hot", "▁", "T", "t", "h", "o", "e", "é", "!", '"'],
)
#: A table that leaves every character as it is.
_TABLE = base64.b64encode((1024).to_bytes(4, "little") + bytes(1024)).decode()


def sentences(post_processor: dict[str, Any] | None = None) -> dict[str, Any]:
    """A Unigram vocabulary whose file makes small letters behind SentencePiece's table."""
    vocabulary = [[piece, 0.0] for piece in _PIECES[0]] + [[piece, -2.0] for piece in _PIECES[1]]
    steps = [{"type": "Precompiled", "precompiled_charsmap": _TABLE}, {"type": "Lowercase"}]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "decoder": None,
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "post_processor": post_processor,
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary, "byte_fallback": False},
    }  # fmt: skip


def of_class(tmp_path: Path, name: str, base: dict[str, Any], **switches: Any) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_text(json.dumps(base))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **switches}))
    return Tokenizer.from_folder(tmp_path)


_TWICE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}, *[{"SpecialToken": {"id": "[SEP]", "type_id": 0}}] * 2],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [6], "tokens": ["[SEP]"]}},
}


@pytest.mark.parametrize(
    ("name", "switches", "text", "tokens"),
    [("T5Tokenizer", {}, "the  hot\nthe ", "▁the ▁hot ▁the </s>"),
     ("T5Tokenizer", {"add_prefix_space": False}, "The", "▁ T h e </s>"),
     ("CamembertTokenizer", {}, "the \t hot", "<s> ▁the ▁hot </s>"),
     ("CamembertTokenizer", {"add_prefix_space": False}, "hot the", "<s> hot t h e </s>"),
     ("AlbertTokenizer", {}, "The ``hot''  thé", '[CLS] ▁the ▁ " hot " ▁the [SEP]'),
     ("AlbertTokenizer", {"keep_accents": True}, "Thé", "[CLS] ▁ t h é [SEP]"),
     ("AlbertTokenizer", {"do_lower_case": False}, "The", "[CLS] ▁ T h e [SEP]"),
     ("DebertaV2Tokenizer", {}, " the  hot \n", "[CLS] ▁the ▁hot [SEP]"),
     ("DebertaV2Tokenizer", {}, "The", "[CLS] ▁ T h e [SEP]"),
     ("DebertaV2Tokenizer", {"do_lower_case": True}, "The", "[CLS] ▁the [SEP]"),
     ("DebertaV2Tokenizer", {}, "hot!hot", "[CLS] ▁hot ! hot [SEP]"),
     ("DebertaV2Tokenizer", {"split_by_punct": True}, "hot!hot", "[CLS] ▁hot ▁ ! ▁hot [SEP]")],
)  # fmt: skip
def test_a_class_of_sentencepieces_builds_what_is_its_own(
    tmp_path: Path, name: str, switches: dict[str, Any], text: str, tokens: str
) -> None:
    """Of the file it takes the vocabulary and, ALBERT's, what stands around a text."""
    assert of_class(tmp_path, name, sentences(), **switches).inner.encode(text).tokens == tokens.split()
    behind = of_class(tmp_path, name, sentences(_TWICE), **switches).inner.encode(text).tokens
    assert (behind[-2:] == ["[SEP]", "[SEP]"]) is (name == "AlbertTokenizer")


@pytest.mark.parametrize(
    ("model", "tokens", "types"),
    [("t5", "▁the </s> ▁hot </s>", None),
     ("camembert", "<s> ▁the </s> </s> ▁hot </s>", None),
     ("albert", "[CLS] ▁the [SEP] ▁hot [SEP]", [0, 0, 0, 1, 1]),
     ("deberta-v2", "[CLS] ▁the [SEP] ▁hot [SEP]", [0, 0, 0, 1, 1])],
)  # fmt: skip
def test_a_pair_of_a_class_that_only_the_model_names_is_put_together_as_it_does(
    tmp_path: Path, model: str, tokens: str, types: list[int] | None
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentences()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    found = tokenizer.inner.encode("the", "hot")
    assert found.tokens == tokens.split()
    assert tokenizer.manners.types is (types is not None)
    if types is not None:
        assert found.type_ids == types


@pytest.mark.parametrize(
    ("name", "left"),
    [("T5Tokenizer", ["Precompiled"]), ("CamembertTokenizer", ["Precompiled"]), ("DebertaV2Tokenizer", ["Precompiled"]),
     ("XLMRobertaTokenizer", ["Precompiled"]), ("AlbertTokenizer", ["Lowercase", "Precompiled"])],
)  # fmt: skip
def test_of_what_a_file_does_to_characters_its_table_alone_is_left(tmp_path: Path, name: str, left: list[str]) -> None:
    """With ALBERT's own small letters before it. Of DeBERTa's transformers 5 leaves not even the table."""
    built = json.loads(of_class(tmp_path, name, sentences()).inner.to_str())
    kinds = [step["type"] for step in built["normalizer"]["normalizers"]]
    assert [kind for kind in kinds if kind in ("Precompiled", "Lowercase")] == left

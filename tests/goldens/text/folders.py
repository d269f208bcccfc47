"""Makes folders.json: what transformers makes of a tokenizer.json and the files around it, one deviation a folder.

Run it in the environment of `make goldens`, with sentencepiece added; torch is not needed.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
from texts import CORPUS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

HERE = Path(__file__).resolve().parent
TEXTS = [
    "the model is warm",
    " The Café of the 1969 workers, isn't it ",
    "<s>the</s> the",
    "<|im_start|>user\nthe<|im_end|>\n<extra> model",
    "[CLS] the [MASK] of [SEP] [PAD] <tool> the",
    "我能 naïve <é> <｜end▁of▁sentence｜> the",
]
CHAT = [{"role": "user", "content": "the model"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ sep_token }}{{ m.content }}{{ eos_token }}{{ image_token }}"
    "{{ unk_token }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
)


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **plain, **flags}


def byte_level(vocab: bool = False) -> dict[str, Any]:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>", "<|endoftext|>"] if vocab else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
    )
    trained.train_from_iterator([CORPUS] * 4, trainer)
    content: dict[str, Any] = json.loads(trained.to_str())
    return content | {"added_tokens": []}


def word_piece() -> dict[str, Any]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>", "<pad>", "<mask>"]
    letters = sorted({letter for letter in CORPUS + CORPUS.lower() + "aeiouc" if not letter.isspace()})
    words = ["the", "model", "of", "warm", "The", "##é", "café", "Café"]
    vocab = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    made = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(dict.fromkeys(vocab))}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece("##")
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    made.add_special_tokens(special[:5])
    content: dict[str, Any] = json.loads(made.to_str())
    return content


def sentence_piece() -> dict[str, Any]:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 3),
        model_writer=trained,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    size = processor.vocab_size()
    vocab = {processor.id_to_piece(index): index for index in range(size)}
    merges = generate_merges(vocab, {piece: processor.get_score(index) for piece, index in vocab.items()})
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    content: dict[str, Any] = json.loads(made.to_str())
    return content


BASES = {
    "bytes": byte_level,
    "named": lambda: byte_level(vocab=True),
    "words": word_piece,
    "sentences": sentence_piece,
}
_LISTED = {"330": token("<|im_start|>"), "331": token("<|im_end|>", special=False), "332": token("<é>", special=False)}
_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
_LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}
_BERT = {"tokenizer_class": "BertTokenizer"}
#: Folder -> (its base, tokenizer_config.json or None, other files).
FOLDERS: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "plain": ("bytes", _FAST, {}),
    "no config": ("bytes", None, {}),
    "listed": ("bytes", {**_FAST, "added_tokens_decoder": _LISTED, "eos_token": "<|im_end|>"}, {}),
    "listed with gaps": ("bytes", {"added_tokens_decoder": {"400": token("<b>"), "350": token("<extra>")}}, {}),
    "listed changes flags": ("words", {**_FAST, "added_tokens_decoder": {"4": token("[MASK]", lstrip=True)}}, {}),
    "named in the vocabulary": ("named", {**_FAST, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {}),
    "named as objects": ("named", {"bos_token": {"__type": "AddedToken", **token("<s>", lstrip=True)}}, {}),
    "named anew": ("bytes", {**_FAST, "sep_token": "<extra>", "mask_token": "[MASK]"}, {}),
    "extra list": ("bytes", {**_FAST, "extra_special_tokens": ["<extra>", "<|im_start|>"]}, {}),
    "extra names": ("bytes", {**_FAST, "extra_special_tokens": {"image_token": "<extra>"}}, {}),
    "additional": (
        "bytes",
        {**_FAST, "additional_special_tokens": ["<extra>", {"__type": "AddedToken", **token("<é>")}]},
        {},
    ),
    "extra names and additional": (
        "bytes",
        {**_FAST, "extra_special_tokens": {"image_token": "<extra>"}, "additional_special_tokens": ["<b>"]},
        {},
    ),
    "other names": ("bytes", {**_FAST, "image_token": "<extra>"}, {}),
    "outside ASCII": ("bytes", {**_FAST, "eos_token": "<｜end▁of▁sentence｜>"}, {}),
    "map": ("named", _FAST, {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": token("</s>")}}),
    "map goes first": (
        "named",
        {**_FAST, "eos_token": "<unk>"},
        {"special_tokens_map.json": {"eos_token": "</s>", "extra_special_tokens": ["<extra>"]}},
    ),
    "map and a list": (
        "named",
        {**_FAST, "added_tokens_decoder": {}, "eos_token": "<unk>"},
        {"special_tokens_map.json": {"eos_token": "</s>"}, "added_tokens.json": {"<extra>": 330}},
    ),
    "old extra in the map": ("bytes", _FAST, {"special_tokens_map.json": {"additional_special_tokens": ["<extra>"]}}),
    "added": (
        "bytes",
        {**_FAST, "eos_token": "<|im_end|>"},
        {"added_tokens.json": {"<|im_end|>": 331, "<|im_start|>": 330, "<extra>": 332}},
    ),
    "added and listed": ("bytes", {**_FAST, "added_tokens_decoder": _LISTED}, {"added_tokens.json": {"<extra>": 340}}),
    "bos asked for": ("named", {**_FAST, "bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}, {}),
    "bos not asked for": ("sentences", {**_LLAMA, "bos_token": "<s>", "add_bos_token": False}, {}),
    "split": ("named", {**_FAST, "bos_token": "<s>", "split_special_tokens": True}, {}),
    "space before bytes": ("bytes", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}),
    "space before bytes, generic": ("bytes", {**_FAST, "add_prefix_space": True}, {}),
    "llama": ("sentences", _LLAMA, {}),
    "llama, legacy": ("sentences", {**_LLAMA, "legacy": True}, {}),
    "llama, no space": ("sentences", {**_LLAMA, "add_prefix_space": False}, {}),
    "sentences, generic": ("sentences", {**_FAST, "add_prefix_space": False}, {}),
    "llama of bytes": ("bytes", {**_LLAMA, "add_prefix_space": True}, {}),
    "bert": ("words", _BERT, {}),
    "bert by its model": ("words", None, {"config.json": {"model_type": "bert"}}),
    "bert, cased": ("words", {**_BERT, "do_lower_case": False}, {}),
    "bert, accents": ("words", {**_BERT, "strip_accents": False}, {}),
    "bert, cased without accents": ("words", {**_BERT, "do_lower_case": False, "strip_accents": True}, {}),
    "bert, Chinese": ("words", {**_BERT, "tokenize_chinese_chars": False}, {}),
    "bert, other names": ("words", {**_BERT, "cls_token": "<s>", "sep_token": "</s>"}, {}),
    "bert, other unknown": ("words", {**_BERT, "unk_token": "[MASK]"}, {}),
    "bert, no mask": ("words", {**_BERT, "mask_token": None}, {}),
    "bert, not all listed": ("words", {**_BERT, "added_tokens_decoder": {"0": token("[PAD]")}, "mask_token": None}, {}),
    "bert, left": ("words", {**_BERT, "truncation_side": "left"}, {}),
    "roberta": (
        "named",
        {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True, "pad_token": "<unk>", "mask_token": "</s>"},
        {},
    ),
    "named twice with other flags": (
        "bytes",
        {**_FAST, "eos_token": {"__type": "AddedToken", **token("<extra>", lstrip=True)}, "mask_token": "<extra>"},
        {},
    ),
    "llama, left": ("sentences", {**_LLAMA, "truncation_side": "left"}, {}),
    "bert, generic": ("words", {**_FAST, "do_lower_case": False}, {"config.json": {"model_type": "bert"}}),
    "distilbert": ("words", {"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False}, {}),
    "mpnet": ("words", {"tokenizer_class": "MPNetTokenizer", "do_lower_case": False}, {}),
    "mpnet by its model": ("words", {}, {"config.json": {"model_type": "mpnet"}}),
}
#: Folder -> files with templates.
TEMPLATES: dict[str, dict[str, Any]] = {
    "one": {"tokenizer_config.json": {"chat_template": TEMPLATE}},
    "list": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": TEMPLATE}]
        }
    },
    "object": {"tokenizer_config.json": {"chat_template": {"default": TEMPLATE, "rag": "R"}}},
    "only tools": {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": TEMPLATE}]}},
    "file": {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "no"}},
    "folder": {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": TEMPLATE},
    "folder and config": {
        "additional_chat_templates/tool_use.jinja": TEMPLATE,
        "tokenizer_config.json": {"chat_template": "no"},
    },
}


def main() -> None:
    made_with = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "sentencepiece")}
    bases = {name: make() for name, make in BASES.items()}
    folders = [
        asked(name, base, bases[base], {**others, **({} if config is None else {"tokenizer_config.json": config})})
        for name, (base, config, others) in FOLDERS.items()
    ]
    names = {**_FAST, "bos_token": "<s>", "eos_token": "</s>", "sep_token": "<unk>", "image_token": "<image>"}
    chats = [
        chatted(name, bases["named"], files | {"tokenizer_config.json": names | files.get("tokenizer_config.json", {})})
        for name, files in TEMPLATES.items()
    ]
    content = {"made_with": made_with, "texts": TEXTS, "bases": bases, "folders": folders, "chats": chats}
    (HERE / "folders.json").write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def written(folder: Path, base: dict[str, Any], files: dict[str, Any]) -> Any:
    for name, content in {"config.json": {"model_type": "llama"}, "tokenizer.json": base, **files}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return AutoTokenizer.from_pretrained(folder)


def asked(name: str, base: str, content: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = written(Path(folder), content, files)
        ids = [tokenizer.encode(text) for text in TEXTS]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        cut = [tokenizer(text, truncation=True, max_length=5)["input_ids"] for text in TEXTS]
        return {"name": name, "base": base, "files": files, "ids": ids, "decoded": texts, "cut": cut,
                "names": tokenizer.special_tokens_map}  # fmt: skip


def chatted(name: str, base: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = written(Path(folder), base, files)
        rendered: list[str | None] = []
        for tools in (None, [{"type": "function"}]):
            try:
                rendered.append(tokenizer.apply_chat_template(CHAT, tools=tools, tokenize=False))
            except ValueError:  # no default
                rendered.append(None)
        return {"name": name, "files": files, "rendered": rendered}


if __name__ == "__main__":
    main()

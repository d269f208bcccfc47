"""What transformers' tokenizer classes make of a `tokenizer.json`.

Some classes take no more than the vocabulary from it and build the rest themselves, by the switches of
`tokenizer_config.json` and defaults of their own. The others, and every class for a vocabulary of another kind than
its own, take the file as it is. How a byte-level vocabulary cuts words is always the file's: a model was trained with
it, so the named class changes nothing there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.text.pieces import SPACE
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: Classes that transformers builds as BERT's; ELECTRA's and the others that follow are BERT's by another name.
_BERT = (
    "BertTokenizer", "DistilBertTokenizer", "MPNetTokenizer", "ElectraTokenizer", "MobileBertTokenizer",
    "SqueezeBertTokenizer", "LayoutLMTokenizer", "LxmertTokenizer",
)  # fmt: skip
_BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer", "BartTokenizer")
#: Classes of vocabularies that SentencePiece made.
_SENTENCES = ("XLMRobertaTokenizer", "CamembertTokenizer", "AlbertTokenizer", "DebertaV2Tokenizer", "T5Tokenizer")
#: The class that takes the file as it is.
_GENERIC = "TokenizersBackend"
#: The class that transformers takes for a model where its files name none.
_OF_MODEL = {
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "electra": "BertTokenizer",
    "camembert": "CamembertTokenizer",
    "albert": "AlbertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "t5": "T5Tokenizer",
    "mpnet": "MPNetTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "nomic_bert": "BertTokenizer",
    "gte": "XLMRobertaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "mistral": _GENERIC,
}
_BERT_NAMES = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
_GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_ROBERTA_NAMES = {
    "bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>",
    "pad_token": "<pad>", "mask_token": "<mask>",
}  # fmt: skip
#: The names that a class has for its special tokens where no file gives them.
_DEFAULT_NAMES = {
    **dict.fromkeys(_BERT, _BERT_NAMES),
    "MPNetTokenizer": {**_ROBERTA_NAMES, "unk_token": "[UNK]"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": _GPT2_NAMES,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    **dict.fromkeys(
        ("RobertaTokenizer", "BartTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer"), _ROBERTA_NAMES
    ),
    "AlbertTokenizer": {**_BERT_NAMES, "bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "<unk>",
                        "pad_token": "<pad>"},
    "DebertaV2Tokenizer": {**_BERT_NAMES, "bos_token": "[CLS]", "eos_token": "[SEP]"},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}  # fmt: skip

#: Classes that build the rest themselves, and of which kind the vocabulary is that they take.
_BUILDERS = {
    **dict.fromkeys(_BERT, models.WordPiece),
    **dict.fromkeys((*_BYTE_LEVEL, "LlamaTokenizer"), models.BPE),
    **dict.fromkeys(_SENTENCES, models.Unigram),
}
#: Classes that put tokens of their own before and behind a text, by the names of those.
_SURROUND = {
    **dict.fromkeys(
        (*_BERT, "RobertaTokenizer", "BartTokenizer", "AlbertTokenizer", "DebertaV2Tokenizer"),
        ("cls_token", "sep_token"),
    ),
    **dict.fromkeys(("XLMRobertaTokenizer", "CamembertTokenizer"), ("bos_token", "eos_token")),
}

#: Classes whose pairs have two tokens between the texts, and no token types.
_UNTYPED = ("MPNetTokenizer", "RobertaTokenizer", "BartTokenizer", "XLMRobertaTokenizer", "CamembertTokenizer")
#: Others that give a model no token types. ALBERT's did until transformers 5 forgot it, so models were trained with
#: them: it does here.
_ALSO_UNTYPED = ("DistilBertTokenizer", "T5Tokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer")


class TokenizerPipeline:
    """The class that transformers would take, and what it does. `config` is tokenizer_config.json's, `model`
    config.json's."""

    def __init__(self, path: Path, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        self._path, self._config = path, config
        named = config.get("tokenizer_class") or model.get("tokenizer_class")
        kind = str(model.get("model_type"))
        usual = _OF_MODEL.get(kind)
        name = named.removesuffix("Fast") if isinstance(named, str) else (usual or _GENERIC)
        # transformers knows that Qwen2's folders name wrong classes, and builds Mistral's as their files say.
        self.name = usual if usual is not None and kind in ("qwen2", "mistral") else name

    def default_names(self, inner: Tokenizer) -> Mapping[str, str]:
        """The class's own special tokens; none where it is not the class of such a vocabulary."""
        return {} if self._misnamed(inner) else _DEFAULT_NAMES.get(self.name, {})

    @property
    def forgets_flags(self) -> bool:
        """Whether the class adds its special tokens again in the end, as they read: their other flags are gone."""
        return self.name == "Qwen2Tokenizer"

    @property
    def gives_types(self) -> bool:
        """Whether the class gives a model the text that a token is of."""
        stated = self._config.get("model_input_names")
        if isinstance(stated, list):
            return "token_type_ids" in stated
        return self.name not in (*_UNTYPED, *_ALSO_UNTYPED)

    def built(self, inner: Tokenizer, listed: Sequence[AddedToken] | None) -> Tokenizer:
        """`inner`, changed as the class would. Such a class has no added tokens except those that are `listed`, where
        there is a list. Raises `ModelError` for a switch that is neither true nor false."""
        builds = _BUILDERS.get(self.name)
        if builds is not None and isinstance(inner.model, builds) and not self._misnamed(inner):
            inner = _with_added(inner, listed)
            self._build(inner)
        inner.encode_special_tokens = self._switch("split_special_tokens", False)
        return inner

    def _misnamed(self, inner: Tokenizer) -> bool:
        """Llama 3's vocabulary is no Llama's, although its folder may say so."""
        return self.name == "LlamaTokenizer" and any(
            isinstance(step, pre_tokenizers.ByteLevel) for step in _steps(inner.pre_tokenizer)
        )

    def _build(self, inner: Tokenizer) -> None:
        if self.name in _BERT:
            self._as_bert(inner)
        elif self.name == "LlamaTokenizer":
            self._as_llama(inner)
        elif self.name == "DebertaV2Tokenizer":
            self._as_deberta(inner)
        elif self.name in _SENTENCES:
            self._as_sentences(inner)
        for step in _steps(inner.pre_tokenizer):
            if isinstance(step, pre_tokenizers.ByteLevel):
                step.add_prefix_space = self._switch("add_prefix_space", False)

    def surround(self, inner: Tokenizer, names: Mapping[str, str]) -> None:
        """Put the class's tokens around every text: `names` are its special tokens'. Most leave that to the file."""
        builds = _BUILDERS.get(self.name)
        if builds is None or not isinstance(inner.model, builds):
            return
        if self.name == "T5Tokenizer":
            _end_each(inner, names.get("eos_token", ""))
        # Of ALBERT's, the file's own goes before.
        if self.name not in _SURROUND or (self.name == "AlbertTokenizer" and inner.post_processor is not None):
            return
        if isinstance(inner.model, models.WordPiece) and names.get("unk_token"):
            inner.model.unk_token = names["unk_token"]
        before, behind = (names.get(name, "") for name in _SURROUND[self.name])
        first, last = inner.token_to_id(before), inner.token_to_id(behind)
        if first is not None and last is not None:
            around = ((behind, last), (before, first))
            inner.post_processor = (
                processors.RobertaProcessing(*around, trim_offsets=False, add_prefix_space=False)
                if self.name in _UNTYPED
                else processors.BertProcessing(*around)
            )

    def _as_bert(self, inner: Tokenizer) -> None:
        inner.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=self._switch("tokenize_chinese_chars", True),
            strip_accents=self._switch("strip_accents", None),
            lowercase=self._switch("do_lower_case", True),
        )
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        inner.decoder = decoders.WordPiece(prefix="##")

    def _as_llama(self, inner: Tokenizer) -> None:
        """A space before a text, and none before what follows a special token, as SentencePiece does it; with `legacy`
        before both."""
        prefix = self._switch("add_prefix_space", True)
        scheme = "never" if not prefix else "always" if self._switch("legacy", False) else "first"
        inner.normalizer = None
        inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)

    def _as_sentences(self, inner: Tokenizer) -> None:
        """Words end at any white space, and of what the file does to characters SentencePiece's own table alone is
        left, with the class's own steps before it."""
        prefix = self.name == "T5Tokenizer" or self._switch("add_prefix_space", True)
        scheme = "always" if prefix else "never"
        steps = [*(self._of_albert() if self.name == "AlbertTokenizer" else []), *_table(inner)]
        inner.normalizer = normalizers.Sequence(steps) if steps else None
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)]
        )
        inner.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)

    def _of_albert(self) -> list[Any]:
        """Its quotation marks, accents and capital letters."""
        steps: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not self._switch("keep_accents", False):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
        return [*steps, normalizers.Lowercase()] if self._switch("do_lower_case", True) else steps

    def _as_deberta(self, inner: Tokenizer) -> None:
        """Its own steps stand around SentencePiece's table. transformers 5 drops that, and so the characters that a
        model was trained to read by it, such as a space that does not break: nothing says that it should."""
        small = [normalizers.Lowercase()] if self._switch("do_lower_case", False) else []
        spaces = normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " ")
        inner.normalizer = normalizers.Sequence(
            [*small, *_table(inner), spaces, normalizers.NFC(), normalizers.Strip(False, True)]
        )
        scheme = "always" if self._switch("add_prefix_space", True) else "first"
        marks = [pre_tokenizers.Punctuation("isolated")] if self._switch("split_by_punct", False) else []
        inner.pre_tokenizer = pre_tokenizers.Sequence([*marks, pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)])
        inner.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)

    def _switch(self, name: str, default: bool | None) -> Any:
        value = self._config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self._path}: {name} is {as_json(value)}, not true or false")
        return default if value is None else value


def _table(inner: Tokenizer) -> list[Any]:
    """SentencePiece's own table of characters, if the file has one."""
    present: Any = inner.normalizer
    steps = cast(Iterable[Any], present) if isinstance(present, normalizers.Sequence) else [present]
    return [step for step in steps if isinstance(step, normalizers.Precompiled)][:1]


def _end_each(inner: Tokenizer, end: str) -> None:
    """Put this token behind every text, of a pair too."""
    index = inner.token_to_id(end)
    if index is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, index)]
        )


def _with_added(inner: Tokenizer, listed: Sequence[AddedToken] | None) -> Tokenizer:
    """`inner`, without the added tokens that are not `listed`."""
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    if listed is None or known <= {token.content for token in listed}:
        return inner
    content = json.loads(inner.to_str())
    return Tokenizer.from_str(json.dumps({**content, "added_tokens": []}))


def _steps(pre_tokenizer: Any) -> Iterator[Any]:
    """The parts of a pre-tokenizer, each the one that is in use."""
    if isinstance(pre_tokenizer, pre_tokenizers.Sequence):
        for index in range(len(json.loads(pre_tokenizer.__getstate__())["pretokenizers"])):
            yield from _steps(pre_tokenizer[index])
    elif pre_tokenizer is not None:
        yield pre_tokenizer

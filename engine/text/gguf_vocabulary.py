"""A `tokenizers.Tokenizer` rebuilt from the vocabulary inside a GGUF file."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.weights.gguf import GGUF
from stoker.errors import ModelError

#: Token types of `tokenizer.ggml.token_type`.
_CONTROL, _USER_DEFINED = 3, 4

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"qwen2": rf"{_WORDS}|\p{{N}}|{_REST}", "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"}

#: `tokenizer.ggml.pre`: how text is cut before the merges. Another cut gives other ids, so unknown ones are refused.
PRE_TOKENIZERS = ("smollm", "qwen2", "llama-bpe", "gpt2", "gpt-2", "default")


def build(gguf: GGUF) -> Tokenizer:
    """The byte-level BPE tokenizer of `gguf`. Raises `ModelError` for another kind or a damaged vocabulary."""
    meta, where = gguf.metadata, gguf.path
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if model != "gpt2":
        raise ModelError(f"{where}: tokenizer.ggml.model {model!r} is not supported; gpt2 (byte-level BPE) is")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"{where}: tokenizer.ggml.pre {pre!r} is not supported; {', '.join(PRE_TOKENIZERS)} are")
    tokens = _strings(gguf, "tokenizer.ggml.tokens")
    merges = [_pair(gguf, merge) for merge in _strings(gguf, "tokenizer.ggml.merges")]
    types = meta.get("tokenizer.ggml.token_type", [1] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or not hasattr(types, "__len__") or len(types) != len(tokens):
        raise ModelError(f"{where}: its vocabulary repeats a token, or has another number of token types")
    try:
        # Llama 3 takes a whole word that is in the vocabulary before it tries any merge.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{where}: its vocabulary cannot be built: {error}") from error
    _set_pipeline(tokenizer, pre)
    marked = list(zip(tokens, types, strict=True))
    control = [token for token, kind in marked if kind == _CONTROL]
    defined = [token for token, kind in marked if kind == _USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
    _add_bos(tokenizer, meta, pre == "llama-bpe", tokens, gguf)
    return tokenizer


def _strings(gguf: GGUF, key: str) -> list[str]:
    value = gguf.metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ModelError(f"{gguf.path}: {key} is missing or not a list of texts")
    return value


def _pair(gguf: GGUF, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelError(f"{gguf.path}: the merge {merge[:40]!r} is not a pair")
    return left, right


def _set_pipeline(tokenizer: Tokenizer, pre: str) -> None:
    if pre in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()


def _add_bos(tokenizer: Tokenizer, meta: dict[str, Any], by_default: bool, tokens: list[str], gguf: GGUF) -> None:
    """Put the beginning-of-text token before every text, where the file asks for it."""
    if not meta.get("tokenizer.ggml.add_bos_token", by_default):
        return
    index = meta.get("tokenizer.ggml.bos_token_id")
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelError(f"{gguf.path}: tokenizer.ggml.bos_token_id {index!r} is no token of its vocabulary")
    bos = ("BOS", index)  # a name of our own: the token's text may hold characters that a template cannot
    tokenizer.post_processor = processors.TemplateProcessing(
        single="BOS $A", pair="BOS $A BOS $B:1", special_tokens=[bos]
    )

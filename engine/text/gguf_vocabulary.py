"""A `tokenizers.Tokenizer` rebuilt from the vocabulary inside a GGUF file."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.text import gguf_sentencepiece
from engine.text.gguf_fields import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary
from engine.weights.gguf import GGUF
from stoker.errors import ModelError

# How the models' own tokenizer.json cut a text before the merges; llama.cpp names each way (`tokenizer.ggml.pre`).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (rf"{_WORDS}|\p{{N}}|{_REST}",)
_LLAMA3 = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS = (r"\p{N}", *_GPT2)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
_TEKKEN = (rf"{_CASED}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED_O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}"
)
_O200K = (rf"{_CASED_O}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
# What llama.cpp does with a file that names none, or "default".
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")

_SPLITS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "dbrx": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "glm4": _LLAMA3,
    "chatglm-bpe": _LLAMA3,
    "gpt-4o": _O200K,
    "llama4": _O200K,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "tekken": _TEKKEN,
    "default": _DEFAULT,
}
#: Every `tokenizer.ggml.pre` that is known. Another cut gives other ids, so the rest is refused.
PRE_TOKENIZERS = tuple(_SPLITS)

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "midm-2.0")
#: These take a whole word that is in the vocabulary before they try any merge, and begin a text with BOS.
_WHOLE_WORDS = (*_LLAMA3_NAMES, "tekken")
_NFC = ("qwen2", "deepseek-r1-qwen")


def build(gguf: GGUF) -> Tokenizer:
    """The tokenizer of `gguf`: byte-level BPE ("gpt2") or SentencePiece ("llama").

    Raises `ModelError` for another kind, an unknown pre-tokenizer or a damaged vocabulary.
    """
    vocabulary = Vocabulary(gguf)
    model, pre = vocabulary.get("model"), vocabulary.get("pre", "default")
    try:
        if model == "llama":
            tokenizer = gguf_sentencepiece.build(vocabulary)
        elif model == "gpt2":
            tokenizer = _byte_level(vocabulary, pre)
        else:
            raise ModelError(
                f"{vocabulary.where}: tokenizer.ggml.model {model!r} is not supported; gpt2 (byte-level BPE) and llama "
                "(SentencePiece) are"
            )
    except ModelError:
        raise
    except Exception as error:  # the package raises plain Exception
        raise ModelError(f"{vocabulary.where}: its vocabulary cannot be built: {error}") from error
    control, defined = vocabulary.of_type(CONTROL, UNKNOWN), vocabulary.of_type(USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in defined])
    _surround(tokenizer, vocabulary, bos_by_default=model == "llama" or pre in _WHOLE_WORDS)
    return tokenizer


def _byte_level(vocabulary: Vocabulary, pre: object) -> Tokenizer:
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise ModelError(
            f"{vocabulary.where}: tokenizer.ggml.pre {pre!r} is not supported; {', '.join(PRE_TOKENIZERS)} are. "
            "Use the model's safetensors folder, whose tokenizer.json needs no such name"
        )
    merges = [_pair(vocabulary, merge) for merge in vocabulary.strings("merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.index, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pair(vocabulary: Vocabulary, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not (left and space and right):
        raise ModelError(f"{vocabulary.where}: the merge {merge[:40]!r} is not a pair")
    return left, right


def _surround(tokenizer: Tokenizer, vocabulary: Vocabulary, *, bos_by_default: bool) -> None:
    """Put the beginning and end tokens around every text, where the file asks for them."""
    marks = {
        # Names of our own: a token's text may hold characters that a template cannot.
        name: _required(vocabulary, f"{name.lower()}_token_id")
        for name, default in (("BOS", bos_by_default), ("EOS", False))
        if vocabulary.flag(f"add_{name.lower()}_token", default)
    }
    if not marks:
        return
    before, after = ("BOS " if "BOS" in marks else ""), (" EOS" if "EOS" in marks else "")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A{after}",
        pair=f"{before}$A{after} {before}$B:1{after}",
        special_tokens=list(marks.items()),
    )


def _required(vocabulary: Vocabulary, key: str) -> int:
    token = vocabulary.token(key)
    if token is None:
        raise ModelError(f"{vocabulary.where}: it asks for a token that it does not name: tokenizer.ggml.{key}")
    return token

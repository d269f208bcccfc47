"""Text to token ids and back, from a model folder or from a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from engine.jsonfiles import read_object
from engine.text.detokenizer import ByteStream
from engine.text.gguf_vocabulary import build
from engine.text.pieces import Pieces
from engine.weights.gguf import GGUF
from stoker.errors import InvalidRequest, ModelError

#: Special tokens that end a turn or a text in the model families in use. A checkpoint often names only one of its own.
END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "</s>",
)  # fmt: skip


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a model says about its special tokens.

    `eos_ids` ends generation; `bos_id`, `pad_id` and `chat_template` are None where the model has none.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ):
        # A tokenizer.json may carry the truncation and padding of somebody's training run.
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        special = {token.content: index for index, token in inner.get_added_tokens_decoder().items() if token.special}
        named = list(eos_ids)
        ends = [special[name] for name in END_TOKENS if name in special]
        self.eos_ids: frozenset[int] = frozenset(named + ends)
        #: The one to end a training example with: the first that the model names.
        self.main_eos_id: int | None = next(iter(named + ends), None)
        self.special_ids: frozenset[int] = frozenset(special.values())
        self.bos_id, self.pad_id, self.chat_template = bos_id, pad_id, chat_template
        #: The bytes of each token, None where they depend on its neighbours.
        self.pieces = Pieces.of(inner)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """From `tokenizer.json`, with `tokenizer_config.json`, `generation_config.json` and `config.json` beside it."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder}: no tokenizer.json. Write one with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{path}: {error}") from error
        config = read_object(folder / "tokenizer_config.json", missing={})
        eos = _ids_of(inner, config.get("eos_token"))
        for name in ("generation_config.json", "config.json"):
            eos += _ids_of(inner, read_object(folder / name, missing={}).get("eos_token_id"))
        return cls(
            inner,
            eos_ids=eos,
            bos_id=_first(_ids_of(inner, config.get("bos_token"))),
            pad_id=_first(_ids_of(inner, config.get("pad_token"))),
            chat_template=_folder_template(folder, config),
        )

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> Tokenizer:
        """Rebuilt from a GGUF file's vocabulary (byte-level BPE or SentencePiece). Raises `ModelError` for others."""
        inner = build(gguf)
        meta = gguf.metadata
        template = meta.get("tokenizer.chat_template")
        named = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
        return cls(
            inner,
            eos_ids=_ids_of(inner, named),
            bos_id=_first(_ids_of(inner, meta.get("tokenizer.ggml.bos_token_id"))),
            pad_id=_first(_ids_of(inner, meta.get("tokenizer.ggml.padding_token_id"))),
            chat_template=template if isinstance(template, str) else None,
        )

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included; a model's logits may be padded beyond it."""
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; `special` adds what the model wants around a text (BOS, [CLS] and [SEP]).

        A special token's name within the text becomes that token, as in chat templates. Raises `InvalidRequest` for
        text that no file or socket can carry (lone surrogates).
        """
        ids: list[int] = self.inner.encode(_checked(text), add_special_tokens=special).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        encoded = self.inner.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=special)
        return [encoding.ids for encoding in encoded]

    def closing(self, text: str) -> int:
        """How many of the ids of `text` are those that the model wants behind a text, such as [SEP]."""
        added: list[int] = self.inner.encode(_checked(text)).special_tokens_mask
        return next((count for count, special in enumerate(reversed(added)) if not special), len(added))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; incomplete UTF-8 becomes U+FFFD, ids beyond the vocabulary become nothing."""
        if self.pieces is not None:
            return ByteStream(self.pieces).text(i for i in ids if not (skip_special and i in self.special_ids))
        text: str = self.inner.decode(list(ids), skip_special_tokens=skip_special)
        return text


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise InvalidRequest(f"a text is expected, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: it is not "
            "valid Unicode; remove it, or decode its source with errors='replace'"
        ) from error
    return text


def _ids_of(inner: tokenizers.Tokenizer, value: object) -> list[int]:
    """Token ids given as an id, a token's text, an added-token object, or a list of those; unknown ones left out."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if isinstance(value, list):
        return [index for item in value for index in _ids_of(inner, item)]
    if isinstance(value, str):
        value = inner.token_to_id(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32:
        return [value] if inner.id_to_token(value) is not None else []
    return []


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None

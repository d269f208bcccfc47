"""Text to token ids and back, from a model folder or from a GGUF file."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import models, normalizers, processors

from engine.platform.jsonfiles import read_object
from engine.text.byte_stream import ByteStream
from engine.text.ends import ends, gguf_ends
from engine.text.gguf_vocabulary import build
from engine.text.pieces import Pieces
from engine.text.pipeline import TokenizerPipeline
from engine.text.special_tokens import LISTED, SpecialTokens
from engine.text.templates import folder_templates, gguf_templates
from engine.text.trial import no_panic, read_tokenizer
from engine.weights.gguf import GGUF
from stoker.contract.shown import as_json, cut
from stoker.errors import InvalidRequest, ModelError

#: A template's name for a special token -> how GGUF calls it.
_GGUF_NAMES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding",
    "cls_token": "cls", "mask_token": "mask",
}  # fmt: skip


@dataclass(frozen=True)
class Manners:
    """What a model's files say about its texts, its vocabulary apart.

    `names`: its special tokens by the names that chat templates use, such as `sep_token`. `templates`: its chat
    templates, by name. `cuts_left`: whether a text that is too long loses its beginning. `cleans_spaces`: whether
    spaces before punctuation are taken out of its text. `types`: whether the second text of a pair has a token type of
    its own.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    cuts_left: bool = False
    cleans_spaces: bool = False
    types: bool = False


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a model says about its special tokens and its texts.

    `eos_ids` ends generation, and so do the tokens called `end_names` (those that end in every family, if not given);
    `bos_id` and `pad_id` are None where the model has none.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
        pad_id: int | None = None,
        end_names: Sequence[str] | None = None,
        manners: Manners | None = None,
    ):
        # A tokenizer.json may carry the truncation and padding of a training run.
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        self.manners = manners or Manners()
        self.templates: dict[str, str] = dict(self.manners.templates)
        added = {token.content: index for index, token in inner.get_added_tokens_decoder().items()}
        flagged = [index for index, token in inner.get_added_tokens_decoder().items() if token.special]
        named = list(eos_ids)
        family = _present(added, ends(added) if end_names is None else end_names)
        self.eos_ids: frozenset[int] = frozenset(named + family)
        #: The one to end a training example with: the first that the model names.
        self.main_eos_id: int | None = next(iter(named + family), None)
        #: Tokens that have no text: by their flags, by the model's names for them, or as ends of every family.
        self.special_ids: frozenset[int] = frozenset(flagged + family + _present(added, self.manners.names.values()))
        self.bos_id, self.pad_id = bos_id, pad_id
        #: The bytes of each token, None where they depend on its neighbours.
        self.pieces = Pieces.of(inner)

    @classmethod
    def from_folder(cls, folder: Path, *, lowercase: bool = False, ends: bool = False) -> Tokenizer:
        """From `tokenizer.json` and the other files of its folder, as transformers reads them.

        `lowercase` makes small letters of every text first, as sentence-transformers' files may ask. `ends`: whether
        `add_eos_token` counts, of a decoder that embeds; one that generates goes on with a text.
        """
        config = read_object(folder / "tokenizer_config.json", missing={})
        model = read_object(folder / "config.json", missing={})
        generation = read_object(folder / "generation_config.json", missing={})
        inner = read_tokenizer(folder / "tokenizer.json")
        # On either side, what pads a text changes nothing of it here.
        _left(folder / "tokenizer_config.json", "padding_side", config.get("padding_side"))
        side = config.get("truncation_side", (inner.truncation or {}).get("direction"))
        try:
            inner, names, types = _as_transformers(folder, inner, config, model)
        except ModelError:
            raise
        except Exception as error:  # the package raises plain Exception
            raise ModelError(f"{folder}: its tokenizer cannot be built: {cut(error)}") from error
        if lowercase:
            _lowercase(inner)
        if ends and config.get("add_eos_token") is True:
            _end(inner, names, begins=config.get("add_bos_token") is not False)
        eos = [names.get("eos_token"), generation.get("eos_token_id"), model.get("eos_token_id")]
        return cls(
            inner,
            eos_ids=_ids_of(inner, eos),
            bos_id=_first(_ids_of(inner, names.get("bos_token"))),
            pad_id=_first(_ids_of(inner, names.get("pad_token"))),
            manners=Manners(
                names,
                folder_templates(folder, config),
                _left(folder / "tokenizer_config.json", "truncation_side", side),
                _cleans(inner, config),
                types,
            ),
        )

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> Tokenizer:
        """Rebuilt from a GGUF file's vocabulary (byte-level BPE or SentencePiece). Raises `ModelError` for others."""
        inner = build(gguf)
        named = {name: _gguf_ids(inner, gguf, key) for name, key in _GGUF_NAMES.items()}
        names = {name: inner.id_to_token(ids[0]) or "" for name, ids in named.items() if ids}
        return cls(
            inner,
            eos_ids=[index for name in ("eos", "eot", "eom") for index in _gguf_ids(inner, gguf, name)],
            bos_id=_first(named["bos_token"]),
            pad_id=_first(named["pad_token"]),
            end_names=gguf_ends(inner.get_vocab()),
            manners=Manners(names, gguf_templates(gguf.path, gguf.metadata)),
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included: ids may be left out. A model's logits may be padded
        beyond it."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; `special` adds what the model wants around a text (BOS, [CLS] and [SEP]).

        A special token's name within the text becomes that token, as in chat templates. Raises `InvalidRequest` for
        text that no file or socket can carry (lone surrogates).
        """
        with no_panic():
            ids: list[int] = self.inner.encode(checked_text(text), add_special_tokens=special).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        with no_panic():
            encoded = self.inner.encode_batch_fast([checked_text(text) for text in texts], add_special_tokens=special)
        return [encoding.ids for encoding in encoded]

    def encode_cut(self, text: str, longest: int) -> list[int]:
        """`encode`, of as much of the text as leaves `longest` tokens; what the model wants around it stays whole."""
        with no_panic():
            encoding = self.inner.encode(checked_text(text), add_special_tokens=False)
            room = max(0, longest - self.inner.num_special_tokens_to_add(is_pair=False))
            encoding.truncate(room, direction=self.lost_side)
            ids: list[int] = self.inner.post_process(encoding, add_special_tokens=True).ids
        return ids[:longest]

    @property
    def lost_side(self) -> str:
        """Where a text is cut that is too long."""
        return "left" if self.manners.cuts_left else "right"

    def encode_spans(self, text: str, *, special: bool) -> tuple[list[int], list[int]]:
        """The ids of `text`, and for each the position in `text` at which what it stands for ends; 0 for what the model
        wants before a text, its length for what it wants behind."""
        with no_panic():
            encoding = self.inner.encode(checked_text(text), add_special_tokens=special)
        stops: list[int] = []
        for (_, stop), around in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            last = stops[-1] if stops else 0
            stops.append((len(text) if last else 0) if around else max(stop, last))
        return encoding.ids, stops

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; incomplete UTF-8 becomes U+FFFD, ids beyond the vocabulary become nothing."""
        kept = [index for index in ids if not (skip_special and index in self.special_ids)]
        if self.pieces is not None:
            return ByteStream(self.pieces).text(kept)
        with no_panic():
            text: str = self.inner.decode(kept, skip_special_tokens=False)
        return text

    def spelled(self, token_id: int) -> str:
        """A token as it reads by itself: its first space is kept, incomplete UTF-8 becomes U+FFFD."""
        if self.pieces is None:
            return self.decode([token_id], skip_special=False)
        return self.pieces(token_id).decode("utf-8", "replace")

    def special_within(self, texts: Iterable[str]) -> dict[int, str]:
        """The special tokens whose names stand in one of `texts`, by id."""
        names = {index: self.inner.id_to_token(index) for index in self.special_ids}
        return {index: name for index, name in names.items() if name and any(name in text for text in texts)}


def _as_transformers(
    folder: Path, inner: tokenizers.Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str], bool]:
    """What transformers makes of `inner`, its special tokens by name, and whether it gives a model token types.
    `config` is tokenizer_config.json's, `model` config.json's."""
    pipeline = TokenizerPipeline(folder / "tokenizer_config.json", config, model)
    tokens = SpecialTokens.from_folder(folder, config)
    inner = pipeline.built(inner, tokens.listed if LISTED in config else None)
    tokens = tokens.with_defaults(inner, pipeline.default_names(inner))
    tokens.add_to(inner, _count(model.get("vocab_size")))
    if pipeline.forgets_flags:
        tokens.add_without_flags(inner)
    pipeline.surround(inner, tokens.texts)
    _check_unknown(folder, inner)
    return inner, tokens.texts, pipeline.gives_types


def _check_unknown(folder: Path, inner: tokenizers.Tokenizer) -> None:
    """A vocabulary of whole words needs a token for those that it does not have."""
    if isinstance(inner.model, models.WordPiece | models.WordLevel):
        unknown = inner.model.unk_token
        if unknown not in inner.get_vocab(with_added_tokens=False):
            raise ModelError(
                f"{folder}: its vocabulary has no token {unknown!r}, which would stand for every unknown word. Mend "
                "unk_token in tokenizer_config.json or tokenizer.json"
            )


def checked_text(text: str) -> str:
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


def _present(added: Mapping[str, int], names: Iterable[str]) -> list[int]:
    return [added[name] for name in names if name in added]


def _ids_of(inner: tokenizers.Tokenizer, value: object) -> list[int]:
    """Token ids given as an id, a token's text, or a list of those; unknown ones left out."""
    if isinstance(value, list):
        return [index for item in value for index in _ids_of(inner, item)]
    if isinstance(value, str):
        value = inner.token_to_id(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32:
        return [value] if inner.id_to_token(value) is not None else []
    return []


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _gguf_ids(inner: tokenizers.Tokenizer, gguf: GGUF, name: str) -> list[int]:
    """The token that the file names so, if it names one. Raises `ModelError` for what is no token of its own."""
    value = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
    found = _ids_of(inner, value) if isinstance(value, int) else []
    if value is not None and not found:
        raise ModelError(f"{gguf.path}: tokenizer.ggml.{name}_token_id {value!r} is no token of its vocabulary")
    return found


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _left(path: Path, name: str, side: object) -> bool:
    if isinstance(side, str) and side.lower() in ("left", "right"):
        return side.lower() == "left"
    if side is None:
        return False
    raise ModelError(f'{path}: {name} is {as_json(side)}; "left" and "right" are allowed')


def _cleans(inner: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """transformers cleans no text of a BPE vocabulary, unless it is asked to though that spoils it."""
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output") is True
    bpe = isinstance(inner.model, tokenizers.models.BPE)
    return config.get("clean_up_tokenization_spaces") is True and (forced or not bpe)


def _end(inner: tokenizers.Tokenizer, names: Mapping[str, str], *, begins: bool) -> None:
    """Put the end token behind every text, if the file does not do so itself. `begins`: whether the one before a text,
    which the file may have, stays."""
    before, behind = _around(inner)
    bos, eos = (inner.token_to_id(names.get(name, "")) for name in ("bos_token", "eos_token"))
    begun = bos is not None and before[:1] == [bos]
    if eos is None or (behind[-1:] == [eos] and (begins or not begun)):
        return
    first = [(names["bos_token"], bos)] if begun and begins else []
    # A model may have one token for both.
    tokens = [*dict.fromkeys([*first, (names["eos_token"], eos)])]
    single = [*(name for name, _ in first), "$A", names["eos_token"]]
    inner.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=tokens)


def _around(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the file puts before a text and behind it: an empty one would not say which is where."""
    plain, whole = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain), len(whole))
    return whole[:start], whole[start + len(plain) :]


def _lowercase(inner: tokenizers.Tokenizer) -> None:
    """Before all that the tokenizer does itself, if that does not do so anyway, as sentence-transformers has it."""
    present: Any = inner.normalizer
    steps: list[Any] = [] if present is None else [present]
    if isinstance(present, normalizers.Sequence):
        steps = [*cast(Iterable[Any], present)]
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])

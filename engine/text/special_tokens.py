"""The tokens that a model folder's files name or add to those of tokenizer.json, read as transformers 5 reads them.

`tokenizer_config.json` names tokens (`bos_token`, …; any other `…_token`; `extra_special_tokens`, once
`additional_special_tokens`) and lists added ones (`added_tokens_decoder`). Where it has no such list, the older files
count: `special_tokens_map.json`, which goes before it, and `added_tokens.json`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.platform.jsonfiles import read_object
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: What every template knows, and in the order in which transformers adds them.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
#: The list of `tokenizer_config.json`. Where it exists, no older file counts.
LISTED = "added_tokens_decoder"
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
#: A token with flags of its own, or the text of one that is special and has none.
Named = AddedToken | str


@dataclass(frozen=True)
class SpecialTokens:
    """`named`: by the name that templates use, such as `bos_token`. `listed`: added tokens, special or not, by their
    ids. `extra`: special ones without a name. `refused`: names for which the files say that there is no token."""

    named: Mapping[str, Named]
    listed: Sequence[AddedToken] = ()
    extra: Sequence[Named] = ()
    refused: Collection[str] = ()

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> SpecialTokens:
        """By the folder's files; `config` is what its tokenizer_config.json says. Raises `ModelError`."""
        reader = _Reader(folder / "tokenizer_config.json")
        older = {} if LISTED in config else read_object(folder / "special_tokens_map.json", missing={})
        values, extra = _extra(config, older)
        values = {key: config[key] for key in config if _names_token(key, config[key])} | values
        values |= {key: older[key] for key in older if _names_token(key, older[key])}
        named = {key: reader.token(value, key) for key, value in values.items() if value is not None}
        others = reader.tokens(extra)
        if LISTED in config:
            listed = reader.listed(config[LISTED])
        else:
            listed = _added(folder / "added_tokens.json", {_text(token) for token in [*named.values(), *others]})
        return cls(_ordered(named), listed, others, {key for key, value in values.items() if value is None})

    @property
    def texts(self) -> dict[str, str]:
        """The tokens that have names, as they read."""
        return {name: _text(token) for name, token in self.named.items()}

    def with_defaults(self, inner: Tokenizer, defaults: Mapping[str, str]) -> SpecialTokens:
        """With those names of `defaults` of which the files say nothing, as far as the vocabulary has such a token."""
        missing = {
            name: token
            for name, token in defaults.items()
            if name not in self.named and name not in self.refused and inner.token_to_id(token) is not None
        }
        return SpecialTokens(_ordered({**missing, **self.named}), self.listed, self.extra, self.refused)

    def add_to(self, inner: Tokenizer, rows: int | None) -> None:
        """Make them tokens of `inner`; one that its vocabulary has keeps its id, any other gets the next one.

        A padding token for which the model has none of its `rows` is left out: nothing is padded with it here.
        """
        known = inner.get_added_tokens_decoder().values()
        same = {repr(token) for token in known}
        wanted: list[Named] = [token for token in self.listed if repr(token) not in same]
        there = {token.content for token in known} | {_text(token) for token in wanted}
        for name, token in [*self.named.items(), *(("", token) for token in self.extra)]:
            # As in transformers: a token that is named twice with other flags has those of its last name.
            if _text(token) in there or token in wanted:
                continue
            if name != "pad_token" or not _without_row(inner, _text(token), rows):
                wanted.append(token)
        names = set(self.texts.values())
        inner.add_tokens([_flagged(token, names) for token in wanted])

    def add_without_flags(self, inner: Tokenizer) -> None:
        """Let those that `inner` has be special and no more, as they read."""
        texts = [*self.texts.values(), *map(_text, self.extra)]
        there = [text for text in texts if inner.token_to_id(text) is not None]
        inner.add_tokens([AddedToken(text, special=True) for text in there])


def _without_row(inner: Tokenizer, token: str, rows: int | None) -> bool:
    return inner.token_to_id(token) is None and rows is not None and inner.get_vocab_size() >= rows


def _text(token: Named) -> str:
    return token if isinstance(token, str) else token.content


def _flagged(token: Named, names: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    token.special = token.special or token.content in names
    return token


def _names_token(key: str, value: object) -> bool:
    """Any name in `…_token` is one, as `image_token`; `add_bos_token` and its like are switches."""
    return key in NAMES or (key.endswith("_token") and isinstance(value, (str, Mapping)))


def _ordered(named: Mapping[str, Named]) -> dict[str, Named]:
    first = {name: named[name] for name in NAMES if name in named}
    return {**first, **named}


def _extra(config: Mapping[str, Any], older: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """What stands under the newer and the older key for further tokens, in both files: names, and a list."""
    named: dict[str, Any] = {}
    extra, old = config.get(_EXTRA), config.get(_OLD_EXTRA)
    if not extra:
        extra, old = old, None
    if isinstance(extra, Mapping):
        named, extra = dict(extra), None
    if isinstance(more := older.get(_EXTRA), Mapping):
        named |= more
    elif isinstance(extra, list) and isinstance(more, list):
        extra = [*extra, *(token for token in more if token not in extra)]
    else:
        extra = more or extra
    return named, older.get(_OLD_EXTRA, old) if extra is None else extra


def _added(path: Path, special: set[str]) -> list[AddedToken]:
    """`added_tokens.json`: tokens and their ids."""
    ids = read_object(path, missing={})
    if not all(token and isinstance(index, int) and not isinstance(index, bool) for token, index in ids.items()):
        raise ModelError(f"{path}: not an object of tokens and their ids")
    return [
        AddedToken(token, normalized=token not in special, special=token in special)
        for token in sorted(ids, key=ids.__getitem__)
    ]


class _Reader:
    """Tokens as JSON spells them; what is none is refused by the file's name."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def listed(self, value: object) -> list[AddedToken]:
        if not isinstance(value, Mapping) or not all(str(key).isdecimal() for key in value):
            raise ModelError(f"{self._path}: {LISTED} is not an object of ids and tokens")
        found = [self.token(value[index], f"{LISTED}[{index}]") for index in sorted(value, key=int)]
        return [AddedToken(token) if isinstance(token, str) else token for token in found]

    def tokens(self, value: object) -> list[Named]:
        if not isinstance(value, list | None):
            raise ModelError(f"{self._path}: {_EXTRA} is {as_json(value)}, not a list of tokens")
        return [self.token(token, f"{_EXTRA}[{index}]") for index, token in enumerate(value or ())]

    def token(self, value: object, where: str) -> Named:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, Mapping) and isinstance(value.get("content"), str) and value["content"]:
            flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
            return AddedToken(value["content"], **flags)
        raise ModelError(f"{self._path}: {where} is {as_json(value)}, not a token's text or object")

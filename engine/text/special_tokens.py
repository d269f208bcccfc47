"""The tokens that a model folder's files name or add to those of tokenizer.json, read as transformers 5 reads them.

`tokenizer_config.json` names tokens (`bos_token`, …; any other `…_token`; `extra_special_tokens`, once
`additional_special_tokens`) and lists added ones (`added_tokens_decoder`). Where it has no such list, the older files
count: `special_tokens_map.json`, which goes before it, and `added_tokens.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from engine.jsonfiles import read_object
from stoker.errors import ModelError

#: What every template knows, and in the order in which transformers adds them.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class SpecialTokens:
    """`named`: by the name that templates use, such as `bos_token`. `listed`: added tokens, special or not, by their
    ids. `extra`: special ones without a name."""

    named: Mapping[str, AddedToken]
    listed: Sequence[AddedToken] = ()
    extra: Sequence[AddedToken] = ()

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> SpecialTokens:
        """By the folder's files; `config` is what its tokenizer_config.json says. Raises `ModelError`."""
        reader = _Reader(folder / "tokenizer_config.json")
        values = {key: config[key] for key in config if _names_token(key, config[key])}
        extra = config.get(_EXTRA) or config.get(_OLD_EXTRA)
        if "added_tokens_decoder" in config:
            listed = reader.listed(config["added_tokens_decoder"])
        else:
            older = _Reader(folder / "special_tokens_map.json")
            found = read_object(older.path, missing={})
            values |= {key: found[key] for key in found if _names_token(key, found[key])}
            extra = _joined(extra, found.get(_EXTRA) or (None if extra else found.get(_OLD_EXTRA)))
            listed = []
        if isinstance(extra, Mapping):
            values |= extra
            extra = None
        named = {key: reader.special(value, key) for key, value in values.items() if value is not None}
        others = reader.specials(extra)
        if "added_tokens_decoder" not in config:
            listed = _added(folder / "added_tokens.json", {token.content for token in [*named.values(), *others]})
        return cls(_ordered(named), listed, others)

    def with_defaults(self, inner: Tokenizer, defaults: Mapping[str, str]) -> SpecialTokens:
        """With those names of `defaults` that the files do not give, as far as the vocabulary has such a token."""
        missing = {
            name: AddedToken(token, special=True)
            for name, token in defaults.items()
            if name not in self.named and inner.token_to_id(token) is not None
        }
        return SpecialTokens(_ordered({**missing, **self.named}), self.listed, self.extra)

    def add_to(self, inner: Tokenizer, rows: int | None) -> None:
        """Make them tokens of `inner`; one that its vocabulary has keeps its id, any other gets the next one.

        A padding token for which the model has none of its `rows` is left out: nothing is padded with it here.
        """
        known = inner.get_added_tokens_decoder().values()
        same = {repr(token) for token in known}
        wanted = [token for token in self.listed if repr(token) not in same]
        names = {token.content for token in self.named.values()}
        for token in wanted:
            token.special = token.special or token.content in names
        there = {token.content for token in [*known, *wanted]}
        for name, token in [*self.named.items(), *(("", token) for token in self.extra)]:
            if token.content in there or (name == "pad_token" and _without_row(inner, token, rows)):
                continue
            there.add(token.content)
            wanted.append(token)
        inner.add_tokens(wanted)


def _without_row(inner: Tokenizer, token: AddedToken, rows: int | None) -> bool:
    return inner.token_to_id(token.content) is None and rows is not None and inner.get_vocab_size() >= rows


def _names_token(key: str, value: object) -> bool:
    """Any name in `…_token` is one, as `image_token`; `add_bos_token` and its like are switches."""
    return key in NAMES or (key.endswith("_token") and isinstance(value, (str, Mapping)))


def _ordered(named: Mapping[str, AddedToken]) -> dict[str, AddedToken]:
    first = {name: named[name] for name in NAMES if name in named}
    return {**first, **named}


def _joined(extra: object, older: object) -> object:
    """A list of the newer file goes on with what the older one adds; an object of names replaces it."""
    if isinstance(extra, list) and isinstance(older, list):
        return [*extra, *(token for token in older if token not in extra)]
    return older or extra


def _added(path: Path, special: set[str]) -> list[AddedToken]:
    """`added_tokens.json`: tokens and their ids."""
    ids = read_object(path, missing={})
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids.values()):
        raise ModelError(f"{path}: not an object of tokens and their ids")
    return [
        AddedToken(token, normalized=token not in special, special=token in special)
        for token in sorted(ids, key=ids.__getitem__)
    ]


class _Reader:
    """Tokens as JSON spells them; what is none is refused by the file's name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def listed(self, value: object) -> list[AddedToken]:
        if not isinstance(value, Mapping) or not all(str(key).isdecimal() for key in value):
            raise ModelError(f"{self.path}: added_tokens_decoder is not an object of ids and tokens")
        ids = sorted(value, key=int)
        return [self._token(value[index], f"added_tokens_decoder[{index}]", {}) for index in ids]

    def special(self, value: object, where: str) -> AddedToken:
        return self._token(value, where, {"special": True})

    def specials(self, value: object) -> list[AddedToken]:
        if not isinstance(value, list | None):
            raise ModelError(f"{self.path}: {_EXTRA} is a {type(value).__name__}, not a list of tokens")
        return [self.special(token, f"{_EXTRA}[{place}]") for place, token in enumerate(value or ())]

    def _token(self, value: object, where: str, forced: Mapping[str, bool]) -> AddedToken:
        if isinstance(value, str) and value:
            return AddedToken(value, **forced)
        if isinstance(value, Mapping) and isinstance(value.get("content"), str) and value["content"]:
            flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
            return AddedToken(value["content"], **{**flags, **forced})
        raise ModelError(f"{self.path}: {where} is {str(value)[:60]!r}, not a token's text or object")

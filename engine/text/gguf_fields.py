"""The `tokenizer.ggml.*` metadata of a GGUF file, each value checked before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.text.ends import gguf_special
from engine.weights.gguf import GGUF
from stoker.errors import ModelError

#: Token types of `tokenizer.ggml.token_type` (llama.cpp's `llama_token_type`).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: Characters of the longest token that is believed; real ones have tens. All the cuts of a token are looked at.
_LONGEST = 1024


class Vocabulary:
    """`tokens` by their ids, `index` the other way round, `types` one a token: the file's, except for names that are
    special in every file.

    Raises `ModelError`, which names the file, for a damaged one.
    """

    def __init__(self, gguf: GGUF):
        self.where = gguf.path
        self._meta = gguf.metadata
        self.tokens = self.strings("tokens")
        self.index = {token: number for number, token in enumerate(self.tokens)}
        types = self._types()
        if len(self.index) != len(self.tokens) or len(types) != len(self.tokens):
            raise ModelError(f"{self.where}: its vocabulary repeats a token, or has another number of token types")
        longest = max(self.tokens, key=len)
        if len(longest) > _LONGEST:
            raise ModelError(
                f"{self.where}: its vocabulary has a token of {len(longest)} characters; {_LONGEST} are allowed"
            )
        special = gguf_special(self.index)
        self.types: Sequence[int] = [
            CONTROL if token in special else kind for token, kind in zip(self.tokens, types, strict=True)
        ]

    def _types(self) -> Sequence[int]:
        """The file's type of each token; without any, all are normal. 0 is llama.cpp's for a token of no known type."""
        value = self._meta.get("tokenizer.ggml.token_type", [NORMAL] * len(self.tokens))
        types = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(types, list) or not all(type(kind) is int and 0 <= kind <= BYTE for kind in types):
            raise ModelError(
                f"{self.where}: tokenizer.ggml.token_type is no list of the types 0 to {BYTE}, one for each token"
            )
        return types

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value of `tokenizer.ggml.KEY`."""
        return self._meta.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        """A list of texts that must not be empty."""
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise ModelError(f"{self.where}: tokenizer.ggml.{key} is missing or not a list of texts")
        return value

    def scores(self) -> list[float]:
        """The score of each token."""
        value = self.get("scores")
        is_real = isinstance(value, np.ndarray) and value.dtype.kind == "f"
        if not is_real or len(value) != len(self.tokens) or not np.isfinite(value).all():
            raise ModelError(f"{self.where}: tokenizer.ggml.scores is missing or not a finite number for each token")
        scores: list[float] = value.tolist()
        return scores

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: tokenizer.ggml.{key} is {value!r}, not true or false")
        return value

    def token(self, key: str) -> int | None:
        """A token's id, None if the file names none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(self.tokens):
            raise ModelError(f"{self.where}: tokenizer.ggml.{key} {value!r} is no token of its vocabulary")
        return value

    def of_type(self, *kinds: int) -> list[str]:
        """The tokens of these types, by their ids."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

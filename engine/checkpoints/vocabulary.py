"""Whether every id that a tokenizer makes has a row in the model's tables: one that has not would read other memory."""

from __future__ import annotations

from pathlib import Path

from engine.text.pairs import encode_pairs
from engine.text.tokenizer import Tokenizer
from stoker.errors import ModelError


def check_ids(path: Path, tokenizer: Tokenizer, rows: int) -> None:
    """Raise `ModelError` if the tokenizer at `path` has an id that a table of so many rows has not."""
    # What stands around each text may have ids of its own, which no entry of the vocabulary has.
    around = max(tokenizer.encode("") + tokenizer.encode("a"), default=0)
    largest = max(around, tokenizer.vocab_size - 1)
    if largest >= rows:
        raise ModelError(
            f"{path}: the tokenizer has {largest + 1} tokens, the model only {rows} rows for them (the largest id is "
            f"{largest}). Take the tokenizer that the model was made with"
        )


def check_segments(path: Path, tokenizer: Tokenizer) -> None:
    """Raise `ModelError` if a text is not of token type 0 throughout, the only one that encoders here know."""
    types = sorted(set(tokenizer.inner.encode("a").type_ids) - {0})
    if types:
        raise ModelError(f"{path}: tokenizer.json gives a text the token type {types[0]}; only 0 is supported")


def check_pair_types(path: Path, tokenizer: Tokenizer, types: int) -> None:
    """Raise `ModelError` if the second text of a pair has a token type that a table of so many rows has not."""
    ((_, found),) = encode_pairs(tokenizer, "a", ["a"])
    if max(found, default=0) >= min(types, 2):
        raise ModelError(f"{path}: its tokenizer gives a pair the token type {max(found)}; the model has {types}")

"""From the texts of a request to their tokens; what is wrong with one of them is said of that one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.embedding.forward import Tokens
from engine.text.tokenizer import Tokenizer
from stoker.contract import EmbedRequest
from stoker.errors import InvalidRequest, StokerError, TextTooLong


def tokenized(tokenizer: Tokenizer, request: EmbedRequest, prompt: str, longest: int) -> list[Tokens]:
    """The tokens of each text behind `prompt`, at most `longest`; none for a text that the tokenizer knows nothing of.

    Raises `TextTooLong`, or `InvalidRequest` for a text that cannot be encoded, with its index in `texts`.
    """
    texts = [prompt + text for text in request.texts]
    found = []
    for row, tokens in enumerate(_encoded(tokenizer, texts)):
        if len(tokens) <= longest:
            kept = tokens
        elif request.truncation == "error":
            raise TextTooLong(
                f"texts.{row}: {len(tokens)} tokens given; {request.model} takes {longest}. "
                'Shorten it, or pass truncation="end" to cut it.'
            )
        else:
            kept = tokenizer.encode_cut(texts[row], longest)
        found.append(np.array(kept, dtype=np.int32))
    return found


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return tokenizer.encode_batch(texts)
    except Exception as error:
        for row, text in enumerate(texts):
            try:
                tokenizer.encode(text)
            except Exception as found:
                raise InvalidRequest(f"texts.{row}: {found}") from found
        raise InvalidRequest(f"texts: the tokenizer cannot encode them ({error})") from error


def named(row: int, error: Exception) -> Exception:
    """`error` with the text that it came of. Running out of memory stays a `MemoryError`."""
    if isinstance(error, StokerError):
        return type(error)(f"texts.{row}: {error}")
    kind = MemoryError if isinstance(error, MemoryError) else RuntimeError
    wrapped = kind(f"texts.{row}: {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped

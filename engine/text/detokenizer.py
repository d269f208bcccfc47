"""Text of a growing sequence of tokens, given out as soon as it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from engine.text.byte_stream import ByteStream
from engine.text.tokenizer import Tokenizer

#: Tokens that the general way holds back at most while the last character is incomplete (a character has 4 bytes).
_MAX_HELD = 16
#: Tokens before a continuation that the general way looks at: enough for a word and its beginning.
_CONTEXT = 8


class _Way(Protocol):
    @property
    def held(self) -> int: ...

    def add(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class StreamingDetokenizer:
    """Turns tokens into text one by one: all that `add` and `finish` return, joined, is `tokenizer.decode` of all ids.

    Behind the tokens `after` it is what their text goes on with: a first space that belongs to it is kept.

    Each token costs the same, however many came before, and half a character is never given out. That holds for every
    sequence of tokens with byte-level and SentencePiece vocabularies, and with those that write whole characters
    (WordPiece). With others a run of more than 16 tokens that end in U+FFFD is given out as it stands.
    """

    def __init__(self, tokenizer: Tokenizer, *, after: Sequence[int] = (), skip_special: bool = True):
        self._inner = tokenizer.inner
        self._skipped = tokenizer.special_ids if skip_special else frozenset[int]()
        # A vocabulary without a decoder does not say how tokens are joined: the space between two is nobody's.
        joined = after if self._inner.decoder is not None else ()
        before = [index for index in joined if index not in self._skipped][-_CONTEXT:]
        pieces = tokenizer.pieces
        self._way: _Way = _Window(tokenizer, before) if pieces is None else ByteStream(pieces, begun=bool(before))

    @property
    def held(self) -> int:
        """Tokens that are kept for those to come."""
        return self._way.held

    def add(self, token_id: int) -> str:
        """The text that is certain now: "" while a character is incomplete, or for a special token."""
        if token_id in self._skipped or self._inner.id_to_token(token_id) is None:
            return ""
        return self._way.add(token_id)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never was completed, else ""."""
        return self._way.finish()


class _Window:
    """Any other vocabulary: the tokens not given out yet are decoded together with those given out last."""

    def __init__(self, tokenizer: Tokenizer, before: list[int]):
        self._tokenizer = tokenizer
        self._ids = before
        self._given = len(before)  # tokens at the window's start whose text was given out

    @property
    def held(self) -> int:
        return len(self._ids)

    def add(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._advance(_MAX_HELD)

    def finish(self) -> str:
        return self._advance(0)

    def _advance(self, limit: int) -> str:
        """Decode the window with and without its new tokens; the difference is their text, spaces included."""
        before = self._decode(self._ids[: self._given])
        after = self._decode(self._ids)
        if after.endswith("\ufffd") and len(self._ids) - self._given <= limit:
            return ""
        if len(after) > len(before):  # the new tokens become the context of the next ones
            self._ids = self._ids[self._given :]
            self._given = len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=False)

"""Text of a growing sequence of tokens, given out as soon as it is certain."""

from __future__ import annotations

import codecs

from tokenizers import pre_tokenizers

from engine.text.tokenizer import Tokenizer

#: Tokens that the general way holds back at most while the last character is incomplete (a character has 4 bytes).
_MAX_HELD = 16


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: a byte's own printable character, or one from U+0100 on (Radford et al., 2019, `encoder.py`)."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = [byte for byte in range(256) if chr(byte) in alphabet and byte < 0x100]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


class StreamingDetokenizer:
    """Turns tokens into text one by one: all that `add` and `finish` return, joined, is `tokenizer.decode` of all ids.

    Each token costs the same, however many came before. With a byte-level vocabulary that holds for every sequence.
    With others (byte fallback) a run of more than 16 byte tokens that are no UTF-8 is given out as it stands.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window: list[int] = []
        self._given = 0  # tokens at the window's start whose text was given out

    def add(self, token_id: int) -> str:
        """The text that is certain now: "" while a character is incomplete, or for a special token."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._bytes(token_id))
        self._window.append(token_id)
        return self._advance(_MAX_HELD)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never was completed, else ""."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._advance(0)

    def _bytes(self, token_id: int) -> bytes:
        tokenizer = self._tokenizer
        if self._skip_special and token_id in tokenizer.special_ids:
            return b""
        token = tokenizer.inner.id_to_token(token_id) or ""
        try:
            return bytes([_BYTE_OF[character] for character in token])
        except KeyError:  # an added token is written as it reads
            return token.encode("utf-8")

    def _advance(self, limit: int) -> str:
        """Decode the window with and without its new tokens; the difference is their text, spaces included."""
        before = self._decode(self._window[: self._given])
        after = self._decode(self._window)
        if after.endswith("\ufffd") and len(self._window) - self._given <= limit:
            return ""
        if len(after) > len(before):  # the new tokens become the context of the next ones
            self._window = self._window[self._given :]
            self._given = len(self._window)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)

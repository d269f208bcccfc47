"""What each token stands for, where that does not depend on its neighbours: a run of bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, pre_tokenizers

#: SentencePiece's sign for a space.
SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: a byte's own printable character, or one from U+0100 on (Radford et al., 2019, `encoder.py`)."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = [byte for byte in range(256) if chr(byte) in alphabet and byte < 0x100]
    others = [byte for byte in range(256) if byte not in set(own)]
    return {chr(byte): byte for byte in own} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


BYTE_OF = _byte_of_character()


class Pieces:
    """`pieces(id)`: the bytes of a token; none for an id beyond the vocabulary.

    `strips_space`: whether one space at the very beginning of a decoded text was never part of it.
    """

    def __init__(self, inner: Tokenizer, spell: Callable[[str], bytes], *, strips_space: bool):
        self._inner, self._spell, self.strips_space = inner, spell, strips_space
        #: Tokens that were added are written as they read: their letters stand for no bytes, "▁" for no space.
        self._added = {
            index: token.content.encode("utf-8")
            for index, token in inner.get_added_tokens_decoder().items()
            if token.special or spell is _byte_level
        }

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._inner.id_to_token(token_id)
        return b"" if token is None else self._spell(token)

    @classmethod
    def of(cls, inner: Tokenizer) -> Pieces | None:
        """Of a byte-level or a byte-fallback (SentencePiece) tokenizer; None for one whose tokens need neighbours."""
        if isinstance(inner.decoder, decoders.ByteLevel):
            return cls(inner, _byte_level, strips_space=False)
        strips = _is_sentencepiece(inner)
        return None if strips is None else cls(inner, _byte_fallback, strips_space=strips)


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:  # an added token is written as it reads
        return token.encode("utf-8")


def _byte_fallback(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode("utf-8")


def _is_sentencepiece(inner: Tokenizer) -> bool | None:
    """Whether the first space is stripped, if the decoder is the usual one of SentencePiece's vocabularies."""
    if not isinstance(inner.decoder, decoders.Sequence):
        return None
    steps = json.loads(inner.decoder.__getstate__())["decoders"]
    usual = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if steps == usual:
        return False
    return True if steps == [*usual, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] else None

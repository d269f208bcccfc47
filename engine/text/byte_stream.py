"""Tokens that are bytes, as text: of a whole, or one by one."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from engine.text.pieces import Pieces


class ByteStream:
    """Tokens that are bytes, joined and read as UTF-8; what is not becomes U+FFFD, as little of it as can be."""

    def __init__(self, pieces: Pieces, *, begun: bool = False):
        self._pieces, self._utf8 = pieces, codecs.getincrementaldecoder("utf-8")("replace")
        self._strips = pieces.strips_space and not begun

    @property
    def held(self) -> int:
        """Tokens that are kept for those to come: their bytes are in the decoder."""
        return 0

    def add(self, token_id: int) -> str:
        return self._stripped(self._utf8.decode(self._pieces(token_id)))

    def finish(self) -> str:
        return self._stripped(self._utf8.decode(b"", final=True))

    def text(self, ids: Iterable[int]) -> str:
        """The whole text of `ids`."""
        return self._stripped(self._utf8.decode(b"".join(map(self._pieces, ids)), final=True))

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text

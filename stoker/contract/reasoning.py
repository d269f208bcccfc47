"""What a model thinks before it answers, parted from the answer piece by piece.

Models that think (Qwen3, DeepSeek-R1 and others) write `<think>REASONING</think>` before all else. Templates of some of
them write the first marker themselves, at the end of the prompt: then the answer begins within the reasoning, and only
the worker, which has the prompt, can say so (`StreamToken.in_reasoning`). Markers that come later are text.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto
from itertools import accumulate

from stoker.contract.parts import Part, Reader, Reasoning, begun_marker
from stoker.contract.stream import StreamToken

OPENER, CLOSER = "<think>", "</think>"


class State(Enum):
    """Where an answer is: before its first sign, in its reasoning, in the blanks behind it, in its text."""

    BEGINNING = auto()
    REASONING = auto()
    BEHIND = auto()
    ANSWER = auto()


class ReasoningReader:
    """Takes the reasoning out of an answer, and lets `inner` read what is left. Blanks next to the markers say nothing
    and are left out. `in_reasoning`: the prompt had the first marker."""

    def __init__(self, inner: Reader, *, in_reasoning: bool = False) -> None:
        self._inner, self._within = inner, in_reasoning
        self.state = State.BEGINNING
        #: Text that is not decided on.
        self._held = ""
        #: Whether a part of the reasoning has come.
        self._said = False

    def feed(self, text: str) -> list[Part]:
        if self.state is State.ANSWER:
            return self._inner.feed(text)
        self._held += text
        parts: list[Part] = []
        if self.state is State.BEGINNING:
            self._begin()
        if self.state is State.REASONING:
            parts += self._reason()
        if self.state is State.BEHIND:
            self._held = self._held.lstrip()
            self.state = State.ANSWER if self._held else State.BEHIND
        return parts + self._answer()

    def finish(self) -> list[Part]:
        """An answer that ends within its reasoning, cut off, keeps all of it."""
        if self.state is State.BEGINNING:
            self.state = State.REASONING if self._within else State.ANSWER
        parts: list[Part] = []
        if self.state is State.REASONING:
            parts = self._say(self._held)
            self._held = ""
        return parts + self._answer() + self._inner.finish()

    def _begin(self) -> None:
        begins = self._held.lstrip()
        if begins.startswith(OPENER):
            self._held = begins.removeprefix(OPENER)
            self.state = State.REASONING
        elif not OPENER.startswith(begins):
            self.state = State.REASONING if self._within else State.ANSWER

    def _reason(self) -> list[Part]:
        """The part that is certain. Blanks may stand before the last marker, which may be begun."""
        said, marker, rest = self._held.partition(CLOSER)
        if marker:
            self._held, self.state = rest, State.BEHIND
            return self._say(said.rstrip())
        certain = said[: len(said) - begun_marker(said, (CLOSER,))].rstrip()
        self._held = said[len(certain) :]
        return self._say(certain)

    def _say(self, text: str) -> list[Part]:
        if not self._said:
            text = text.lstrip()
        self._said = self._said or bool(text)
        return [Reasoning(text)] if text else []

    def _answer(self) -> list[Part]:
        if self.state is not State.ANSWER or not self._held:
            return []
        held, self._held = self._held, ""
        return self._inner.feed(held)

    def begin(self, token: StreamToken) -> None:
        """Hear of the answer's first token, or any other."""
        self._within = self._within or token.in_reasoning


def parts_of(reader: ReasoningReader, token: StreamToken) -> list[Part]:
    """What a token of an answer adds to it."""
    reader.begin(token)
    return reader.feed(token.text) + (reader.finish() if token.is_last else [])


def reasoning_tokens(texts: Sequence[str], *, in_reasoning: bool) -> int:
    """How many tokens of an answer are reasoning, its markers included. `texts`: those of its tokens."""
    whole = "".join(texts)
    if not in_reasoning and not whole.lstrip().startswith(OPENER):
        return 0
    closed = whole.find(CLOSER)
    if closed < 0:
        return len(texts)
    end = closed + len(CLOSER)
    begins = accumulate(map(len, texts), initial=0)
    return sum(begin < end for begin, _ in zip(begins, texts, strict=False))

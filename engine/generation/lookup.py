"""Drafts without a second model: what followed the last time (Saxena, 2023, "Prompt Lookup Decoding").

Where the last tokens of a row came before, in its prompt or its answer, what followed them there is a draft of what
follows now. A pass over the newest token and a draft behind it says what ordinary decoding chooses at each of these
positions; as far as that is the draft, it is the answer (`engine.generation.batch.Batch.try_drafts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Ngram: TypeAlias = tuple[int, ...]

#: Tokens that have to be the same for what followed them to be a draft.
NGRAM = 3
#: The last tokens of a prompt that are looked through: the index of so many takes 3 MB, and 10 ms of its job's thread.
REACH = 16_384
#: How often a token that nothing is known of is taken to be the expected one, and how much each token changes that.
PRIOR, WEIGHT = 0.5, 1 / 8


class PromptNgrams:
    """The end of a prompt, and where each of its n-grams last went on; all completions of a job share it."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt[-REACH:])
        shifted = zip(*(self.tokens[start:] for start in range(NGRAM)), strict=False)
        # The last n-gram has nothing behind it: `zip` ends with the range.
        self.behind: dict[Ngram, int] = dict(zip(shifted, range(NGRAM, len(self.tokens)), strict=False))


class Lookup:
    """What one row is expected to go on with, and how often that was right.

    Each token of the answer is compared with the expected one, whether or not it was drafted: so nothing is tried in
    vain to know whether drafts pay. `rate`: of the tokens that were expected, the share that came, the last ones
    counting most.
    """

    def __init__(self, prompt: PromptNgrams) -> None:
        self._prompt, self._answer = prompt, list[int]()
        self._behind: dict[Ngram, int] = {}
        self._last: Ngram = tuple(prompt.tokens[-NGRAM:])
        #: Index of the token that is expected to come again next; -1: none.
        self._next = self._found()
        self.rate = PRIOR

    @property
    def expects(self) -> bool:
        """Whether there is anything to draft."""
        return self._next >= 0

    def add(self, token: int) -> None:
        """The answer's next token."""
        came = self.expects and self._token(self._next) == token
        if self.expects:
            self.rate += WEIGHT * (came - self.rate)
        if len(self._last) == NGRAM:
            self._behind[self._last] = self._length
        self._answer.append(token)
        self._last = (*self._last, token)[-NGRAM:]
        # What goes on as expected has more in common with that place than with the latest one.
        self._next = self._next + 1 if came else self._found()

    def draft(self, most: int) -> list[int]:
        """The tokens that are expected, `most` at most. Where the last ones came only just before, they repeat."""
        if not self.expects:
            return []
        period = self._length - self._next
        return [self._token(self._next + step % period) for step in range(most)]

    def _found(self) -> int:
        found = self._behind.get(self._last)
        return self._prompt.behind.get(self._last, -1) if found is None else found

    @property
    def _length(self) -> int:
        return len(self._prompt.tokens) + len(self._answer)

    def _token(self, index: int) -> int:
        beyond = index - len(self._prompt.tokens)
        return self._prompt.tokens[index] if beyond < 0 else self._answer[beyond]

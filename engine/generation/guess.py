"""What a draft model makes of one row's next tokens, and how often that was right."""

from __future__ import annotations

from collections.abc import Sequence

#: How often a drafted token is taken to be right where nothing is known.
PRIOR = 0.7
#: How much each drafted token of a row changes its rate.
WEIGHT = 1 / 8
#: Tokens without a draft after which a row's rate that had fallen is unknown again, and how many times as many that are
#: where it has fallen again: the model has to read all of them first.
FORGET, LONGER = 256, 4
#: How many times as many tokens say the rate of all rows together.
ROWS = 8


class Rate:
    """Of the tokens that were drafted, the share that came, the last ones counting most.

    `start`: what it is taken to be; `tokens`: about how many of them it is the rate of, in units of a row's.
    """

    def __init__(self, start: float = PRIOR, tokens: int = 1) -> None:
        self.value, self._tokens = start, tokens
        self._untried, self._forget = 0, FORGET * tokens

    def note(self, came: bool) -> None:
        """A drafted token came, or another one in its place."""
        self.value += WEIGHT / self._tokens * (came - self.value)
        self._untried = 0

    def go_by(self) -> None:
        """A token came that was not drafted. After enough of them a rate that had fallen is unknown again."""
        self._untried += 1
        if self._untried >= self._forget:
            if self.value < PRIOR:
                self.value, self._forget = PRIOR, LONGER * self._forget
            self._untried = 0


class Guess:
    """One row's. `rows`: the rate of all rows of the lane, with which this one begins."""

    def __init__(self, rows: Rate) -> None:
        self._rows, self._own = rows, Rate(rows.value)
        #: The tokens that are drafted, from the next one on.
        self.tokens: list[int] = []

    @property
    def rate(self) -> float:
        """How often a drafted token is expected to be right."""
        return self._own.value

    def set(self, tokens: Sequence[int]) -> None:
        """What the model makes of it now."""
        self.tokens = list(tokens)

    def add(self, token: int) -> None:
        """The answer's next token."""
        if not self.tokens:
            self._own.go_by()
            self._rows.go_by()
            return
        came = self.tokens[0] == token
        self._own.note(came)
        self._rows.note(came)
        self.tokens = self.tokens[1:] if came else []

"""What is drawn for one row: its random numbers, how its next token is sampled, and which token it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from stoker.contract import GenerateRequest

#: Philox numbers that are drawn at once.
_BLOCK = 64


def uniforms(seed: int, position: int, count: int, completion: int = 0) -> np.ndarray:
    """`count` numbers in [0, 1) for the tokens at `position` and after it: float64.

    Philox is counter-based (Salmon et al. 2011): a number depends on (seed, completion, position) alone, so the same
    request draws the same alone, in any batch, on any back-end, and when another worker goes on with it.
    """
    # A counter gives four numbers; the first is the position's.
    raw = np.random.Philox(key=seed, counter=position | completion << 64).random_raw(4 * count)[::4]
    return np.asarray((raw >> np.uint64(11)) * 2.0**-53)


class Uniforms:
    """The same, one at a time, for one row: a block of them costs as much as one."""

    def __init__(self, seed: int, completion: int = 0) -> None:
        self._seed, self._completion = seed, completion
        self._first, self._block = 0, np.empty(0)

    def __call__(self, position: int) -> float:
        if not self._first <= position < self._first + len(self._block):
            self._first, self._block = position, uniforms(self._seed, position, _BLOCK, self._completion)
        return float(self._block[position - self._first])


@dataclass(frozen=True)
class Draw:
    """How one row's next token is sampled. `uniform`: its number in [0, 1).

    `tally`: token → how often the answer has it, those of the prompt included (with 0): what the penalties count.
    `fresh`: the row's newest token is not in the tally yet, because only the device knows it so far.
    `mask`: bits of the tokens that a grammar allows, int32 (vocabulary / 32, rounded up); None: all.
    """

    request: GenerateRequest
    uniform: float
    tally: Mapping[int, int] = field(default_factory=dict)
    mask: np.ndarray | None = None
    fresh: bool = False

    @property
    def greedy(self) -> bool:
        return self.request.temperature == 0.0

    @property
    def ranked(self) -> bool:
        """Whether its parameters need the order of the logits."""
        return not self.greedy and (self.request.top_k > 0 or self.request.top_p < 1.0)

    @property
    def penalised(self) -> bool:
        return penalised(self.request)


def penalised(request: GenerateRequest) -> bool:
    """Whether the tokens so far change the logits of the next one."""
    return (request.repetition_penalty, request.presence_penalty, request.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Pick:
    token_id: int
    #: The raw model's.
    logit: float
    logprob: float
    #: Of the distribution sampled from.
    probability: float
    #: The raw model's likeliest tokens with their logprobs, best first, as many as the request asks for.
    alternatives: tuple[tuple[int, float], ...] = ()

    @property
    def finite(self) -> bool:
        """Whether the model gave numbers of which a choice could be made."""
        return all(map(math.isfinite, (self.logit, self.logprob, self.probability)))

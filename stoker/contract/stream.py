"""What a job publishes while it runs. `index` counts from 0 and is the entry's id in the Redis Stream."""

from __future__ import annotations

from typing import Literal

from stoker.contract.base import Message


class StreamToken(Message):
    """One generated token.

    `text` is what became certain with this token: it may be empty while a character is incomplete, and the texts of
    all tokens join to the whole text. `logit` and `logprob` are the raw model's; `probability` is that of the
    distribution sampled from (after temperature, top-k and top-p), so 1.0 when greedy.
    """

    index: int
    token_id: int
    text: str
    logit: float
    logprob: float
    probability: float
    is_eos: bool = False
    finish_reason: Literal["stop", "length"] | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None


class TrainReport(Message):
    """One optimizer step. `loss` is the mean cross-entropy in nats over the batch's target tokens."""

    index: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    gradient_norm: float
    #: Tokens that went through the model since the run began.
    tokens: int
    tokens_per_second: float

    @property
    def is_last(self) -> bool:
        return self.step == self.steps

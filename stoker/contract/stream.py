"""What a job publishes while it runs. `index` counts from 0 and is the entry's id in the Redis Stream."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stoker.contract.base import Message

#: Why an answer ended. `stop`: the model's own end token; `stop_token`, `stop_string`: one that the request names;
#: `length`: `max_tokens` was reached; `context`: the model takes no more; `grammar`: the structure is complete.
FinishReason = Literal["stop", "stop_token", "stop_string", "length", "context", "grammar"]


class Alternative(Message):
    """A token that might have come instead, with the raw model's log-probability."""

    token_id: int
    text: str
    logprob: float


class StreamToken(Message):
    """One generated token.

    `text` is what became certain with this token: it may be empty while a character is incomplete or while a stop
    string may have begun, and the texts of all tokens of a completion join to its whole text. `logit` and `logprob`
    are the raw model's; `probability` is that of the distribution sampled from (after bias, penalties, grammar,
    temperature, top-k, top-p and min-p), so 1.0 when greedy. `index` counts all tokens of the job; with several
    completions `completion` says whose it is.
    """

    index: int
    token_id: int
    text: str
    logit: float
    logprob: float
    probability: float
    is_eos: bool = False
    finish_reason: FinishReason | None = None
    #: Which of the `n` completions, from 0.
    completion: int = 0
    #: The raw model's likeliest tokens, best first, as many as `top_logprobs` asked for.
    alternatives: tuple[Alternative, ...] = ()
    #: Of a completion's first token: whether the prompt ended in a block of reasoning, with which the text goes on.
    in_reasoning: bool = False

    @property
    def is_last(self) -> bool:
        """Whether it is the last one of its completion."""
        return self.finish_reason is not None


class TrainReport(Message):
    """One optimizer step. `loss` is the mean cross-entropy in nats over the step's target tokens.

    A report whose `note` says that the run was rolled back repeats the step that it goes on from.
    """

    index: int
    step: int = Field(ge=0)
    steps: int = Field(ge=1)
    loss: float
    learning_rate: float
    gradient_norm: float
    #: Tokens that went through the model since the run began, without padding.
    tokens: int
    tokens_per_second: float
    #: The same mean over the held-out examples, if this step was evaluated.
    held_out_loss: float | None = None
    #: The most memory that MLX held since the worker started, in bytes.
    memory_bytes: int = 0
    #: Passes over the examples.
    epoch: float = 0.0
    note: str = ""
    #: When it came to the broker, by its clock, in seconds since the epoch; None: it is not there.
    published: float | None = None
    #: Whether the run ends with this step: by its number, or by `stop_after`.
    last: bool = False

    @property
    def is_last(self) -> bool:
        return self.last

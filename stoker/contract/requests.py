"""Requests: one class a kind of job, with a limit on every size."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from stoker.contract.base import Message, Name

MAX_TEXTS = 4096
MAX_TEXT_CHARS = 1_000_000
#: All texts of one job together: a Celery message this large still passes in milliseconds.
MAX_REQUEST_CHARS = 8_000_000

#: The linear layers that LoRA may change, by their last name, as PEFT calls them.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text given; it needs at least one character that is not a space")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_not_blank)]


class JobRequest(Message):
    """What every kind of job can be told."""

    #: 0 is served first, 9 last.
    priority: int = Field(default=5, ge=0, le=9)
    #: Seconds from the submission after which the job ends with `DeadlineExceeded`. None: no deadline.
    deadline: float | None = Field(default=None, gt=0.0, le=30 * 24 * 3600.0)


class EmbedRequest(JobRequest):
    """Texts to be turned into vectors."""

    kind: ClassVar[str] = "embed"

    model: Name
    texts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_TEXTS)]
    #: Unit length. None: as the model's own files say.
    normalize: bool | None = None
    #: Cut a text that is longer than the model takes; else it is an error.
    truncate: bool = False
    #: Put before each text: a name that the model's files know, `query` or `passage` (as E5 wants them), or any text.
    #: None: the default that the model's files name, if any.
    prompt: Annotated[str, StringConstraints(max_length=1000)] | None = None

    @model_validator(mode="after")
    def _whole_size(self) -> EmbedRequest:
        total = sum(map(len, self.texts))
        if total > MAX_REQUEST_CHARS:
            raise ValueError(f"texts: {total} characters in one job; at most {MAX_REQUEST_CHARS}. Send several jobs")
        return self


class GenerateRequest(JobRequest):
    """A prompt to be continued."""

    kind: ClassVar[str] = "generate"

    model: Name
    prompt: Text
    #: LoRA adapter to generate with; None: the bare base.
    adapter: Name | None = None
    max_tokens: int = Field(default=128, ge=1, le=32_768)
    #: 0 is greedy.
    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    #: Sample among the k likeliest tokens; 0: among all.
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    #: Sample among the fewest tokens whose probabilities add up to this.
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    #: The client draws one when none is given, so that a job that moves to another worker goes on with the same tokens.
    seed: int = Field(default=0, ge=0, lt=2**63)


class TrainRequest(JobRequest):
    """A LoRA adapter to be trained on the warm base."""

    kind: ClassVar[str] = "train"

    model: Name
    #: The adapter's name.
    name: Name
    #: Blob that holds the dataset as JSON lines.
    dataset: str = Field(min_length=1, max_length=128)
    steps: int = Field(default=100, ge=1, le=1_000_000)
    rank: int = Field(default=8, ge=1, le=256)
    alpha: float = Field(default=16.0, gt=0.0, le=4096.0)
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1, max_length=7)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    batch_size: int = Field(default=4, ge=1, le=256)
    #: Tokens of an example; a longer one is an error that names its line.
    max_length: int = Field(default=512, ge=2, le=32_768)
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1.0)
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    weight_decay: float = Field(default=0.01, ge=0.0, le=1.0)
    #: Bound of the global gradient norm.
    clip: float = Field(default=1.0, gt=0.0, le=1e6)
    seed: int = Field(default=0, ge=0, lt=2**63)


Request = EmbedRequest | GenerateRequest | TrainRequest

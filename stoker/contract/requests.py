"""Requests: one class a kind of job, with a limit on every size."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticKnownError

from stoker.contract.base import Adapter, Message, Name
from stoker.contract.freeform import check_json
from stoker.contract.shown import brief
from stoker.contract.vectors import VectorType

#: The last to be served: what people wait for goes first. 0 is the best.
LOWEST_PRIORITY = 9

MAX_TEXTS = 4096
MAX_TEXT_CHARS = 1_000_000
#: All texts of one job together: a Celery message this large still passes in milliseconds.
MAX_REQUEST_CHARS = 8_000_000

#: Tokens and alternatives that one job may make: what its stream and its result hold in the broker.
MAX_ENTRIES = 2**20
#: Tokens of a prompt that is given as ids.
MAX_PROMPT_IDS = 131_072
#: Tokens whose logits are shifted.
MAX_BIASES = 1024
#: Sampling parameters are 0 or at least this in size: logits that are divided by less leave the range of float32.
LEAST = 1e-6


def _zero_or_plain(value: float) -> float:
    if 0.0 < abs(value) < LEAST:
        raise ValueError(f"{value!r} given; 0 (off) or at least {LEAST:g} in size is allowed")
    return value


Temperature = Annotated[float, Field(ge=0.0, le=10.0), AfterValidator(_zero_or_plain)]
MinP = Annotated[float, Field(ge=0.0, le=1.0), AfterValidator(_zero_or_plain)]
#: What is added to a logit, or taken from it.
Shift = Annotated[float, Field(ge=-100.0, le=100.0), AfterValidator(_zero_or_plain)]

#: Optimizer steps of a training run.
MAX_STEPS = 1_000_000
#: The linear layers of the Llama family that LoRA may change, by their last name, as PEFT calls them. Other
#: architectures have others; the worker says which.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MAX_RANK = 256
LoraTarget = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
#: What is trained where a request names no layers: those of attention. A worker whose model has fused ones takes these.
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text given; it needs at least one character that is not a space")
    return text


Text = Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS), AfterValidator(_not_blank)]


_NUMBERS: tuple[object, ...] = (int, float, int | None, float | None)


class JobRequest(Message):
    """The fields that every kind of job has."""

    #: 0 is served first, 9 last.
    priority: int = Field(default=5, ge=0, le=LOWEST_PRIORITY)
    #: Seconds from the submission after which the job ends with `DeadlineExceeded`. None: no deadline.
    deadline: float | None = Field(default=None, gt=0.0, le=30 * 24 * 3600.0)

    kind: ClassVar[str]

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, asked: ValidationInfo) -> Any:
        """pydantic takes `true` for 1: an answer of one token, in silence, where `max_tokens` is that."""
        if isinstance(value, bool) and cls.model_fields[str(asked.field_name)].annotation in _NUMBERS:
            # One of pydantic's own: how the value is spelled depends on where it comes from.
            raise PydanticKnownError("float_type")
        return value

    @property
    def ability(self) -> str:
        """What a model must be able to do for this job: one of `kinds.ABILITIES`."""
        return self.kind


#: What an embedding model does that has a `query`: it scores texts against that.
RERANK = "rerank"


class EmbedRequest(JobRequest):
    """Texts to be turned into vectors; or, with a `query`, each into a vector of one number, its score."""

    kind: ClassVar[str] = "embed"

    model: Name
    texts: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MAX_TEXTS)]
    #: Unit length. None: as the model's own files say.
    normalize: bool | None = None
    #: What becomes of a text that is longer than the model takes: it is an error, or loses its end.
    truncation: Literal["error", "end"] = "error"
    #: Put before each text: a name that the model's files know, `query` or `passage` (as E5 wants them), `document`
    #: (nothing, unless the files say otherwise), or any text.
    #: None: the default that the model's files name, if any.
    prompt: Annotated[str, StringConstraints(max_length=1000)] | None = None
    #: Keep the first numbers of each vector: for models that were trained for it (Matryoshka). None: all.
    dimensions: int | None = Field(default=None, ge=1, le=65_536)
    #: What the vectors travel and are kept in. int8 has a scale for each vector.
    dtype: VectorType = "float32"
    #: What each text is scored against, by a model that reranks. None: vectors. A request without it has no such field
    #: when it travels, so that workers of earlier releases take it; one with it they refuse by the field's name.
    query: Text | None = None

    @property
    def ability(self) -> str:
        return self.kind if self.query is None else RERANK

    @model_serializer(mode="wrap")
    def _without_query(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        made: dict[str, Any] = fields(self)
        if self.query is None:
            made.pop("query", None)
        return made

    @model_validator(mode="before")
    @classmethod
    def _truncate(cls, fields: Any) -> Any:
        """`truncate=True` is another way to say `truncation="end"`."""
        if not isinstance(fields, dict) or "truncate" not in fields:
            return fields
        given = dict(fields)
        asked = given.pop("truncate")
        if not isinstance(asked, bool):
            raise ValueError(f"truncate: {brief(asked)} given; true and false are allowed")
        if "truncation" in given:
            raise ValueError("truncate and truncation given; say one of them")
        return given | {"truncation": "end" if asked else "error"}

    @model_validator(mode="after")
    def _whole_size(self) -> EmbedRequest:
        # A model that reranks reads the query with each text.
        total = sum(map(len, self.texts)) + len(self.texts) * len(self.query or "")
        if total > MAX_REQUEST_CHARS:
            counted = "characters in one job" + ("" if self.query is None else ", the query counted with each text")
            raise ValueError(f"texts: {total} {counted}; at most {MAX_REQUEST_CHARS}. Send several jobs")
        return self

    @model_validator(mode="after")
    def _scores(self) -> EmbedRequest:
        given = [name for name in ("dimensions", "dtype") if getattr(self, name) not in (None, "float32")]
        if self.query is not None and given:
            raise ValueError(f"{given[0]} given with query; it is for vectors, and a score is one number in float32")
        return self


class ChatMessage(Message):
    """One message of a conversation, as the model's own chat template takes it."""

    role: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,31}$")]
    #: None for a message that only calls tools.
    content: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)] | None = None
    #: What the assistant thought before it answered.
    reasoning_content: Annotated[str, StringConstraints(max_length=MAX_TEXT_CHARS)] | None = None
    name: Annotated[str, StringConstraints(max_length=128)] | None = None
    tool_calls: Annotated[tuple[dict[str, Any], ...], Field(max_length=128)] | None = None
    tool_call_id: Annotated[str, StringConstraints(max_length=128)] | None = None


#: A token's id; which of them a model has, its worker says.
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
#: It is looked through up to the first wrong one.
PromptIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class GenerateRequest(JobRequest):
    """A prompt to be continued: exactly one of `prompt`, `prompt_ids` and `messages`."""

    kind: ClassVar[str] = "generate"

    model: Name
    #: Continued as it is: no chat template is applied.
    prompt: Text | None = None
    #: The same as token ids, with nothing added.
    prompt_ids: PromptIds | None = None
    #: A conversation, for the model's chat template.
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, max_length=4096)] | None = None
    #: JSON descriptions of functions, for the chat template.
    tools: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, max_length=128)] | None = None
    #: Further variables of the chat template, such as `enable_thinking`.
    template: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    #: LoRA adapter to generate with, `name` or `name@version`; None: the bare base.
    adapter: Adapter | None = None
    max_tokens: int = Field(default=128, ge=1, le=32_768)
    #: Completions of the one prompt; each draws random numbers of its own.
    n: int = Field(default=1, ge=1, le=16)
    #: 0 is greedy.
    temperature: Temperature = 0.0
    #: Sample among the k likeliest tokens; 0: among all.
    top_k: int = Field(default=0, ge=0, le=1_000_000)
    #: Sample among the fewest tokens whose probabilities add up to this.
    top_p: float = Field(default=1.0, ge=1e-9, le=1.0)
    #: Sample among the tokens that are at least this much as likely as the likeliest.
    min_p: MinP = 0.0
    #: Divides positive and multiplies negative logits of tokens of the prompt and the answer, each once; 1: off.
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10.0)
    #: Taken from the logit of a token that the answer has.
    presence_penalty: Shift = 0.0
    #: Taken from the logit of a token as often as the answer has it.
    frequency_penalty: Shift = 0.0
    #: Token id → what is added to its logit.
    logit_bias: Annotated[dict[TokenId, Shift], Field(max_length=MAX_BIASES)] | None = None
    #: The client draws one when none is given, so that a job that moves to another worker goes on with the same tokens.
    seed: int = Field(default=0, ge=0, lt=2**63)
    #: Texts that end the answer; they are no part of it.
    stop: Annotated[tuple[StopText, ...], Field(max_length=16)] = ()
    #: Tokens that end the answer, in addition to those that the model ends with; they have no text.
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=64)] = ()
    #: Go on behind the model's own end tokens.
    ignore_eos: bool = False
    #: Alternatives reported with each token: the raw model's likeliest.
    top_logprobs: int = Field(default=0, ge=0, le=20)
    #: Draft tokens from what stands in prompt and answer already; the answer is the same. None: as the worker has
    #: it. It travels only where it is given, so that workers of earlier releases take all other requests.
    lookup: bool | None = None
    #: The answer is JSON that fits this schema ({}: any JSON).
    json_schema: dict[str, Any] | None = None
    #: The answer matches this regular expression from its start to its end.
    regex: Annotated[str, StringConstraints(min_length=1, max_length=16_384)] | None = None

    @model_serializer(mode="wrap")
    def _without_lookup(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        made: dict[str, Any] = fields(self)
        if self.lookup is None:
            made.pop("lookup", None)
        return made

    @field_validator("prompt_ids", "stop_token_ids", "logit_bias", mode="before")
    @classmethod
    def _no_truth_among_numbers(cls, value: Any) -> Any:
        items = value.values() if isinstance(value, dict) else value
        # By their types: to compare would take 1 for true.
        if isinstance(value, dict | list | tuple) and bool in set(map(type, items)):
            raise ValueError("true or false is among them; expected numbers")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> GenerateRequest:
        given = [name for name in ("prompt", "prompt_ids", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'no prompt'} given; exactly one of prompt, prompt_ids, messages")
        for name in ("tools", "template"):
            if getattr(self, name) is not None and self.messages is None:
                raise ValueError(f"{name} given without messages; it is for the chat template alone")
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex given; at most one of them")
        if self.ignore_eos and (self.json_schema is not None or self.regex is not None):
            raise ValueError("ignore_eos given with json_schema or regex, which end where the grammar says")
        for name in ("messages", "tools", "template", "json_schema"):
            check_json(name, getattr(self, name), MAX_TEXT_CHARS)
        entries = self.n * self.max_tokens * (1 + self.top_logprobs)
        if entries > MAX_ENTRIES:
            raise ValueError(
                f"n x max_tokens x (1 + top_logprobs): {entries} tokens and alternatives given; at most {MAX_ENTRIES}. "
                "Ask for fewer of one of them"
            )
        return self

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of the functions that `tools` describes; templates take them in either form."""
        described = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in self.tools or ()]
        return tuple(one["name"] for one in described if isinstance(one.get("name"), str))


class TrainRequest(JobRequest):
    """A LoRA adapter to be trained on the warm base."""

    kind: ClassVar[str] = "train"

    model: Name
    #: The adapter's name.
    name: Name
    #: Blob that holds the dataset as JSON lines, or `worker:NAME`: a file under the worker's data root.
    dataset: str = Field(min_length=1, max_length=512)
    steps: int = Field(default=100, ge=1, le=MAX_STEPS)
    #: Passes over the examples that are learned from, which then say how many steps there are. None: `steps` says it.
    epochs: int | None = Field(default=None, ge=1, le=10_000)
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    alpha: float = Field(default=16.0, gt=0.0, le=4096.0)
    targets: Annotated[tuple[LoraTarget, ...], Field(min_length=1, max_length=32)] = DEFAULT_TARGETS
    #: Scale the update by alpha / sqrt(rank) instead of alpha / rank.
    rslora: bool = False
    #: Learn the norm of each output's weights in addition to their direction.
    dora: bool = False
    #: Probability with which an input of the adapter is left out.
    dropout: float = Field(default=0.0, ge=0.0, le=0.9)
    #: Examples of a forward pass.
    batch_size: int = Field(default=4, ge=1, le=256)
    #: Forward passes of a step: the gradient is that of `batch_size` times as many examples at once.
    accumulation: int = Field(default=1, ge=1, le=1024)
    #: Tokens of an example; a longer one is an error that names its line.
    max_length: int = Field(default=512, ge=2, le=32_768)
    #: Let the loss count prompts too.
    learn_prompts: bool = False
    learning_rate: float = Field(default=2e-4, gt=0.0, le=1.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000)
    weight_decay: float = Field(default=0.01, ge=0.0, le=1.0)
    #: Bound of the global gradient norm.
    clip: float = Field(default=1.0, gt=0.0, le=1e6)
    label_smoothing: float = Field(default=0.0, ge=0.0, le=0.9)
    #: Compute activations anew for the gradient instead of keeping them: less memory, a third more time.
    gradient_checkpointing: bool = False
    #: Share of the examples that is not learned from, drawn by `seed`, for evaluation.
    held_out: float = Field(default=0.0, ge=0.0, le=0.5)
    #: The last so many lines of the dataset are what is held out, instead of a share. 0: `held_out` says it.
    held_out_lines: int = Field(default=0, ge=0, le=1_000_000)
    #: Steps between evaluations on what is held out; the last step is evaluated too. 0: at the end alone.
    eval_every: int = Field(default=0, ge=0, le=1_000_000)
    #: Stop after this many evaluations without a new best. 0: never.
    stop_after: int = Field(default=0, ge=0, le=1000)
    #: A loss above this many times the mean of the 16 before, and 1 nat above it, is taken for divergence. 0: none is.
    spike: float = Field(default=3.0, ge=0.0, le=1e6)
    #: Steps between checkpoints.
    checkpoint_every: int = Field(default=20, ge=1, le=1_000_000)
    #: Serve the new version as soon as it is made.
    promote: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _evaluation(self) -> TrainRequest:
        if self.held_out and self.held_out_lines:
            raise ValueError("held_out and held_out_lines given; say one of them")
        if (self.eval_every or self.stop_after) and not (self.held_out or self.held_out_lines):
            raise ValueError("eval_every and stop_after need held_out above 0: the share of examples to evaluate on")
        if self.stop_after and not self.eval_every:
            raise ValueError("stop_after needs eval_every above 0")
        return self


class AdapterRequest(JobRequest):
    """An adapter that was made elsewhere, to be checked against the model and taken into the registry."""

    kind: ClassVar[str] = "adapters"

    model: Name
    name: Name
    #: Blob that holds its files.
    upload: str = Field(min_length=1, max_length=256)
    #: Serve it as soon as it is there.
    promote: bool = True


Request = EmbedRequest | GenerateRequest | TrainRequest | AdapterRequest

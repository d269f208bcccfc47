"""What all requests for generation have in common, and how it becomes a job's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stoker.client.options import GenerateOptions
from stoker.contract.requests import MAX_BIASES
from stoker.contract.shown import as_json
from stoker.gateway.errors import Refused
from stoker.gateway.fields import Body, Items, at_most

#: What `service_tier` means in priorities of jobs; 0 is served first, 9 last.
TIERS = {"auto": 5, "default": 5, "priority": 2, "flex": 8}


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(f"{as_json(value)} given; expected a text, or a list of texts")


def _token_ids(value: Any) -> Any:
    """JSON has no numbers for names: ids of tokens come as texts."""
    if not isinstance(value, dict) or any(not str(name).isdecimal() for name in value):
        raise ValueError(
            f"{as_json(value)} given; expected an object that maps ids of tokens to numbers from -100 to 100"
        )
    return {int(name): number for name, number in value.items()}


Biases = Annotated[dict[int, float], BeforeValidator(_token_ids), at_most(MAX_BIASES)]
Texts = Annotated[Items[str], BeforeValidator(_texts)]


class StreamOptions(Body):
    IDLE: ClassVar[Mapping[str, object]] = {"include_obfuscation": False}

    include_usage: bool = False


class GenerateBody(Body):
    """Fields of every endpoint that generates, of any vendor. Those behind `seed` are Stoker's own."""

    model: str
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stream: bool = False
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: Items[int] = Field(default_factory=list)
    ignore_eos: bool = False
    lookup: bool | None = None
    regex: str | None = None
    priority: int | None = None
    deadline: float | None = None

    def sampling(self) -> GenerateOptions:
        """These fields as options of a job."""
        options = GenerateOptions(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)
        options |= GenerateOptions(
            repetition_penalty=self.repetition_penalty, stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos, deadline=self.deadline, lookup=self.lookup,
            priority=self.asked_priority,
        )  # fmt: skip
        if self.regex is not None:
            options["regex"] = self.regex
        return options

    def work(self) -> dict[str, Any]:
        fields = super().work()
        fields.pop("service_tier", None)
        return fields | {"priority": self.asked_priority}

    @property
    def asked_priority(self) -> int:
        # Stoker's own field is more exact than the vendor's.
        return self.usual_priority if self.priority is None else self.priority

    @property
    def usual_priority(self) -> int:
        return TIERS["default"]


class OpenAIBody(GenerateBody):
    """Fields of OpenAI's endpoints alone."""

    stop: Texts = Field(default_factory=list)
    service_tier: Literal["auto", "default", "priority", "flex"] = "auto"
    user: str | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Biases = Field(default_factory=dict)
    stream_options: StreamOptions | None = None

    def sampling(self) -> GenerateOptions:
        if self.stream_options is not None and not self.stream:
            message = "stream_options: given without stream; it is for answers that are streamed. Leave it out."
            raise Refused(400, message, param="stream_options", code="invalid_value")
        options = super().sampling()
        options |= GenerateOptions(
            n=self.n, presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty, stop=self.stop
        )
        if self.logit_bias:
            options["logit_bias"] = self.logit_bias
        return options

    @property
    def usual_priority(self) -> int:
        return TIERS[self.service_tier]

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

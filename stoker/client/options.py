"""The options of each call, as type checkers see them: what the pydantic requests take, under the same names.

`tests/stoker/test_typed_calls.py` holds both equal. A field that a call names itself (`model`, `texts`, `seed` …) is
no option.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from typing_extensions import TypedDict

from stoker.client.requests import Prompt
from stoker.contract.requests import ChatMessage, LoraTarget
from stoker.contract.shown import brief
from stoker.contract.vectors import VectorType
from stoker.contract.wording import Show
from stoker.errors import InvalidRequest


class JobOptions(TypedDict, total=False):
    """Options of every kind of job."""

    priority: int
    deadline: float | None


class EmbedOptions(JobOptions, total=False):
    """Options of `embed`, `embed_many` and `embed_chunks`."""

    normalize: bool | None
    truncation: Literal["error", "end"]
    #: True is another way to say `truncation="end"`.
    truncate: bool
    prompt: str | None
    dimensions: int | None
    dtype: VectorType


class RerankOptions(JobOptions, total=False):
    """Options of `rerank`: those of `embed` that are not for vectors."""

    normalize: bool | None
    truncation: Literal["error", "end"]
    truncate: bool
    prompt: str | None


class GenerateManyOptions(JobOptions, total=False):
    """Options of `generate_many`, for all its requests."""

    tools: Sequence[Mapping[str, object]] | None
    template: Mapping[str, object] | None
    adapter: str | None
    max_tokens: int
    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: Sequence[str] | str
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    top_logprobs: int
    lookup: bool | None
    json_schema: Mapping[str, object] | None
    regex: str | None


class GenerateOptions(GenerateManyOptions, total=False):
    """Options of `generate`."""

    prompt_ids: Sequence[int] | None
    messages: Sequence[ChatMessage | Mapping[str, object]] | None


class GenerateItem(GenerateOptions, total=False):
    """One request of `generate_many`: a prompt, under the name of its kind, and options that are its own."""

    prompt: Prompt | None
    model: str | None
    seed: int | None


class TrainOptions(JobOptions, total=False):
    """Options of `train`."""

    steps: int
    epochs: int | None
    rank: int
    alpha: float
    targets: Sequence[LoraTarget]
    rslora: bool
    dora: bool
    dropout: float
    batch_size: int
    accumulation: int
    max_length: int
    learn_prompts: bool
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    weight_decay: float
    clip: float
    label_smoothing: float
    gradient_checkpointing: bool
    held_out: float
    held_out_lines: int
    eval_every: int
    stop_after: int
    spike: float
    checkpoint_every: int
    promote: bool
    seed: int


class AdapterOptions(JobOptions, total=False):
    """Options of `adapters.load`."""

    promote: bool


Options: TypeAlias = EmbedOptions | RerankOptions | GenerateManyOptions | TrainOptions | AdapterOptions


def checked_options(
    given: Mapping[str, object], options: type[Options], named: Iterable[str], show: Show = brief
) -> dict[str, object]:
    """`given`, as the fields of a request. `named`: the call's own parameters. `show`: how errors spell values.

    Raises `InvalidRequest` for an option that the call does not have.
    """
    for name in given:
        if name not in options.__annotations__:
            known = sorted({*options.__annotations__, *named})
            shown = name if isinstance(name, str) and len(name) <= 60 and name.isidentifier() else show(name)
            close = difflib.get_close_matches(shown, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise InvalidRequest(f"{shown}: no such option{hint} Allowed: {', '.join(known)}.")
    return dict(given)

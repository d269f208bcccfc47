"""Asking the engine what a command wants to know, in a process of its own (`workers.models_tool`): this one imports
neither MLX nor worker code."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Literal, overload

from typing_extensions import TypedDict

from stoker.errors import ConfigError, JobFailed, from_wire
from stoker.local.process import how_it_ended


class Pulled(TypedDict):
    path: str


class Verified(TypedDict):
    path: str
    ok: bool
    tensors: int
    numbers: int


class QuantizedReply(TypedDict):
    """`form`: of the matrices, in words. `quantized`, `dense`: tensors of each. The bytes are those of the weights."""

    path: str
    form: str
    quantized: int
    dense: int
    bytes_before: int
    bytes_after: int


class Exported(TypedDict):
    """`layers`: those that the adapter changed."""

    path: str
    layers: int


class Inspected(TypedDict):
    """`engine.checkpoints.inspecting` says what each of them is."""

    path: str
    format: str
    architecture: str
    kind: str
    supported: bool
    file_bytes: int
    parameters: int
    tensors: int
    dtypes: dict[str, int]
    quantization: str | None
    context: int
    layers: int
    dim: int
    vocabulary: int
    chat_template: bool
    weight_bytes: dict[str, int]
    cache_bytes_per_1000: dict[str, int] | None
    notes: list[str]
    reranks: bool


class Planned(TypedDict):
    """`engine.training.planning` says what each of them is."""

    examples: int
    held_out: int
    steps: int
    tokens_an_epoch: int
    learned_an_epoch: int
    shortest: int
    median: int
    longest: int
    steps_an_epoch: int
    epochs: float
    trained_parameters: int
    seconds_a_step: float
    seconds: float
    memory_bytes: int
    device: str


@overload
def ask_engine(command: Literal["pull"], *, sources: Sequence[str]) -> Pulled: ...
@overload
def ask_engine(command: Literal["inspect"], *, sources: Sequence[str]) -> Inspected: ...
@overload
def ask_engine(command: Literal["verify"], *, sources: Sequence[str]) -> Verified: ...
@overload
def ask_engine(
    command: Literal["quantize"],
    *,
    sources: Sequence[str],
    target: str,
    bits: int | None,
    group_size: int | None,
    mode: str,
    recipe: str | None,
) -> QuantizedReply: ...
@overload
def ask_engine(command: Literal["export"], *, sources: Sequence[str], adapter: str, target: str) -> Exported: ...
@overload
def ask_engine(
    command: Literal["plan"], *, sources: Sequence[str], dataset: str, request: Mapping[str, object]
) -> Planned: ...
def ask_engine(command: str, **arguments: object) -> object:
    """The tool's answer; an error of its keeps its class."""
    if importlib.util.find_spec("workers") is None or importlib.util.find_spec("engine") is None:
        raise ConfigError(
            "this command runs from a checkout of Stoker or its image: the published package holds the client alone. "
            "Clone the repository and run `make venv` there."
        )
    tool = [sys.executable, "-m", "workers.models_tool", command, json.dumps(arguments)]
    done = subprocess.run(tool, stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        ended = f"`{' '.join(tool[1:4])}` ended with {how_it_ended(done.returncode)}"
        raise JobFailed(f"{ended}. What it said is above.") from None
    if "error" in answer:
        raise from_wire(answer["error"]["name"], answer["error"]["message"])
    return answer

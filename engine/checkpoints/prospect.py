"""What a model would be if it were loaded, from its headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from typing_extensions import Unpack

from engine.checkpoints.inspecting import Inspection, inspect
from engine.checkpoints.loading import PrecisionOptions
from engine.checkpoints.sources import resolve
from engine.models.sentence import EmbeddingSpec
from engine.platform.compiler import on_cpu
from engine.weights.precision import Precision
from engine.weights.safetensors_header import FP8
from stoker.contract import ModelCard
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, TRAIN
from stoker.errors import ModelError

#: What each kind of model can do.
_KINDS = {"embed": (EMBED.name,), "generate": (GENERATE.name, TRAIN.name, ADAPTERS.name)}


@dataclass(frozen=True)
class Prospect:
    """`bytes`: that its weights will take, about."""

    card: ModelCard
    bytes: int


def prospect(
    name: str, sources: Sequence[str], *, download: bool = False, **options: Unpack[PrecisionOptions]
) -> Prospect:
    """The model called `name`; `options` are those of `load`. With `download` a hub's is fetched. Raises `ModelError`
    if it is not there, damaged, or of an architecture that is not supported."""
    found = inspect(resolve(sources, download=download))
    if not found.supported:
        raise ModelError(f"{found.path}: {'; '.join(found.notes)}")
    card = ModelCard(
        model=name,
        architecture=found.architecture,
        kinds=_KINDS[found.kind],
        context=found.context,
        parameters=found.parameters,
        dim=_dim(found),
        reranks=found.reranks,
        chat=found.kind == "generate" and found.chat_template,
    )
    return Prospect(card, _weight_bytes(found, Precision.of(**options)))


class _Sizes(NamedTuple):
    vocab: int
    dim: int
    context: int


def _dim(found: Inspection) -> int:
    """The numbers of a vector, behind all that follows the model."""
    if found.kind != "embed" or found.reranks or not found.path.is_dir():
        return int(found.reranks)
    return EmbeddingSpec.from_folder(found.path, _Sizes(found.vocabulary, found.dim, found.context)).dim


def _weight_bytes(found: Inspection, asked: Precision) -> int:
    precision = asked.for_encoder() if found.kind == "embed" else asked
    size = int(precision.dtype.size) if precision.dtype is not None else (4 if on_cpu() else 2)
    policy = precision.quantization
    # Numbers of 8 bits become dense.
    if policy is None or (policy.bits is None and (found.quantization is None or FP8 in found.dtypes)):
        return found.parameters * size
    if policy.bits is None:
        return found.weight_bytes["stored"]
    # A group shares a scale and a bias.
    return int(found.parameters * (policy.bits / 8 + 2 * size / policy.group_size))

"""A copy of a model with an adapter merged into its weights, for programs that know no adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from engine.adapters.lane import read_adapter
from engine.adapters.lora import LoraWeights, adapted_norms, square_norms
from engine.adapters.stacked import folded
from engine.checkpoints.loading import DECODERS, LoadedModel, load
from engine.checkpoints.quantizing import copy_rest
from engine.checkpoints.sources import resolve
from engine.models.layers import Linear
from engine.models.llama import Llama
from engine.platform.jsonfiles import read_object
from engine.weights import safetensors
from engine.weights.foreign_sections import is_quantized
from engine.weights.names import canonical
from stoker.errors import ModelError
from stoker.files.durable import draft_folder, publish


@dataclass(frozen=True)
class Merged:
    path: Path
    layers: int


def merge(sources: Sequence[str], adapter: Path, target: Path) -> Merged:
    """Write to the new folder `target` the model of `sources` (config.json, safetensors) with the adapter of the folder
    `adapter` merged: W + s·AB, and with DoRA each output's weights times m/‖W + s·AB‖. The base is not touched.

    Raises `ModelError` for a base that is no folder or is quantized, or an adapter that does not fit; `OSError`.
    """
    source = resolve(sources)
    if not source.is_dir() or is_quantized(read_object(source / "config.json")):
        raise ModelError(f"{source}: merging needs a model folder with config.json and safetensors, not quantized")
    if target.exists() or target.is_symlink():
        raise ModelError(f"{target}: exists already; name a folder that does not")
    model = load(str(source), [str(source)], dtype="float32", quantize="none")
    if not isinstance(model.decoder, Llama):
        # Its files may hold a layer under another name, or turned round; only mlx-lm's model file knows.
        raise ModelError(
            f"{source}: merging into a {model.architecture} is not supported; into {', '.join(DECODERS)} it is. "
            "Generate with the adapter instead: `stoker adapters load`"
        )
    weights = read_adapter(adapter, model)
    with draft_folder(target.parent) as draft:
        _write(source, draft, model, weights)
        if not publish(draft, target):
            raise ModelError(f"{target}: another program has put files there meanwhile; name another folder")
    return Merged(target, len(weights.matrices))


def _write(source: Path, draft: Path, model: LoadedModel, weights: LoraWeights) -> None:
    """Every file of the base, its shards with the merged layers in place."""
    layers = {f"model.{name}.weight": name for name in weights.matrices}
    names = canonical(safetensors.entries(source), model.architecture)
    shards = safetensors.files(source)
    # An index that is left over from another save would mislead who reads the copy.
    left_over = [] if len(shards) > 1 or shards[0].name != "model.safetensors" else [safetensors.INDEX_NAME]
    for shard in shards:
        arrays = safetensors.read(shard)
        for tensor in [name for name in arrays if names[name] in layers]:
            arrays[tensor] = _merged(model, weights, layers[names[tensor]]).astype(arrays[tensor].dtype)
        safetensors.write(draft / shard.name, arrays, {"format": "pt"})
    copy_rest(source, draft, [*(shard.name for shard in shards), *left_over])


def _merged(model: LoadedModel, weights: LoraWeights, name: str) -> mx.array:
    """W' (out, in) of one layer, float32."""
    linear: Linear = model.decoder.linears[name]
    norms = None
    if weights.config.dora:
        norms = adapted_norms(linear, square_norms(linear), weights.matrices[name], weights.config.scale, mx.float32)
    sides = folded(weights, name, linear, norms)
    weight = linear.dense().astype(mx.float32)
    if "gain" in sides:
        weight = weight * sides["gain"]
    result = (weight + sides["a"] @ sides["b"]).T
    mx.eval(result)
    return result

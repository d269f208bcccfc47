"""Write a quantized copy of a model folder, in the layout that mlx-lm reads (`engine.weights.mlx_layout`)."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.checkpoints.loading import DECODERS
from engine.checkpoints.networks import QuantizedNetwork
from engine.checkpoints.recipes import Recipe
from engine.checkpoints.shards import Shards
from engine.models.bridge import package
from engine.models.embedders import ENCODERS
from engine.models.sentence_files import pools_decoder
from engine.platform.jsonfiles import read_config, write_json
from engine.text.templates import FOLDER as TEMPLATES
from engine.weights import safetensors
from engine.weights.foreign_sections import is_quantized
from engine.weights.mlx_layout import QuantizedLayout, split
from engine.weights.names import canonical
from engine.weights.quantized import AFFINE, Form, QuantizedTensor, quantize
from engine.weights.tensors import Stored
from stoker.errors import ModelError
from stoker.files.durable import draft_folder, publish

#: What a model folder holds in addition to its weights: tokenizer, chat template, generation settings, licence.
_COPIED = (".json", ".jinja", ".txt", ".model", ".md", "")
#: Parts of the checkpoint that no model reads: a rotary buffer of old files.
_DROPPED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Quantized:
    """What `quantize_folder` wrote. `form`: of the matrices, in words; `bytes`: of the weights, before and after."""

    path: Path
    form: str
    quantized: int
    dense: int
    bytes_before: int
    bytes_after: int


def quantize_folder(
    src: Path,
    dst: Path,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = AFFINE,
    recipe: str | None = None,
) -> Quantized:
    """Write to the new folder `dst` the model of `src` (config.json, safetensors) with matrices of few bits, as
    `Recipe.of` has them.

    Every matrix whose rows fall into groups is quantized from the dtype that it is stored in; norms,
    biases and other matrices stay as they are. What runs mlx-lm's model files gets its names, and what its file says of
    single layers. `dst` appears whole or not at all; one shard at a time is in memory.

    Raises `ModelError` for a form or recipe that there is not, a source that is damaged, of an architecture not
    supported or quantized already, or a `dst` that exists; `OSError` if it cannot be written.
    """
    chosen = Recipe.of(bits, group_size, mode, recipe)
    config = _source_config(src)
    if dst.exists() or dst.is_symlink():
        raise ModelError(f"{dst}: exists already; name a folder that does not")
    with draft_folder(dst.parent) as draft:
        copy_rest(src, draft, ("config.json", safetensors.INDEX_NAME))
        config, counts = _written(src, draft, config, chosen)
        # mlx-lm takes every layer that is named for a quantized one.
        others = {layer: form for layer, form in counts.forms.items() if form != chosen.usual}
        layout = QuantizedLayout(chosen.usual, others)
        write_json(draft / "config.json", {**config, **layout.to_config()})
        if not publish(draft, dst):
            raise ModelError(f"{dst}: another program has put files there meanwhile; name a folder that does not exist")
    return Quantized(dst, str(chosen), len(counts.forms), counts.dense, counts.before, counts.after)


def _source_config(src: Path) -> dict[str, Any]:
    if not src.is_dir():
        raise ModelError(f"{src}: not a folder with config.json and safetensors; only such a model can be quantized")
    config = read_config(src)
    architecture, file = config.get("model_type"), package.file_of(config)
    own = architecture in DECODERS
    if architecture in ENCODERS or (not own and pools_decoder(src, architecture)):
        raise ModelError(f"{src}: architecture {architecture!r} cannot be quantized; models that generate can")
    if not own and file is None:
        raise ModelError(f"{src}: {package.unknown(architecture, tuple(DECODERS))}")
    if is_quantized(config):
        raise ModelError(f"{src}: is quantized already; take the model's unquantized checkpoint")
    if own:
        DECODERS[str(architecture)].from_config(config)
    return config


def _written(src: Path, dst: Path, config: dict[str, Any], recipe: Recipe) -> tuple[dict[str, Any], _Counts]:
    """(config.json of the copy, what was written)."""
    file = None if config["model_type"] in DECODERS else package.file_of(config)
    if file is not None:
        network = QuantizedNetwork.of(src, config, file, recipe)
        dense, shards = network.dense, network.write(dst)
        return network.config, _Counts(network.forms, dense, network.bytes, shards.bytes)
    counts = _write_weights(src, dst, config, recipe)
    # mlx-lm drops the head of a model that says it has none of its own.
    return {**_older_rope(config), **config, "tie_word_embeddings": counts.tied}, counts


def _older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` says, under the names of older files: mlx-lm looks for no others."""
    scaling = dict(config.get("rope_parameters") or {})
    base = scaling.pop("rope_theta", None)
    older = {} if base is None else {"rope_theta": base}
    return older if scaling.get("rope_type", "default") == "default" else {**older, "rope_scaling": scaling}


@dataclass
class _Counts:
    """The layers that were quantized, tensors left dense, bytes before and after, and whether the head is the
    embedding."""

    forms: dict[str, Form] = field(default_factory=dict)
    dense: int = 0
    before: int = 0
    after: int = 0
    tied: bool = False


def _write_weights(src: Path, dst: Path, config: dict[str, Any], recipe: Recipe) -> _Counts:
    names = canonical(safetensors.entries(src), config["model_type"])
    names, tied = _ends(src, names, bool(config.get("tie_word_embeddings")))
    files = safetensors.files(src)
    shards, counts = Shards(dst, len(files)), _Counts(tied=tied)
    for file in files:
        written: dict[str, mx.array] = {}
        for tensor, array in _needed(safetensors.read(file), names):
            counts.before += array.nbytes
            stored = _stored(tensor, array, recipe.form(tensor, int(config["num_hidden_layers"])))
            if isinstance(stored, QuantizedTensor):
                counts.forms[tensor.removesuffix(".weight")] = stored.form
            counts.dense += stored is array
            parts = split(tensor, stored)
            mx.eval(*parts.values())
            written |= parts
        shards.write(written)
    shards.close()
    counts.after = shards.bytes
    return counts


def _ends(src: Path, names: dict[str, str], tied: bool) -> tuple[dict[str, str], bool]:
    """The tensors that are written, file's name -> its name there, and whether the head is the embedding: as
    `engine.models.llama` takes them. Nothing reads the second copy of a tied head."""
    of = {name: file for file, name in names.items()}
    head, table = of.get("lm_head.weight"), of.get("model.embed_tokens.weight")
    if not tied or head is None:
        return names, tied
    if table is None:
        return {**names, head: "model.embed_tokens.weight"}, True
    arrays = safetensors.read_folder(src)
    if arrays[head].dtype != arrays[table].dtype or not mx.array_equal(arrays[head], arrays[table]):
        return names, False
    return {file: name for file, name in names.items() if file != head}, True


def _needed(arrays: dict[str, mx.array], names: dict[str, str]) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a shard by the names that they get, each let go of once it is taken."""
    for name in sorted(arrays):
        array = arrays.pop(name)
        if name in names and not name.endswith(_DROPPED):
            yield names[name], array


def _stored(name: str, array: mx.array, form: Form) -> Stored:
    if not name.endswith(".weight") or not form.fits(array.shape):
        return array
    if not mx.issubdtype(array.dtype, mx.floating):
        raise ModelError(f"tensor {name!r} is of {array.dtype}, not of floating-point numbers")
    return quantize(array, form)


def copy_rest(src: Path, dst: Path, skipped: Collection[str]) -> None:
    """Copy the files of `src` that are not weights, the chat templates in their own folder too, except for the names
    `skipped`."""
    for file in sorted([*src.iterdir(), *(src / TEMPLATES).glob("*.jinja")]):
        if file.is_file() and file.suffix in _COPIED and not file.name.startswith(".") and file.name not in skipped:
            target = dst / file.relative_to(src)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)

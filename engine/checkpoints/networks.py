"""A quantized copy of a model that runs mlx-lm's model file: its layers, names and choices, as `mlx_lm.convert` has
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.checkpoints.inspecting import check_layers
from engine.checkpoints.recipes import Recipe
from engine.checkpoints.shards import Shards
from engine.models.bridge import weights
from engine.weights import safetensors, safetensors_header
from engine.weights.quantized import Form
from stoker.errors import ModelError

#: What a file holds at most, as mlx-lm's.
SHARD_BYTES = 5 << 30
#: Fields of a config.json that say nothing of a copy: where it came from, and the part that sees, which it has not.
_LEFT_OUT = ("_name_or_path", "vision_config")


@dataclass(frozen=True)
class QuantizedNetwork:
    """`arrays`: all parameters by mlx-lm's names, not yet evaluated. `forms`: of the quantized layers. `bytes`: of the
    weights before."""

    config: dict[str, Any]
    arrays: dict[str, mx.array]
    forms: dict[str, Form]
    bytes: int

    @classmethod
    def of(cls, folder: Path, config: Mapping[str, Any], file: str, recipe: Recipe) -> QuantizedNetwork:
        """The model of a folder, as mlx-lm's `file` has it. Raises `ModelError`."""
        check_layers(folder / "config.json", config, len(safetensors_header.entries(folder)))
        spelled = weights.spelled(config, file)
        network, _ = weights.network_of(spelled, file)
        weights.fill(folder, spelled, network, safetensors.read_folder(folder))
        before = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
        forms = _quantize(network, recipe)
        sees = "vision_tower" in getattr(network, "model", {})
        left_out = [name for name in _LEFT_OUT if not sees or name != "vision_config"]
        kept = {name: value for name, value in spelled.items() if name not in left_out}
        return cls(kept, dict(tree_flatten(network.parameters())), forms, before)

    @property
    def dense(self) -> int:
        """Tensors that stay as they are."""
        codes = {f"{layer}.{part}" for layer in self.forms for part in ("weight", "scales", "biases")}
        return len(self.arrays.keys() - codes)

    def write(self, folder: Path) -> Shards:
        """Its files of weights; each array is let go of once it is written. Raises `OSError`."""
        parts = self._parts()
        shards = Shards(folder, len(parts))
        for names in parts:
            shards.write({name: self.arrays.pop(name) for name in names})
        shards.close()
        return shards

    def _parts(self) -> list[list[str]]:
        """The names of each file."""
        parts: list[list[str]] = [[]]
        size = 0
        for name, array in self.arrays.items():
            if parts[-1] and size + array.nbytes > SHARD_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(name)
            size += array.nbytes
        return parts


def _quantize(network: nn.Module, recipe: Recipe) -> dict[str, Form]:
    """Every layer whose rows fall into groups, each in the form that the recipe gives it; where there is none, in that
    of the model's own file, which keeps routers finer."""
    modules = dict(network.named_modules())
    if recipe.finer is not None and not any("down_proj" in path for path in modules):
        raise ModelError("a recipe needs layers called down_proj, which this model has not: give bits instead")
    layers, forms = len(network.layers), dict[str, Form]()

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % recipe.usual.group_size:
            return False
        own = weights.own_form(network, path, module) if recipe.finer is None else True
        chosen = Form(**own) if isinstance(own, dict) else recipe.form(path, layers)
        if not own or module.weight.shape[-1] % chosen.group_size:
            return False
        if not mx.issubdtype(module.weight.dtype, mx.floating):
            raise ModelError(f"tensor '{path}.weight' is of {module.weight.dtype}, not of floating-point numbers")
        forms[path] = chosen
        return asdict(chosen)

    nn.quantize(network, recipe.usual.group_size, recipe.usual.bits, class_predicate=form)
    return forms

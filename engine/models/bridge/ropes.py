"""Where mlx-lm's rotary positions differ from transformers': put right in a network that was made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from engine.models.bridge import package
from engine.models.bridge.configs import text_config
from engine.models.fields import Fields
from engine.models.rope import yarn_gain
from stoker.contract.shown import as_json
from stoker.errors import ModelError


def correct(network: nn.Module, file: str, config: Mapping[str, Any]) -> None:
    """Dynamic NTK stretches what lies beyond the context, where no request goes: plain positions within it. YaRN's
    `truncate` and `attention_factor`, which mlx-lm passes over, count, and neither `mscale` nor `mscale_all_dim` does
    alone. Raises `ModelError` for values that are none."""
    if file == "glm":
        _turn_a_part(network, text_config(config))
    plain: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if type(module).__name__ == "DynamicNTKScalingRoPE" and hasattr(module, "factor"):
            plain[path] = nn.RoPE(module.dims, traditional=module.traditional, base=module.base)
    if plain:
        network.update_modules(tree_unflatten(list(plain.items())))
    _scale(network, text_config(config))
    for where, stated in _yarns(text_config(config)):
        fields = Fields(stated, where)
        for module in network.modules():
            if type(module).__name__ != "YarnRoPE":
                continue
            if not fields.flag("truncate", default=True):
                module._freqs = _untruncated(module, fields, text_config(config))  # noqa: SLF001
            module.mscale = yarn_gain(fields, stated, fields.number("factor"))


def _turn_a_part(network: nn.Module, text: Mapping[str, Any]) -> None:
    """GLM-4 turns a part of each head, half of it where no field says how much; mlx-lm's file turns all of it."""
    factor = Fields(text, "config.json").number("partial_rotary_factor", 0.5)
    made = {
        path: nn.RoPE(int(old.dims * factor), traditional=old.traditional, base=old.base)
        for path, old in network.named_modules()
        if type(old) is nn.RoPE
    }
    network.update_modules(tree_unflatten(list(made.items())))


#: Type of scaling -> the layer that computes it.
_LAYERS: Mapping[str, str] = {"yarn": "Yarn", "llama3": "Llama3", "longrope": "Su", "su": "Su"}


def _scale(network: nn.Module, text: Mapping[str, Any]) -> None:
    """Put in the scaling that a file takes among its arguments and passes over, and longrope's factors for short texts
    where no text may be long."""
    scaling = text.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return
    turned = {path: each for path, each in network.named_modules() if type(each) is nn.RoPE}
    if not _computes(network, turned, scaling):
        _replace(network, turned, scaling, text)
    for module in network.modules():
        if type(module).__name__ == "SuScaledRoPE":
            _choose_factors(module, scaling, text)


def _computes(network: nn.Module, turned: Mapping[str, nn.Module], scaling: Mapping[str, Any]) -> bool:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return scaling.get("factor", 1.0) == 1.0 or any(each.scale != 1.0 for each in turned.values())
    sought = _LAYERS.get(str(kind), "")
    return any(sought in type(each).__name__ for each in network.modules())


def _replace(
    network: nn.Module, turned: Mapping[str, nn.Module], scaling: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    if len({(each.dims, each.base) for each in turned.values()}) != 1:
        raise ModelError(f"config.json: rope_scaling {as_json(dict(scaling))} is not supported: mlx-lm passes over it")
    make = package.load("rope_utils").initialize_rope
    longest = text.get("max_position_embeddings")
    try:
        made = {path: make(old.dims, old.base, old.traditional, dict(scaling), longest) for path, old in turned.items()}
    except Exception as error:
        raise ModelError(f"config.json: rope_scaling: {type(error).__name__}: {error}") from error
    network.update_modules(tree_unflatten(list(made.items())))


def _choose_factors(module: nn.Module, scaling: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Where no text is longer than those of the first training, transformers takes the factors for short ones."""
    fields, longest = Fields(scaling, "config.json: rope_scaling"), text.get("max_position_embeddings")
    original = module.original_max_position_embeddings
    if (longest is None or longest <= original) and "short_factor" in scaling:
        sides = [np.array(scaling[name]) for name in ("long_factor", "short_factor")]
        if sides[1].dtype.kind not in "if" or sides[1].shape not in ((), sides[0].shape):
            raise ModelError(
                f"config.json: short_factor = {as_json(scaling['short_factor'])}: not as many numbers as long"
            )
        longs, shorts = (mx.array(side, dtype=mx.float32) for side in sides)
        module._freqs = module._freqs / longs * shorts  # noqa: SLF001
    if scaling.get("attention_factor") is not None:
        module._scale = fields.number("attention_factor")  # noqa: SLF001


def _yarns(text: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in ("rope_scaling", "rope_parameters"):
        value = text.get(name)
        if isinstance(value, Mapping) and value.get("rope_type", value.get("type")) == "yarn":
            yield f"config.json: {name}", value


def _untruncated(module: nn.Module, fields: Fields, text: Mapping[str, Any]) -> mx.array:
    """The periods of YaRN whose borders between fast and slow pairs are not rounded to whole pairs (gpt-oss)."""
    dims, original = int(module.dims), fields.count("original_max_position_embeddings", 4096)
    base = fields.number("rope_theta", Fields(text, "config.json").number("rope_theta", 10_000.0))
    factor = fields.number("factor")

    def pair(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(pair(fields.number("beta_fast", 32.0)), 0.0), min(pair(fields.number("beta_slow", 1.0)), dims - 1)
    slow = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / max(high - low, 0.001), 0, 1)
    period = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1.0 / ((1.0 - slow) / period + slow / (factor * period))

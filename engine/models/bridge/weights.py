"""The weights of mlx-lm's networks: its own names and layouts, Stoker's readers and precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from engine.models.bridge import activations, falcon, package, ropes, routers, scores
from engine.models.bridge.configs import check, check_ropes, text_config
from engine.models.bridge.linears import dense_weight
from engine.models.bridge.spelling import OWN_HEAD, read_names, respelled
from engine.sparing import Pause, no_pause
from engine.weights import safetensors
from engine.weights.foreign import in_mlx_layout
from engine.weights.foreign_sections import METHODS
from engine.weights.precision import Precision
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: `quant_method` of a config.json -> the form of its codes, as mlx-lm reads them.
_METHODS: Mapping[str, dict[str, Any]] = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
}
#: Scales of 8 bits: (bits, group size) -> mode.
_SMALL_FLOATS = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}


def spelled(config: Mapping[str, Any], file: str) -> dict[str, Any]:
    """A config.json with the names that mlx-lm's `file` reads. Raises `ModelError`."""
    names = (each.name for each in fields(package.load(file).ModelArgs))
    return respelled(config, file, read_names(file, names))


def _odd_numbers(config: Mapping[str, Any], arguments: Any) -> str:
    """For behind an error that names no field: those whose number is a text, true or false, null or not above 0."""
    wanted = {each.name: str(each.type) for each in fields(arguments) if re.search(r"\b(int|float)\b", str(each.type))}
    nulls = [name for name, kind in wanted.items() if name in config and not re.search("Optional|None", kind)]
    values = {name: value for name, value in config.items() if name in wanted and not name.endswith("token_id")}
    for name, inner in config.items():
        if isinstance(inner, Mapping):
            values |= {f"{name}.{key}": value for key, value in inner.items() if not isinstance(value, bool)}
    odd = [f"{name} is {as_json(value)}" for name, value in values.items() if _is_odd(value)]
    odd += [f"{name} is null" for name in nulls if config[name] is None]
    return f". Look at its numbers: {', '.join(odd)}" if odd else ""


def _is_odd(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\s*-?[\d.]+\s*", value) is not None
    return isinstance(value, bool) or (isinstance(value, int | float) and value <= 0)


def network_of(config: Mapping[str, Any], file: str) -> tuple[nn.Module, Any]:
    """(mlx-lm's network with random weights, its arguments). Raises `ModelError`."""
    module = package.load(file)
    check_ropes(config)
    config = spelled(config, file)
    check(config, file, module.ModelArgs)
    try:
        args = module.ModelArgs.from_dict(_copied(dict(config)))
        network = module.Model(args)
    except Exception as error:
        raise ModelError(
            f"config.json: mlx-lm's {file} cannot be made of it ({type(error).__name__}: {str(error)[:300]})"
            f"{_odd_numbers(config, module.ModelArgs)}"
        ) from error
    ropes.correct(network, file, config)
    activations.correct(network, file, config)
    scores.correct(network, file, config)
    falcon.correct(network, file, config)
    routers.correct(network, file)
    return network, args


def read(folder: Path, config: Mapping[str, Any], network: nn.Module, precision: Precision) -> nn.Module:
    """The network with the weights of a folder, none of them evaluated. Raises `ModelError`."""
    arrays = safetensors.read_folder(folder)
    dtype = precision.dtype_for(arrays.values())
    exact = precision.dtype is not None or not any(array.dtype == dtype for array in arrays.values())
    arrays, config = translated(folder, config, arrays, dtype)
    fill(folder, config, network, arrays)
    settle(network, precision, dtype, every=exact or dtype == mx.float32)
    return network


def translated(
    folder: Path, config: Mapping[str, Any], arrays: dict[str, mx.array], dtype: mx.Dtype
) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """A folder's tensors and config in MLX's own layout. Raises `ModelError`."""
    try:
        return in_mlx_layout(config, arrays, dtype)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def settle(network: nn.Module, precision: Precision, dtype: mx.Dtype, *, every: bool) -> None:
    """Bring a filled network into the form that it is to be held in; `every`: see `_cast`. Nothing is evaluated."""
    if precision.quantization is None:
        _dequantize(network)
    elif precision.quantization.bits is not None:
        _quantize(network, precision.quantization.group_size, precision.quantization.bits)
    _cast(network, dtype, every=every)
    network.eval()


def evaluate(network: nn.Module, pause: Pause = no_pause) -> None:
    """Have each weight by itself, with a `pause` before."""
    for _, array in tree_flatten(network.parameters()):
        pause()
        mx.eval(array)


def fill(folder: Path, config: Mapping[str, Any], network: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Give a network the tensors of a folder or file, by the names that mlx-lm makes of theirs. Nothing is
    evaluated."""
    try:
        weights = _experts_upright(arrays) if config.get("model_type") == "gpt_oss" else dict(arrays)
        weights = _with_head(weights) if config.get("model_type") in OWN_HEAD else weights
        if config.get("model_type") == "falcon_h1":
            weights = falcon.in_layout(network, weights)
        elif hasattr(network, "sanitize"):
            weights = network.sanitize(weights)
    except Exception as error:
        raise ModelError(
            f"{folder}: mlx-lm cannot bring the tensors into its layout ({type(error).__name__}: {str(error)[:300]})"
        ) from error
    _check_head(folder, arrays, weights)
    corrections = _corrections(folder, config, arrays)
    routers.put_in(network, corrections)
    weights = {name: array for name, array in weights.items() if not name.endswith("rotary_emb.inv_freq")} | corrections
    weights = _stacked(weights)
    _take_codes(config, network, weights)
    _check_numbers(folder, network, weights)
    try:
        network.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise ModelError(f"{folder}: {' '.join(str(error).split())[:500]}") from error


def _check_head(folder: Path, arrays: Mapping[str, mx.array], weights: Mapping[str, mx.array]) -> None:
    """Files drop the head of a model that config.json ties; transformers takes one that is not the embedding."""
    heads = [name for name in arrays if name.endswith("lm_head.weight") and "mtp" not in name]
    if any(name.endswith("lm_head.weight") for name in weights):
        return
    for name in heads:
        head = arrays[name]
        tables = [array for path, array in arrays.items() if "embed" in path and array.shape == head.shape]
        if not any(mx.array_equal(head, table) for table in tables):
            raise ModelError(
                f"{folder}: tensor {name!r} is not the embedding, which mlx-lm would take in its place, by "
                "tie_word_embeddings of config.json or by default. If the head counts, set that to false"
            )


def _corrections(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    try:
        return routers.corrections(config, arrays)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error


def _with_head(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """With the embedding as the head where there is none."""
    if "lm_head.weight" in arrays:
        return arrays
    stem = "model.embed_tokens."
    table = {name.removeprefix(stem): array for name, array in arrays.items() if name.startswith(stem)}
    return {**arrays, **{f"lm_head.{part}": array for part, array in table.items()}}


def _experts_upright(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """gpt-oss's dense experts, stored (expert, in, out): mlx-lm's file brings only the codes into its layout."""
    return {
        f"{name}.weight" if _lies(name) else name: array.swapaxes(-1, -2) if _lies(name) else array
        for name, array in arrays.items()
    }


#: Parts of single experts' codes that a model file leaves behind where it stacks only their weights.
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.(scales|biases)")


def _stacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """With the scales and biases of experts in one array each, as their codes are."""
    found: dict[str, dict[int, mx.array]] = {}
    for name in list(weights):
        match = _EXPERT.fullmatch(name)
        if match is not None and f"{match[1]}.switch_mlp.{match[3]}.weight" in weights:
            whole = found.setdefault(f"{match[1]}.switch_mlp.{match[3]}.{match[4]}", {})
            whole[int(match[2])] = weights.pop(name)
    return {**weights, **{name: mx.stack([parts[index] for index in sorted(parts)]) for name, parts in found.items()}}


def _check_numbers(folder: Path, network: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Integers where the network, once its codes are taken, has floating-point numbers would mean nothing."""
    for name, array in tree_flatten(network.parameters()):
        given = weights.get(name)
        if (
            given is not None
            and mx.issubdtype(array.dtype, mx.floating)
            and not mx.issubdtype(given.dtype, mx.floating)
        ):
            raise ModelError(f"{folder}: tensor {name!r} is of {given.dtype}, not of floating-point numbers")


def _lies(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _take_codes(config: Mapping[str, Any], network: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Make quantized the layers whose weights are."""
    section = _section(config)
    if section is None:
        return

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = section.get(path)
        if isinstance(own, Mapping):
            return _checked(own, path)
        if own is False or not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return _form(path, module, weights)

    try:
        nn.quantize(
            network, int(section["group_size"]), int(section["bits"]), mode=section.get("mode", "affine"),
            class_predicate=form,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"config.json: quantization: {error}") from error


def _checked(own: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The form of one layer's codes. MLX divides by the size of a group, also by 0."""
    size = own.get("group_size", 1)
    if type(size) is not int or size < 1:
        raise ModelError(
            f"config.json: quantization: {path}: group_size = {as_json(size)}: a whole number of at least 1 is needed"
        )
    return dict(own)


def _section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The form of the codes by config.json. Raises `ModelError` for a method that is not MLX's."""
    own = config.get("quantization")
    if isinstance(own, Mapping):
        return dict(own)
    other = text_config(config).get("quantization_config")
    if other is None:
        return None
    method = other.get("quant_method") if isinstance(other, Mapping) else None
    if not isinstance(method, str) or method not in _METHODS:
        raise ModelError(
            f"config.json: quantization_config {as_json(other)} is not supported: MLX's own, "
            f"{', '.join((*_METHODS, *METHODS))} are. Take the model's unquantized checkpoint"
        )
    return dict(_METHODS[method])


def _form(path: str, module: nn.Module, weights: Mapping[str, mx.array]) -> dict[str, Any]:
    """What a layer's codes are, by their shapes; config.json may name another form for the layers it does not list."""
    scales, width = weights[f"{path}.scales"], module.weight.shape[-1]
    group_size = width // scales.shape[-1]
    bits = weights[f"{path}.weight"].shape[-1] * 32 // width
    if scales.dtype != mx.uint8:
        return {"group_size": group_size, "bits": bits, "mode": "affine"}
    if (bits, group_size) not in _SMALL_FLOATS:
        raise ModelError(f"the quantized layer {path!r}: {bits} bits in groups of {group_size} are no form of MLX's")
    return {"group_size": group_size, "bits": bits, "mode": _SMALL_FLOATS[bits, group_size]}


def own_form(network: nn.Module, path: str, module: nn.Module) -> bool | dict[str, Any]:
    """How the network's own file wants a layer quantized: as the others, not at all, or in a form of its own."""
    agrees = getattr(network, "quant_predicate", None)
    asked = agrees(path, module) if callable(agrees) else True
    return {"group_size": 64, "bits": 4, **asked} if isinstance(asked, Mapping) else bool(asked)


def _quantize(network: nn.Module, group_size: int, bits: int) -> None:
    """All matrices whose rows fall into groups, where the network's own file agrees."""

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            return False
        own = own_form(network, path, module)
        fits = not isinstance(own, dict) or module.weight.shape[-1] % own["group_size"] == 0
        return own if fits else False

    nn.quantize(network, group_size, bits, class_predicate=form)


def _dequantize(network: nn.Module) -> None:
    """Dense layers for the quantized ones: a CPU's products with codes are slow."""
    dense: dict[str, nn.Module] = {}
    for path, module in network.named_modules():
        if not hasattr(module, "bits") or "scales" not in module:
            continue
        kind = _DENSE.get(type(module).__name__)
        if kind is None:
            raise ModelError(f"{type(module).__name__}: no dense form of it is known; leave it quantized")
        dense[path] = _dense(module, kind)
    if dense:
        network.update_modules(tree_unflatten(list(dense.items())))


#: Quantized layer -> (mlx-lm's file of its dense form, or None for MLX's own, and its name).
_DENSE: Mapping[str, tuple[str | None, str]] = {
    "QuantizedLinear": (None, "Linear"),
    "QuantizedEmbedding": (None, "Embedding"),
    "QuantizedSwitchLinear": ("switch_layers", "SwitchLinear"),
    "QuantizedMultiLinear": ("mla", "MultiLinear"),
}


def _dense(module: nn.Module, kind: tuple[str | None, str]) -> nn.Module:
    file, name = kind
    made: nn.Module = getattr(nn if file is None else package.load(file), name).__new__(
        getattr(nn if file is None else package.load(file), name)
    )
    nn.Module.__init__(made)
    made.weight = dense_weight(module)
    if "bias" in module:
        made.bias = module["bias"]
    return made


def _cast(network: nn.Module, dtype: mx.Dtype, *, every: bool) -> None:
    """Floating-point weights in what the model computes in, except those that its file keeps as they are.

    `every`: also those that are in 32 bits among others in 16.
    """
    keeps = getattr(network, "cast_predicate", None)

    def cast(path: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating) or (callable(keeps) and not keeps(path)):
            return array
        if path.endswith(routers.CORRECTION):
            return array
        return array.astype(dtype) if every or array.dtype != mx.float32 else array

    network.update(tree_map_with_path(cast, network.parameters()))


def names(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every tensor of a network with its shape."""
    return {name: tuple(array.shape) for name, array in tree_flatten(network.parameters())}


def _copied(value: Any) -> Any:
    """mlx-lm's arguments write into what they are given."""
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value

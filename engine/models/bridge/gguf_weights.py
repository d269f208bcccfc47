"""The tensors of a GGUF file by the names of mlx-lm's networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge import weights
from engine.models.bridge.gguf_configs import MODELS, GgufModel
from engine.weights.folder import AGAIN_BITS, AGAIN_GROUP, PLAIN, sixteen_bits
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import llama_name
from engine.weights.precision import Precision
from stoker.errors import ModelError

#: Tensors that the configuration has taken (`gguf_configs.py`).
_READ_BEFORE = ("rope_factors_long.weight", "rope_factors_short.weight")


def read(gguf: GGUF, architecture: str, config: Mapping[str, Any], network: nn.Module, precision: Precision) -> None:
    """Give a network the tensors of a file, each evaluated. Raises `ModelError`."""
    dtype = precision.dtype_for([mx.zeros(1, sixteen_bits(gguf))])
    reader = _Reader(gguf, network, MODELS[architecture], precision, dtype)
    arrays: dict[str, mx.array] = {}
    for stored, name in placed(gguf, architecture, network):
        arrays |= reader.read(stored, name)
        mx.eval(arrays)
    weights.fill(gguf.path, {**config, "quantization": reader.section}, network, arrays)
    weights.settle(network, precision, dtype, every=True)


def outline(gguf: GGUF, architecture: str, config: Mapping[str, Any], network: nn.Module) -> None:
    """Check names and shapes; nothing is computed. Raises `ModelError`."""
    shapes = weights.names(network)
    arrays = {name: mx.zeros(shapes[name]) for _, name in placed(gguf, architecture, network)}
    weights.fill(gguf.path, config, network, arrays)


def placed(gguf: GGUF, architecture: str, network: nn.Module) -> list[tuple[str, str]]:
    """(name in the file, name in the network) of every tensor. Raises `ModelError` for one without a place there."""
    shapes, found = weights.names(network), {}
    surplus = []
    for stored, info in gguf.tensors.items():
        name = llama_name(stored, MODELS[architecture].parts)
        if stored in _READ_BEFORE:
            continue
        if name is None or name not in shapes:
            surplus.append(stored)
        elif name in found:
            raise ModelError(f"{gguf.path}: tensor {stored!r} is in the file under two names")
        elif _bare(info.shape) != _bare(shapes[name]):
            raise ModelError(f"{gguf.path}: tensor {stored!r} has shape {info.shape}, not {shapes[name]}")
        else:
            found[name] = stored
    if surplus:
        names = ", ".join(sorted(surplus)[:3])
        raise ModelError(f"{gguf.path}: {len(surplus)} tensors that this architecture does not have: {names}")
    return [(stored, name) for name, stored in found.items()]


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Converters leave out sides of 1."""
    return tuple(side for side in shape if side != 1)


class _Reader:
    """Reads single tensors in the form that the network is to hold. `section`: the form of those that are codes."""

    def __init__(self, gguf: GGUF, network: nn.Module, model: GgufModel, precision: Precision, dtype: mx.Dtype) -> None:
        self._gguf, self._model, self._dtype = gguf, model, dtype
        self._policy = precision.quantization
        self._shapes = weights.names(network)
        self._quantizable = {path for path, module in network.named_modules() if hasattr(module, "to_quantized")}
        self._keeps = getattr(network, "cast_predicate", None)
        self.section: dict[str, Any] = {"group_size": AGAIN_GROUP, "bits": AGAIN_BITS}

    def read(self, stored: str, name: str) -> dict[str, mx.array]:
        """The tensor `stored` of the file under the names that it has in the network."""
        layer, policy = name.removesuffix(".weight"), self._policy
        if policy is not None and layer in self._quantizable and layer != name:
            codes = dict(self._codes(stored, name))
            if codes:
                return {f"{layer}.{part}": array for part, array in codes.items()}
        dense = mx.array(self._gguf.dequantize(stored)).reshape(self._shapes[name])
        if name.endswith("norm.weight"):
            dense = dense - self._model.norm_offset
        kept = callable(self._keeps) and not self._keeps(name)
        return {name: dense if kept else dense.astype(self._dtype)}

    def _codes(self, stored: str, name: str) -> Iterator[tuple[str, mx.array]]:
        """The parts of a quantized layer; none where it is to be dense."""
        gguf, policy, shape = self._gguf, self._policy, self._shapes[name]
        assert policy is not None
        layer, form = name.removesuffix(".weight"), {"group_size": AGAIN_GROUP, "bits": AGAIN_BITS, "mode": "affine"}
        if gguf.repackable(stored):
            packed = gguf.repack(stored)
            if policy.bits is not None and packed.bits > policy.bits:
                return
            form = {"group_size": packed.group_size, "bits": packed.bits, "mode": "affine"}
            parts = [mx.array(part) for part in (packed.weight, packed.scales, packed.biases)]
        elif policy.bits is None and gguf.tensors[stored].type.name not in PLAIN and shape[-1] % AGAIN_GROUP == 0:
            dense = mx.array(gguf.dequantize(stored)).reshape(shape)
            parts = list(mx.quantize(dense, group_size=AGAIN_GROUP, bits=AGAIN_BITS))
        else:
            return
        self.section[layer] = form
        for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
            array = array.reshape(*shape[:-1], -1)
            yield part, array if part == "weight" else array.astype(self._dtype)

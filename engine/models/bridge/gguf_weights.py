"""The tensors of a GGUF file by the names of mlx-lm's networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from numpy.typing import NDArray

from engine.models.bridge import weights
from engine.models.bridge.gguf_models import READ_BEFORE, GgufModel
from engine.sparing import Pause
from engine.weights.folder import AGAIN, PLAIN, quantized_from, sixteen_bits
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import llama_name, unpermute
from engine.weights.precision import Precision
from engine.weights.quantized import quantize
from stoker.errors import ModelError


def read(
    gguf: GGUF,
    model: GgufModel,
    config: Mapping[str, Any],
    network: nn.Module,
    precision: Precision,
    pause: Pause,
    others: tuple[str, ...] = (),
) -> None:
    """Give a network the tensors of a file, each read with a `pause` before, except those whose names begin with one of
    `others`. Raises `ModelError`."""
    reader = _Reader(gguf, network, model, config, precision)
    arrays: dict[str, mx.array] = {}
    shapes = weights.names(network)
    for stored, name in placed(gguf, model, network):
        pause()
        if name.startswith(others):
            arrays[name] = mx.zeros(shapes[name])
            continue
        made = reader.read(stored, name)
        mx.eval(made)
        arrays |= made
    weights.fill(gguf.path, {**config, "quantization": reader.section}, network, arrays)
    weights.settle(network, precision, reader.dtype, every=True)


def outline(gguf: GGUF, model: GgufModel, config: Mapping[str, Any], network: nn.Module) -> None:
    """Check names and shapes; nothing is computed. Raises `ModelError`."""
    shapes = weights.names(network)
    arrays = {name: mx.zeros(shapes[name]) for _, name in placed(gguf, model, network)}
    weights.fill(gguf.path, config, network, arrays)


def placed(gguf: GGUF, model: GgufModel, network: nn.Module) -> list[tuple[str, str]]:
    """(name in the file, name in the network) of every tensor. Raises `ModelError` for one without a place there."""
    shapes, found = weights.names(network), {}
    surplus = []
    for stored, info in gguf.tensors.items():
        if stored in READ_BEFORE:
            continue
        name = llama_name(stored, model.parts)
        if name is not None and name not in shapes:  # as `sinks`
            name = name.removesuffix(".weight")
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

    def __init__(
        self, gguf: GGUF, network: nn.Module, model: GgufModel, config: Mapping[str, Any], precision: Precision
    ) -> None:
        self._gguf, self._model = gguf, model
        self.dtype = precision.dtype_for([mx.zeros(1, sixteen_bits(gguf))])
        self._heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}
        self._policy = precision.quantization
        self._shapes = weights.names(network)
        self._quantizable = {path for path, module in network.named_modules() if hasattr(module, "to_quantized")}
        self._keeps = getattr(network, "cast_predicate", None)
        self.section: dict[str, Any] = asdict(AGAIN)

    def read(self, stored: str, name: str) -> dict[str, mx.array]:
        """The tensor `stored` of the file under the names that it has in the network."""
        layer, policy = name.removesuffix(".weight"), self._policy
        if policy is not None and layer in self._quantizable and layer != name:
            codes = dict(self._codes(stored, name))
            if codes:
                return {f"{layer}.{part}": array for part, array in codes.items()}
        dense = self._order(name)(self._gguf.dequantize(stored)).reshape(self._shapes[name])
        if name.endswith("norm.weight"):
            dense = dense - self._model.norm_offset
        kept = callable(self._keeps) and not self._keeps(name)
        return {name: dense if kept else dense.astype(self.dtype)}

    def _codes(self, stored: str, name: str) -> Iterator[tuple[str, mx.array]]:
        """The parts of a quantized layer; none where it is to be dense."""
        gguf, policy, shape, order = self._gguf, self._policy, self._shapes[name], self._order(name)
        assert policy is not None
        if gguf.repackable(stored):
            codes = quantized_from(gguf, stored, order)
            if policy.bits is not None and codes.bits > policy.bits:
                return
        elif policy.bits is None and gguf.tensors[stored].type.name not in PLAIN and shape[-1] % AGAIN.group_size == 0:
            codes = quantize(order(gguf.dequantize(stored)).reshape(-1, shape[-1]), AGAIN)
        else:
            return
        self.section[name.removesuffix(".weight")] = asdict(codes.form)
        for part, array in zip(("weight", "scales", "biases"), codes.astype(self.dtype).arrays, strict=False):
            yield part, array.reshape(*shape[:-1], -1)

    def _order(self, name: str) -> Callable[[NDArray[Any]], mx.array]:
        """Puts back the rows of q and k where the converter has another order."""
        heads = self._heads.get(name.rsplit(".", 2)[-2]) if self._model.permuted else None
        return lambda rows: mx.array(unpermute(rows, heads) if heads else rows)

"""The linear layers of mlx-lm's networks, with adapters: each row of a batch its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from engine.models.decoder import RunBlock
from engine.models.layers import LayerAdapters, Linear


class Pass:
    """The pass under way. Layers take it from here, because mlx-lm's files hand nothing through to them.

    One engine thread alone runs models, so there is one pass at a time; traces and gradients set it again for
    themselves.
    """

    def __init__(self) -> None:
        self.adapters: LayerAdapters | None = None
        self.rows = 0
        self.tokens = 0
        #: How the trainer wants each layer run.
        self.run_block: RunBlock | None = None
        #: Where a pass notes which layers ran, and whether an adapter could apply to them; None: nothing is noted.
        self.ran: dict[str, bool] | None = None
        #: The number of the layer that runs, where layers say so (`engine.models.bridge.sharing`).
        self.layer: int | None = None
        #: Whether a head that ranks share gives this rank's columns alone.
        self.own_columns = False

    @contextmanager
    def begun(self, adapters: LayerAdapters | None, rows: int, tokens: int) -> Iterator[None]:
        before = self.adapters, self.rows, self.tokens
        self.adapters, self.rows, self.tokens = adapters, rows, tokens
        try:
            yield
        finally:
            self.adapters, self.rows, self.tokens = before


class NetworkLinear(Linear):
    """A linear layer of a network as adapters know it; its numbers stay in the network's own layer."""

    def __init__(self, name: str, inner: nn.Linear | nn.QuantizedLinear) -> None:
        self.name, self._inner = name, inner
        bias = inner.get("bias")
        self.bias = bias if isinstance(bias, mx.array) else None

    def _product(self, x: mx.array) -> mx.array:
        result: mx.array = self._inner(x)
        return result

    @property
    def here(self) -> bool:
        """Whether its numbers are of this process; of a network that ranks share, each has some layers."""
        return "weight" in self._inner

    @property
    def shape(self) -> tuple[int, int]:
        inner = self._inner
        outputs, width = inner.weight.shape
        return (width * 32 // inner.bits if isinstance(inner, nn.QuantizedLinear) else width), outputs

    def dense(self) -> mx.array:
        return dense_weight(self._inner).T


class AdaptedLinear(nn.Module):
    """Stands in a network for one of its linear layers."""

    def __init__(self, name: str, inner: nn.Linear | nn.QuantizedLinear, under_way: Pass) -> None:
        super().__init__()
        self.inner = inner
        self.name, self._pass = name, under_way

    def __getattr__(self, key: str) -> Any:
        if "inner" not in self:
            raise AttributeError(key)
        return self["inner"] if key == "inner" else getattr(self["inner"], key)

    def __setattr__(self, key: str, value: Any) -> None:
        if "inner" in self and key not in ("name", "_pass", "_training", "_no_grad"):
            setattr(self["inner"], key, value)
        else:
            super().__setattr__(key, value)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self["inner"](x)
        under_way = self._pass
        if under_way.ran is not None:
            by_rows = x.shape[0] in (under_way.rows, under_way.rows * under_way.tokens)
            under_way.ran[self.name] = by_rows and under_way.ran.get(self.name, True)
        if under_way.adapters is None:
            return y
        rows = under_way.rows
        flat = x.reshape(rows, -1, x.shape[-1])
        return under_way.adapters.apply(self.name, flat, y.reshape(rows, -1, y.shape[-1])).reshape(y.shape)


def dense_weight(layer: nn.Module) -> mx.array:
    """The weight (…, out, in) of a layer, dequantized."""
    if not hasattr(layer, "bits"):
        weight: mx.array = layer.weight
        return weight
    return mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), group_size=layer.group_size, bits=layer.bits, mode=layer.mode
    )


def wrap(network: nn.Module, under_way: Pass) -> dict[str, AdaptedLinear]:
    """Put an `AdaptedLinear` for every linear layer within a numbered layer; path in the network → the new one."""
    made: dict[str, AdaptedLinear] = {}
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.QuantizedLinear) and any(part.isdigit() for part in path.split(".")):
            made[path] = AdaptedLinear(adapter_name(path), module, under_way)
    _replace(network, made)
    return made


def unwrap(network: nn.Module, made: Mapping[str, AdaptedLinear], ran: Mapping[str, bool]) -> dict[str, NetworkLinear]:
    """Put back the layers to which no adapter applies: those that a network reads past, or gives no rows. The others by
    their adapters' names."""
    apart = {path: each for path, each in made.items() if not ran.get(adapter_name(path), False)}
    _replace(network, {path: each["inner"] for path, each in apart.items()})
    kept = [(adapter_name(path), each["inner"]) for path, each in made.items() if path not in apart]
    return {name: NetworkLinear(name, inner) for name, inner in kept}


def adapter_name(path: str) -> str:
    """A layer's name as adapters have it: without the names of the bodies around the layers."""
    return path.removeprefix("language_model.").removeprefix("model.")


def _replace(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    if modules:
        network.update_modules(tree_unflatten(list(modules.items())))


def parameters_of(network: nn.Module) -> tuple[int, int]:
    """(weights, bytes) of a network; of a quantized layer the numbers that its codes stand for."""
    arrays = dict(tree_flatten(network.parameters()))
    count = 0
    for path, array in arrays.items():
        layer, _, part = path.rpartition(".")
        if f"{layer}.scales" not in arrays or part not in ("weight", "scales", "biases"):
            count += array.size
        elif part == "weight":
            scales = arrays[f"{layer}.scales"]
            count += scales.size * _group_size(network, layer)
    return count, sum(array.nbytes for array in arrays.values())


def _group_size(network: nn.Module, path: str) -> int:
    found = next(module for name, module in network.named_modules() if name == path)
    return int(found.group_size)

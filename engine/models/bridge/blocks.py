"""The layers of mlx-lm's networks one by one, so that a trainer can keep their inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge.linears import AdaptedLinear, NetworkLinear, Pass
from engine.models.bridge.slots import KvSlot, SlotList, StateSlot
from engine.models.layers import LayerAdapters, Linear
from engine.models.view import LayerCache


class NetworkBlock:
    """One call of a layer, as the trainer's `RunBlock` takes it. What else the layer was given stays as it is."""

    def __init__(self, linears: Sequence[Linear], under_way: Pass, run: Callable[[mx.array], mx.array]) -> None:
        self.linears = linears
        self._pass, self._run = under_way, run

    def __call__(self, x: mx.array, cache: LayerCache | None, adapters: LayerAdapters | None) -> mx.array:
        with self._pass.begun(adapters, *x.shape[:2]):
            return self._run(x)


class StandIn(nn.Module):
    """Stands in a network for one of its parts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """As `isinstance` asks for it: networks distinguish their layers by it."""
        return type(self["layer"]) if "layer" in self else StandIn

    def __getattr__(self, key: str) -> Any:
        if "layer" not in self:
            raise AttributeError(key)
        return self["layer"] if key == "layer" else getattr(self["layer"], key)


class Stage(StandIn):
    """Stands for a layer that a trainer may run in its own way."""

    def __init__(self, layer: nn.Module, under_way: Pass) -> None:
        super().__init__(layer)
        self._pass = under_way

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        layer, run_block = self["layer"], self._pass.run_block
        if run_block is None or not args or args[0].ndim != 3 or _differentiated((*args[1:], *keywords.values())):
            return layer(*args, **keywords)
        # Within the block the layer runs at once.
        self._pass.run_block = None
        try:
            block = NetworkBlock(self._linears(), self._pass, lambda x: layer(x, *args[1:], **keywords))
            return run_block(block, args[0])
        finally:
            self._pass.run_block = run_block

    def _linears(self) -> list[Linear]:
        return [NetworkLinear(part.name, part.inner) for part in self.modules() if isinstance(part, AdaptedLinear)]


#: What a layer may be given that no gradient goes through.
_CONSTANT = (int, float, str, type(None), KvSlot, StateSlot, SlotList)


def _differentiated(values: Sequence[Any]) -> bool:
    """Whether something of these could need a gradient, which a block that is run again would lose: arrays of other
    numbers than integers, and objects of a model file's own, which may hold some."""
    return not all(
        isinstance(value, _CONSTANT) or (isinstance(value, mx.array) and not mx.issubdtype(value.dtype, mx.floating))
        for value in values
    )


def layer_lists(network: nn.Module) -> Iterator[tuple[nn.Module, str, list[nn.Module]]]:
    """Every numbered list of the layers that take hidden states in turn, with the module that has it and its name."""
    layers = list(getattr(network, "layers", ()))
    for module in network.modules():
        for name, part in list(module.items()):
            if isinstance(part, list) and part and layers and part[0] is layers[0]:
                yield module, name, part


def stage(network: nn.Module, under_way: Pass) -> None:
    """Put a `Stage` for each layer."""
    for module, name, layers in list(layer_lists(network)):
        module[name] = [Stage(layer, under_way) for layer in layers]

"""Several adapters in one batch: LoRA, DoRA and none, each row with its own."""

from __future__ import annotations

import mlx.core as mx

from engine.adapters.flat import Matrices
from engine.adapters.lora import LoraWeights
from engine.models.layers import Linear
from kernels.lora import LoraInput, LoraSides, lora


class StackedLora:
    """Row i of the batch uses the adapter `indices[i]` (uint32) of each stack.

    `stacks[name]` holds `a` (adapters, in, rank) and `b` (adapters, rank, out), the scale and DoRA's gain folded into
    `b`; index 0 is zero, so that rows without an adapter go through the same product and come out unchanged. Where a
    DoRA adapter is held there are `gain` (adapters, out), which multiplies what the frozen layer made, and, if the
    layer has a bias, `shift` (adapters, out), which is added to it; 1 and 0 for all others.

    All are plain arrays in dictionaries, so that a compiled step can take them as arguments.
    """

    apart = False
    anchor: mx.array | None = None

    def __init__(self, stacks: Matrices, indices: mx.array) -> None:
        self.stacks, self.indices = stacks, indices

    def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
        stack = self.stacks.get(name)
        return y if stack is None else adapt_rows(stack, self.indices, x, y)

    def sides(self, name: str) -> LoraSides | None:
        """What the adapters change in the linear layer `name`, for kernels that do more with it."""
        stack = self.stacks.get(name)
        return None if stack is None else LoraSides(stack["a"], stack["b"], stack.get("gain"), stack.get("shift"))


def adapt_rows(stack: dict[str, mx.array], indices: mx.array, x: mx.array, y: mx.array) -> mx.array:
    """The adapted output (rows, tokens, out) of a layer, from its input `x` (rows, tokens, in) and its own output `y`;
    of one new token a row the axis of tokens may be absent.

    Only here a batch meets its adapters. One new token a row goes through a fused kernel where there is one.
    """
    return lora(LoraInput(x, y, stack["a"], stack["b"], indices, stack.get("gain"), stack.get("shift")))


def folded(weights: LoraWeights, name: str, linear: Linear, norms: mx.array | None) -> dict[str, mx.array]:
    """One adapter's sides for the layer `name` as a stack holds them, float32.

    `norms`: for DoRA, the layer's `adapted_norms`. With y₀ = x W, DoRA is g·(y₀ + s·x A B) + bias, g = m/‖W + s·AB‖;
    the frozen layer gives y = y₀ + bias, so it is g·y + (1 − g)·bias + x A (s·g·B).
    """
    sides, scale = weights.matrices[name], weights.config.scale
    if "m" not in sides or norms is None:
        return {"a": sides["a"], "b": sides["b"] * scale}
    gain = sides["m"] / norms
    found = {"a": sides["a"], "b": sides["b"] * (scale * gain), "gain": gain}
    if linear.bias is not None:
        found["shift"] = (1.0 - gain) * linear.bias.astype(mx.float32)
    return found

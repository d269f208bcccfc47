"""Routers that mlx-lm's files have otherwise than transformers: ERNIE's corrections, and Jamba's weights of experts."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.models.bridge import package
from stoker.errors import ModelError

CORRECTION = "moe_statics.e_score_correction_bias"


def correct(network: nn.Module, file: str) -> None:
    """Let Jamba's experts count by their share of all experts, not of the chosen ones."""
    for module in network.modules() if file == "jamba" else ():
        if type(module).__name__ == "JambaSparseMoeBlock":
            module.__class__ = _of_all()


def corrections(config: Mapping[str, Any], arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The corrections of an ERNIE's routers, which mlx-lm's `sanitize` drops; those of its layers that draft apart.

    Raises `ModelError` for a copy that has lost them."""
    if config.get("model_type") != "ernie4_5_moe":
        return {}
    found = {
        name: array for name, array in arrays.items() if name.startswith("model.layers.") and name.endswith(CORRECTION)
    }
    if not found and config.get("moe_use_aux_free") is True:
        raise ModelError(
            f"the tensors {CORRECTION!r} are missing, by which its experts are chosen (moe_use_aux_free of "
            "config.json): mlx-lm drops them when it writes a copy. Take the maker's own folder; `stoker models "
            "quantize` makes a copy that keeps them"
        )
    return found


def put_in(network: nn.Module, names: Collection[str]) -> None:
    """Let the mixtures that have a correction among `names` choose their experts by it."""
    for path, module in list(network.named_modules()):
        if f"{path}.{CORRECTION}" in names:
            module.moe_statics = nn.Module()
            module.moe_statics.e_score_correction_bias = mx.zeros((1, module.gate.weight.shape[0]))
            module.__class__ = _corrected()


@functools.cache
def _corrected() -> type[Any]:
    """ERNIE's mixture whose experts are chosen by the corrected gates, and weighted by the plain ones."""
    plain: type[Any] = package.load("ernie4_5_moe").Ernie4_5_MoeMLP

    class CorrectedMoe(plain):
        def __call__(self, x: mx.array) -> mx.array:
            gates = self.gate_act(self.gate(x).astype(mx.float32))
            rated = gates + self.moe_statics.e_score_correction_bias[0]
            chosen = mx.stop_gradient(mx.argpartition(-rated, kth=self.k - 1, axis=-1)[..., : self.k])
            scores = mx.take_along_axis(gates, chosen, axis=-1)
            scores = scores / mx.maximum(scores.sum(axis=-1, keepdims=True), 1e-12)
            y = self.switch_mlp(x, chosen)
            result: mx.array = (y * scores[..., None]).sum(axis=-2).astype(y.dtype)
            return result if self.shared_experts is None else result + self.shared_experts(x)

    CorrectedMoe.__name__ = plain.__name__
    return CorrectedMoe


@functools.cache
def _of_all() -> type[Any]:
    """Jamba's mixture, whose weights of the chosen experts are those of a softmax over all."""
    plain: type[Any] = package.load("jamba").JambaSparseMoeBlock

    class MoeOfAll(plain):
        def __call__(self, x: mx.array) -> mx.array:
            gates, k = mx.softmax(self.router(x), axis=-1, precise=True), self.num_experts_per_tok
            chosen = mx.stop_gradient(mx.argpartition(-gates, kth=k - 1, axis=-1)[..., :k])
            scores = mx.take_along_axis(gates, chosen, axis=-1)
            result: mx.array = (self.switch_mlp(x, chosen) * scores[..., None]).sum(axis=-2)
            return result

    MoeOfAll.__name__ = plain.__name__
    return MoeOfAll

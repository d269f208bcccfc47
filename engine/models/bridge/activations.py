"""Where the activation of mlx-lm's file is another form of GELU than config.json names, or than is taken by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

_FIELDS = ("hidden_activation", "hidden_act", "activation_function")
_EXACT, _TANH = ("gelu", "gelu_python"), ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_approx")


class _Form(NamedTuple):
    """`usual`: the activation of transformers where config.json names none. `computed`: names of those that the file
    computes. `linears`: of the feed-forward part, the one behind the activation last, and a gated one in the middle."""

    usual: str
    computed: tuple[str, ...]
    linears: tuple[str, ...]


_FORMS: Mapping[str, _Form] = {
    "gemma": _Form("gelu_pytorch_tanh", _EXACT, ("gate_proj", "up_proj", "down_proj")),
    "gpt2": _Form("gelu_new", _TANH, ("c_fc", "c_proj")),
    "gpt_neox": _Form("gelu", _TANH, ("dense_h_to_4h", "dense_4h_to_h")),
    "phi": _Form("gelu_new", _TANH, ("fc1", "fc2")),
    "starcoder2": _Form("gelu_pytorch_tanh", _EXACT, ("c_fc", "c_proj")),
}


def correct(network: nn.Module, file: str, config: Mapping[str, Any]) -> None:
    """Put in the form that config.json names where the file computes the other one."""
    form = _FORMS.get(file)
    if form is None:
        return
    named = next((config[field] for field in _FIELDS if config.get(field) is not None), form.usual)
    for wanted, kind in ((_EXACT, ExactMlp), (_TANH, TanhMlp)):
        if named in wanted and wanted != form.computed:
            for layer in network.layers:
                layer.mlp = kind(layer.mlp, form.linears)


class ExactMlp(nn.Module):
    """A feed-forward part with GELU as it is defined."""

    def __init__(self, given: nn.Module, linears: tuple[str, ...]) -> None:
        super().__init__()
        self._names = linears
        for name in linears:
            setattr(self, name, given[name])

    def activated(self, x: mx.array) -> mx.array:
        made: mx.array = nn.gelu(x)
        return made

    def __call__(self, x: mx.array) -> mx.array:
        first, *gated, last = (self[name] for name in self._names)
        inner = self.activated(first(x))
        for linear in gated:
            inner = inner * linear(x)
        result: mx.array = last(inner)
        return result


class TanhMlp(ExactMlp):
    """A feed-forward part with GELU as tanh approximates it."""

    def activated(self, x: mx.array) -> mx.array:
        made: mx.array = nn.gelu_approx(x)
        return made

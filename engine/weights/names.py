"""The names of a checkpoint's tensors, put as this engine's layers ask for them. No MLX.

transformers reads norms under their older names, `LayerNorm.gamma` and `.beta`, and a model with or without the name of
its body before every tensor. What else stands before all of them (`0.auto_model.`, `transformer.`, `module.`) comes
from programs that wrapped the model; it is recognised by the one tensor that every model has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from stoker.errors import ModelError

_OLDER = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


class _Body(NamedTuple):
    """`anchor`: a tensor that every model has; `prefix`: what is to stand before it."""

    anchor: str
    prefix: str


_DECODER = _Body("layers.0.input_layernorm.weight", "model.")
_ENCODER = _Body("embeddings.word_embeddings.weight", "")
#: `model_type` -> its body; all others are decoders.
_BODIES = {
    **dict.fromkeys(
        (
            "bert", "mpnet", "xlm-roberta", "roberta", "camembert", "distilbert", "electra", "albert", "deberta-v2",
            "nomic_bert", "gte",
        ),
        _ENCODER,
    ),
    "t5": _Body("encoder.final_layer_norm.weight", ""),
    "modernbert": _Body("embeddings.tok_embeddings.weight", ""),
}  # fmt: skip
#: The head lies next to the body, not in it.
_HEAD = "lm_head."


def canonical(names: Iterable[str], architecture: object) -> dict[str, str]:
    """Name in the file -> name in this engine. Raises `ModelError` if two tensors would get the same."""
    body = _BODIES.get(str(architecture), _DECODER)
    newer = {name: _newer(name) for name in names}
    stated = _prefix(newer.values(), body)
    found: dict[str, str] = {}
    origins: dict[str, str] = {}
    for name, renamed in newer.items():
        final = renamed if stated is None else _moved(renamed, stated, body)
        if final in origins:
            raise ModelError(f"tensors {origins[final]!r} and {name!r} are the same one, {final!r}, of the model")
        found[name], origins[final] = final, name
    return found


def _newer(name: str) -> str:
    for older, newer in _OLDER:
        name = name.replace(older, newer)
    return name


def _prefix(names: Iterable[str], body: _Body) -> str | None:
    """What stands before the body's tensors, if it is to be replaced and is clear."""
    starts = {name.removesuffix(body.anchor) for name in names if name.endswith(body.anchor)}
    starts = {start for start in starts if not start or start.endswith(".")}
    return None if body.prefix in starts or len(starts) != 1 else starts.pop()


def _moved(name: str, stated: str, body: _Body) -> str:
    outer = stated.removesuffix(body.prefix) if body.prefix else stated
    if name.startswith(outer + _HEAD):
        return name.removeprefix(outer)
    return body.prefix + name.removeprefix(stated) if name.startswith(stated) else name

"""The training loss of a Llama with LoRA or DoRA once more, in numpy and float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from engine.adapters.flat import Matrices
from engine.adapters.lora import dropout_keys
from engine.models.llama import Llama
from engine.training.data import TokenizedExample, collate
from engine.training.trainer import Trainer

Float64Matrices = dict[str, dict[str, np.ndarray]]


def arrays(matrices: Matrices) -> Float64Matrices:
    return {name: {side: float64(array) for side, array in sides.items()} for name, sides in matrices.items()}


def float64(array: mx.array) -> np.ndarray:
    return np.array(array).astype(np.float64)


class Model:
    """`held`: the matrices whose norms DoRA divides by, also after the model's own have changed: to the gradient the
    norms are constants (section 4.3 of its paper)."""

    def __init__(self, trainer: Trainer, held: Float64Matrices, key: mx.array) -> None:
        assert isinstance(trainer.decoder, Llama)
        self._decoder, self._request, self._scale = trainer.decoder, trainer.request, trainer.config.scale
        self._keys = dropout_keys(held, key)
        self._norms = {
            name: np.linalg.norm(float64(trainer.linears[name].dense()) + self._scale * sides["a"] @ sides["b"], axis=0)
            for name, sides in held.items()
        }

    def loss(self, matrices: Float64Matrices, rows: Sequence[TokenizedExample]) -> float:
        """The sum of the targets' losses."""
        batch = collate(rows)
        self._matrices = matrices
        x = float64(self._decoder.embed_tokens.weight)[np.array(batch.inputs)]
        for layer in self._decoder.layers:
            x = x + self._attention(layer.self_attn, _norm(layer.input_layernorm, x))
            y = _norm(layer.post_attention_layernorm, x)
            gate, up = self._linear(layer.mlp.gate_proj, y), self._linear(layer.mlp.up_proj, y)
            x = x + self._linear(layer.mlp.down_proj, gate / (1 + np.exp(-gate)) * up)
        hidden = _norm(self._decoder.norm, x)
        rows = hidden.reshape(-1, hidden.shape[-1])[np.array(batch.positions)]
        assert self._decoder.lm_head is not None
        logits = rows @ float64(self._decoder.lm_head.weight)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        smoothing = self._request.label_smoothing
        chosen = np.take_along_axis(logs, np.array(batch.targets)[:, None], -1)[:, 0]
        return float(-np.sum((1 - smoothing) * chosen + smoothing * logs.mean(-1)))

    def _linear(self, linear: Any, x: np.ndarray) -> np.ndarray:
        sides, name = self._matrices[linear.name], linear.name
        dropped = x
        if self._request.dropout:
            kept = np.array(mx.random.bernoulli(1 - self._request.dropout, x.shape, key=self._keys[name]))
            dropped = np.where(kept, x / (1 - self._request.dropout), 0.0)
        y = x @ float64(linear.dense()) + self._scale * (dropped @ sides["a"]) @ sides["b"]
        y = y * (sides["m"] / self._norms[name]) if "m" in sides else y
        whole: np.ndarray = y if linear.bias is None else y + float64(linear.bias)
        return whole

    def _attention(self, layer: Any, x: np.ndarray) -> np.ndarray:
        args, (rows, length, _) = layer.args, x.shape

        def heads(linear: Any, count: int) -> np.ndarray:
            return self._linear(linear, x).reshape(rows, length, count, args.head_dim).swapaxes(1, 2)

        q, k = (_turn(heads(linear, n), args.rope_base) for linear, n in
                ((layer.q_proj, args.heads), (layer.k_proj, args.kv_heads)))  # fmt: skip
        v = heads(layer.v_proj, args.kv_heads)
        k, v = (np.repeat(array, args.heads // args.kv_heads, axis=1) for array in (k, v))
        scores = q @ k.swapaxes(-1, -2) / args.head_dim**0.5
        weights = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
        y = weights / weights.sum(-1, keepdims=True) @ v
        return self._linear(layer.o_proj, y.swapaxes(1, 2).reshape(rows, length, -1))


def _norm(layer: Any, x: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = x / np.sqrt((x * x).mean(-1, keepdims=True) + layer.eps) * float64(layer.weight)
    return scaled


def _turn(x: np.ndarray, base: float) -> np.ndarray:
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[2])[:, None] * base ** (-np.arange(half)[None] / half)
    left, right = x[..., :half], x[..., half:]
    return np.concatenate(
        [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], axis=-1
    )

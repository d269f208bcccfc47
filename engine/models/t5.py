"""The encoder of T5 (Raffel et al., 2020) as a sentence encoder (Ni et al., 2022): GTR, sentence-T5.

A pre-norm Transformer without biases, with RMS norms, whose scores are not scaled and know positions by a relative bias
alone, one table for all layers. Names and shapes are those of Hugging Face's `T5EncoderModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from engine.models.allowed import CONTEXT, RENAMED, TABLES
from engine.models.attention import attention
from engine.models.encoder import Encoder, Group, RelativeBias, addend_of, join, side_by_side, split
from engine.models.fastmath import approximate_gelu, gelu
from engine.models.fields import Fields, renamed, spelled
from engine.models.layers import Embedding, Linear, RMSNorm
from engine.weights.tensors import Tensors
from stoker.contract.shown import as_json
from stoker.errors import ModelError

_ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "relu": lambda x: mx.maximum(x, 0.0),
    "gelu": gelu,
    "gelu_new": approximate_gelu,
    "silu": lambda x: x * mx.sigmoid(x),
}
#: Whether the inner layer has a gate, and what one of its parts goes through, by `feed_forward_proj`.
_FORMS = {
    **{name: (False, name) for name in _ACTIVATIONS},
    **{f"gated-{name}": (True, name) for name in _ACTIVATIONS},
    # Of this name alone the reference implementation takes the other GELU.
    "gated-gelu": (True, "gelu_new"),
}


@dataclass(frozen=True)
class T5Args:
    """The sizes of one encoder. `size`: of a head; all heads together need not be `dim`. `buckets`: of distances, up
    to `farthest`."""

    layers: int
    dim: int
    hidden: int
    heads: int
    size: int
    vocab: int
    norm_eps: float
    buckets: int
    farthest: int
    gated: bool
    activation: str

    @property
    def context(self) -> int:
        """The most tokens of a text. T5's positions have no end; its bias takes memory by their square."""
        return CONTEXT["t5"]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> T5Args:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        TABLES["t5"].check(config, "config.json")
        names = RENAMED["t5"]
        fields = Fields(renamed(config, names), "config.json", spelled(config, names))
        form = config.get("feed_forward_proj")
        form = "relu" if form is None else form
        if not isinstance(form, str) or form not in _FORMS:
            raise ModelError(
                f"config.json: feed_forward_proj = {as_json(form)} is not supported; {', '.join(_FORMS)} are"
            )
        gated, activation = _FORMS[form]
        fields.only("is_gated_act", gated)
        fields.only("dense_act_fn", activation)
        buckets = fields.count("relative_attention_num_buckets", 32)
        farthest = fields.count("relative_attention_max_distance", 128)
        if buckets < 4 or farthest <= buckets // 4:
            raise ModelError(
                f"config.json: relative_attention_num_buckets is {buckets}, and relative_attention_max_distance "
                f"{farthest}; at least 4 are needed, and more than a quarter of them"
            )
        return cls(
            layers=fields.count("num_hidden_layers"),
            dim=fields.count("hidden_size"),
            hidden=fields.count("d_ff"),
            heads=fields.count("num_attention_heads"),
            size=fields.count("head_dim", 64),
            vocab=fields.count("vocab_size"),
            norm_eps=fields.number("layer_norm_epsilon", 1e-6),
            buckets=buckets,
            farthest=farthest,
            gated=gated,
            activation=activation,
        )


class Block:
    def __init__(self, args: T5Args, index: int, tensors: Tensors):
        self.heads, self.activation = args.heads, _ACTIVATIONS[args.activation]
        first, second = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        attention, mlp = f"{first}.SelfAttention", f"{second}.DenseReluDense"
        width = args.heads * args.size

        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear.take(tensors, name, "", inputs, outputs)

        self.norm, self.mlp_norm = (
            RMSNorm.take(tensors, f"{part}.layer_norm", args.dim, args.norm_eps) for part in (first, second)
        )
        self.qkv = side_by_side(*(linear(f"{attention}.{part}", args.dim, width) for part in "qkv"))
        self.output = linear(f"{attention}.o", width, args.dim)
        inner = ("wi_0", "wi_1") if args.gated else ("wi",)
        self.inner = [linear(f"{mlp}.{part}", args.dim, args.hidden) for part in inner]
        self.outer = linear(f"{mlp}.wo", args.hidden, args.dim)

    def __call__(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        x = x + self._attended(self.norm(x), groups, addends)
        normed = self.mlp_norm(x)
        first, *gated = [layer(normed) for layer in self.inner]
        made = self.activation(first)
        return x + self.outer(made * gated[0] if gated else made)

    def _attended(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        parts = []
        for part, addend in zip(split(self.qkv(x), groups), addends, strict=True):
            rows, length, _ = part.shape
            queries, keys, values = part.reshape(rows, length, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
            y = attention(queries, keys, values, scale=1.0, mask=addend)
            parts.append(y.swapaxes(1, 2).reshape(rows * length, -1))
        return self.output(join(parts))


class T5(Encoder):
    """The encoder: tokens to hidden states."""

    args: T5Args
    #: It knows none.
    typed = False

    def __init__(self, args: T5Args, tensors: Tensors):
        self.args = args
        name = "shared" if "shared.weight" in tensors else "encoder.embed_tokens"
        self.words = Embedding.take(tensors, name, args.vocab, args.dim)
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        self.bias = RelativeBias(tensors.take(name, (args.buckets, args.heads)), args.farthest, args.context)
        self.layers = [Block(args, index, tensors) for index in range(args.layers)]
        self.norm = RMSNorm.take(tensors, "encoder.final_layer_norm", args.dim, args.norm_eps)

    def forward(self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]) -> mx.array:
        x = self.words(tokens)
        addends = [addend_of(group, x.dtype, self.bias(group.length)) for group in groups]
        for layer in self.layers:
            x = layer(x, groups, addends)
        return self.norm(x)

    def unused(self, tensor: str) -> bool:
        # The decoder, and the second name of the embeddings.
        return tensor.startswith(("decoder.", "lm_head.", "encoder.embed_tokens."))

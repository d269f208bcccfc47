"""Llama (Touvron et al., 2023): pre-norm decoder with rotary positions, grouped queries and SwiGLU.

Names, shapes and the order of the rotary halves are those of Hugging Face's `LlamaForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from engine.models.attention import attention
from engine.models.cache import LayerCache
from engine.models.fastmath import swiglu
from engine.models.fields import Fields
from engine.models.layers import Adapters, Embedding, Linear, RMSNorm
from engine.weights.tensors import Tensors
from stoker.errors import ModelError


@dataclass(frozen=True)
class LlamaArgs:
    """The sizes of one Llama model."""

    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    rope_base: float
    norm_eps: float
    tied: bool

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ModelError(
                f"{self.heads} heads over {self.kv_heads} key/value heads of size {self.head_dim}: the first must be "
                "a multiple of the second, and the size even"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaArgs:
        """From Hugging Face's config.json. Raises `ModelError` naming a field that is absent or not supported."""
        fields = Fields(config, "config.json")
        rope = config.get("rope_parameters") or {}
        if not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default":
            raise ModelError(f"config.json: rope_parameters {str(rope)[:100]} is not supported: only rope_type default")
        fields.only("rope_scaling", None)
        fields.only("hidden_act", "silu")
        for name in ("attention_bias", "mlp_bias"):
            fields.only(name, False)
        for name in ("sliding_window", "quantization_config"):
            fields.only(name, None)
        fields.only("partial_rotary_factor", 1.0)
        dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        return cls(
            layers=fields.count("num_hidden_layers"),
            dim=dim,
            hidden=fields.count("intermediate_size"),
            heads=heads,
            kv_heads=fields.count("num_key_value_heads", heads),
            head_dim=fields.count("head_dim", dim // heads),
            vocab=fields.count("vocab_size"),
            context=fields.count("max_position_embeddings", 2048),
            rope_base=Fields({**config, **rope}, "config.json").number("rope_theta", 10_000.0),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, vocab: int, tied: bool) -> LlamaArgs:
        """From GGUF metadata; `vocab` and `tied` follow from the tensors. Raises `ModelError` as `from_config` does."""
        fields = Fields(metadata, "GGUF metadata")
        for name in ("llama.rope.scaling.type", "llama.rope.scale_linear"):
            if metadata.get(name, "none") not in ("none", 1.0):
                raise ModelError(f"GGUF metadata: {name} = {metadata[name]!r} is not supported")
        fields.only("llama.expert_count", 0)
        dim, heads = fields.count("llama.embedding_length"), fields.count("llama.attention.head_count")
        head_dim = fields.count("llama.attention.key_length", dim // heads)
        fields.only("llama.attention.value_length", head_dim)
        fields.only("llama.rope.dimension_count", head_dim)
        return cls(
            layers=fields.count("llama.block_count"),
            dim=dim,
            hidden=fields.count("llama.feed_forward_length"),
            heads=heads,
            kv_heads=fields.count("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab=vocab,
            context=fields.count("llama.context_length"),
            rope_base=fields.number("llama.rope.freq_base", 10_000.0),
            norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon"),
            tied=tied,
        )


class Attention:
    def __init__(self, args: LlamaArgs, index: int, tensors: Tensors):
        self.args, self.index = args, index
        name, width, kv_width = f"layers.{index}.self_attn", args.heads * args.head_dim, args.kv_heads * args.head_dim
        self.q_proj = Linear.take(tensors, f"{name}.q_proj", "model.", args.dim, width)
        self.k_proj = Linear.take(tensors, f"{name}.k_proj", "model.", args.dim, kv_width)
        self.v_proj = Linear.take(tensors, f"{name}.v_proj", "model.", args.dim, kv_width)
        self.o_proj = Linear.take(tensors, f"{name}.o_proj", "model.", width, args.dim)

    def __call__(self, x: mx.array, cache: LayerCache | None, adapters: Adapters | None) -> mx.array:
        args, (batch, length, _) = self.args, x.shape
        queries = self._heads(self.q_proj(x, adapters), args.heads)
        keys = self._heads(self.k_proj(x, adapters), args.kv_heads)
        values = self._heads(self.v_proj(x, adapters), args.kv_heads)
        offset = 0 if cache is None else cache.offset
        queries, keys = self._rotate(queries, offset), self._rotate(keys, offset)
        if cache is not None:
            keys, values = cache.update(self.index, keys, values)
        mask = "causal" if cache is None else cache.mask
        y = attention(queries, keys, values, scale=args.head_dim**-0.5, mask=mask)
        return self.o_proj(y.swapaxes(1, 2).reshape(batch, length, -1), adapters)

    def _heads(self, x: mx.array, heads: int) -> mx.array:
        """(B, T, heads·d) to (B, heads, T, d)."""
        return x.reshape(*x.shape[:2], heads, self.args.head_dim).swapaxes(1, 2)

    def _rotate(self, x: mx.array, offset: int | mx.array) -> mx.array:
        """Rotary positions (Su et al., 2021), the two halves of a head paired."""
        args = self.args
        return mx.fast.rope(x, args.head_dim, traditional=False, base=args.rope_base, scale=1.0, offset=offset)


class MLP:
    def __init__(self, args: LlamaArgs, index: int, tensors: Tensors):
        name = f"layers.{index}.mlp"
        self.gate_proj = Linear.take(tensors, f"{name}.gate_proj", "model.", args.dim, args.hidden)
        self.up_proj = Linear.take(tensors, f"{name}.up_proj", "model.", args.dim, args.hidden)
        self.down_proj = Linear.take(tensors, f"{name}.down_proj", "model.", args.hidden, args.dim)

    def __call__(self, x: mx.array, adapters: Adapters | None) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x, adapters), self.up_proj(x, adapters)), adapters)


class Block:
    def __init__(self, args: LlamaArgs, index: int, tensors: Tensors):
        name = f"model.layers.{index}"
        self.self_attn, self.mlp = Attention(args, index, tensors), MLP(args, index, tensors)
        self.input_layernorm = RMSNorm(tensors.take(f"{name}.input_layernorm.weight", (args.dim,)), args.norm_eps)
        self.post_attention_layernorm = RMSNorm(
            tensors.take(f"{name}.post_attention_layernorm.weight", (args.dim,)), args.norm_eps
        )

    def __call__(self, x: mx.array, cache: LayerCache | None, adapters: Adapters | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), cache, adapters)
        return x + self.mlp(self.post_attention_layernorm(x), adapters)

    @property
    def linears(self) -> list[Linear]:
        attn, mlp = self.self_attn, self.mlp
        return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class Llama:
    """The model: tokens to hidden states to logits. Its weights never change; adapters come with each call."""

    def __init__(self, args: LlamaArgs, tensors: Tensors):
        self.args = args
        self.embed_tokens = Embedding(tensors.take("model.embed_tokens.weight", (args.vocab, args.dim)))
        self.layers = [Block(args, index, tensors) for index in range(args.layers)]
        self.norm = RMSNorm(tensors.take("model.norm.weight", (args.dim,)), args.norm_eps)
        self.lm_head = None if args.tied else Linear.take(tensors, "lm_head", "", args.dim, args.vocab)

    def __call__(self, tokens: mx.array, cache: LayerCache | None = None, adapters: Adapters | None = None) -> mx.array:
        """Hidden states (B, T, dim) after the final norm, of `tokens` int32 (B, T).

        Without a cache the tokens are a whole sequence, causal from position 0 (training, scoring); right padding
        needs no mask. With one, they are what its view says, and it keeps their keys and values.
        """
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cache, adapters)
        return self.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (…, vocab), float32, of hidden states (…, dim)."""
        y = self.embed_tokens.as_linear(hidden) if self.lm_head is None else self.lm_head(hidden)
        return y.astype(mx.float32)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Dotted name -> (in, out) of every linear layer that an adapter may change."""
        return {linear.name: linear.shape for layer in self.layers for linear in layer.linears}

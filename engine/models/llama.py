"""Llama (Touvron et al., 2023): pre-norm decoder with rotary positions, grouped queries and SwiGLU.

Names, shapes and the order of the rotary halves are those of Hugging Face's `LlamaForCausalLM`. Mistral, Qwen2 and
Qwen3 are this decoder with a switch each, so they run it; their files say what their configurations may ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx

from engine.models import rope
from engine.models.attention import attention, from_heads, to_heads
from engine.models.decoder import RunBlock
from engine.models.fastmath import swiglu
from engine.models.joint import Cache, JointView
from engine.models.kv_sizes import KvSide, KvSizes
from engine.models.layers import (
    Embedding,
    FusedLinear,
    LayerAdapters,
    Linear,
    RMSNorm,
    RowAdapters,
    Sum,
    Update,
    summed,
)
from engine.models.mixed import MixedView
from engine.models.shard import Shard
from engine.models.sizes import decoder_sizes, gguf_sizes, layers_of
from engine.models.stretches import Hidden, Stretches, in_parts, without_tokens
from engine.models.view import LayerCache
from engine.weights.tensors import Tensors
from kernels.attend import KERNEL as ATTEND
from kernels.attend import AttendAdapters, AttendInput, attend, unfit
from kernels.lora_swiglu import LoraSwigluInput, lora_swiglu
from stoker.errors import ModelError


@dataclass(frozen=True)
class LlamaArgs:
    """The sizes of one model of the Llama family, and the switches in which its architectures differ."""

    #: As config.json calls the architecture.
    architecture: ClassVar[str] = "llama"
    #: Whether GGUF files of this architecture hold the rows of q and k in llama.cpp's interleaved order.
    gguf_permuted: ClassVar[bool] = True

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
    rope_scaling: rope.Scaling = None
    #: A token attends to itself and the window − 1 before it; None: to all before it (Mistral).
    window: int | None = None
    #: Biases on q, k and v (Qwen2).
    qkv_bias: bool = False
    #: An RMSNorm over each head of q and k (Qwen3).
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ModelError(
                f"{self.heads} heads over {self.kv_heads} key/value heads of size {self.head_dim}: the first must be "
                "a multiple of the second, and the size even"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Llama 2, 3, 3.1, 3.2 and SmolLM2 from Hugging Face's config.json.

        Raises `ModelError` naming a field that is absent, wrong, or asks for what is not implemented.
        """
        sizes = decoder_sizes(config, cls.architecture)
        layers_of(config, "full_attention", sizes["layers"])
        return cls(**sizes)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, vocab: int, tied: bool) -> Self:
        """From GGUF metadata; `vocab` and `tied` follow from the tensors. Raises `ModelError` as `from_config` does."""
        return cls(**gguf_sizes(metadata, cls.architecture), vocab=vocab, tied=tied)


class Attention:
    #: Set by `turn_by`.
    rotate: rope.Rope
    scale: float

    def __init__(self, args: LlamaArgs, index: int, tensors: Tensors):
        self.args, self.index = args, index
        name, width, kv_width = f"layers.{index}.self_attn", args.heads * args.head_dim, args.kv_heads * args.head_dim

        def linear(part: str, inputs: int, outputs: int, bias: bool = False) -> Linear:
            return Linear.take(tensors, f"{name}.{part}", "model.", inputs, outputs, bias=bias)

        def norm(part: str) -> RMSNorm | None:
            return RMSNorm.take(tensors, f"model.{name}.{part}", args.head_dim, args.norm_eps) if args.qk_norm else None

        self.q_proj = linear("q_proj", args.dim, width, args.qkv_bias)
        self.k_proj = linear("k_proj", args.dim, kv_width, args.qkv_bias)
        self.v_proj = linear("v_proj", args.dim, kv_width, args.qkv_bias)
        self.o_proj = linear("o_proj", width, args.dim)
        self.q_norm, self.k_norm = norm("q_norm"), norm("k_norm")
        self.qkv = FusedLinear.of(tensors, "model.", self.q_proj, self.k_proj, self.v_proj)

    def turn_by(self, rotate: rope.Rope) -> None:
        self.rotate = rotate
        # Queries and keys are both multiplied by the gain: their product by its square.
        self.scale = self.args.head_dim**-0.5 * rotate.gain**2

    def behind(
        self, x: mx.array, update: Update, norm: RMSNorm, cache: Cache | None, adapters: LayerAdapters | None
    ) -> Sum:
        """x + update, and what this makes of its norm. Few rows go through norm, q, k and v in one kernel."""
        if isinstance(cache, JointView) and self.qkv is not None and self.qkv.reads_sum(x, update, cache.adapters):
            x, projected = self.qkv.of_sum(x, update, norm)
            return x, self.o_proj.unadapted(self._attend_jointly([projected] * 3, cache, None), cache.adapters)
        # Without a cache it may be differentiated.
        x, normed = norm.of_sum(x, update, fused=cache is not None)
        return x, self(normed, cache, adapters)

    def __call__(self, x: mx.array, cache: Cache | None, adapters: LayerAdapters | None) -> Update:
        if isinstance(cache, JointView):
            names = [linear.name for linear in (self.q_proj, self.k_proj, self.v_proj)]
            given = cache.attend_adapters(x.reshape(x.shape[0], self.args.dim), names)
            y = self._attend_jointly(self._projections(x), cache, given)
            return self.o_proj.unadapted(y, cache.adapters)
        projected = self._project(x, 0 if cache is None else cache.offset, adapters)
        if isinstance(cache, MixedView):
            parts = zip(*map(cache.parts, projected), cache.views, strict=True)
            y = cache.joined([self._attend(q, k, v, view) for q, k, v, view in parts])
        else:
            y = from_heads(self._attend(*projected, cache), x.shape[:-1])
        return self.o_proj(y, adapters)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, cache: LayerCache | None) -> mx.array:
        """Attention of heads (B, heads, T, d) to what is stored of them, these included, or to each other."""
        if cache is not None:
            keys, values = cache.update(self.index, keys, values)
        mask = "causal" if cache is None else cache.mask
        return attention(queries, keys, values, scale=self.scale, mask=mask, window=self.args.window)

    def _attend_jointly(
        self, projected: Sequence[mx.array], cache: JointView, adapters: AttendAdapters | None
    ) -> mx.array:
        """Attention of one new token a row, (B, H·d) or (B, 1, H·d) as `projected`, by the kernel that begins at the
        projections."""
        args, before = self.args, projected[0].shape[:-1]
        # Sizes and no -1: MLX makes no operation of a reshape that it sees to change nothing.
        q, k, v = (part.reshape(before[0], part.shape[-1]) for part in projected)
        width, kv_width = args.heads * args.head_dim, args.kv_heads * args.head_dim
        starts = (0, 0, 0) if self.qkv is None else (0, width, width + kv_width)
        stored, made = cache.begin(self.index)
        q_weight, k_weight = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        periods, scale = self.rotate.periods, self.scale
        given = AttendInput(
            *(q, k, v, stored, made, cache.segments, cache.offset, periods, q_weight, k_weight, starts),
            *(args.heads, args.kv_heads, scale, args.norm_eps, args.window, adapters, cache.bits),
        )
        y, made = attend(given)
        cache.keep(self.index, made)
        return y.reshape(*before, y.shape[-1])

    def _projections(self, x: mx.array) -> Sequence[mx.array]:
        """What q, k and v make of x (…, dim); thrice the same array, side by side, where one product makes them: to
        take it apart would copy it."""
        if self.qkv is None:
            return [linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj)]
        return [self.qkv.product(x)] * 3

    def _project(
        self, x: mx.array, offset: int | mx.array, adapters: LayerAdapters | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (B, H, T, d), keys and values (B, K, T, d) of x (B, T, dim) or (B, dim), turned to where they are."""
        heads, kv_heads = self.args.heads, self.args.kv_heads
        if self.qkv is not None and adapters is None and self.q_norm is None:
            # One product, and one rotation of queries and keys together.
            whole = to_heads(self.qkv.product(x), heads + 2 * kv_heads)
            turned = self.rotate(whole[:, : heads + kv_heads], offset)
            return turned[:, :heads], turned[:, heads:], whole[:, heads + kv_heads :]
        if self.qkv is not None:
            q, k, v = self.qkv(x, adapters)
        else:
            q, k, v = (linear(x, adapters) for linear in (self.q_proj, self.k_proj, self.v_proj))
        return *self._rotated(q, k, offset), to_heads(v, kv_heads)

    def _rotated(self, queries: mx.array, keys: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array]:
        """Both projections, (B, T, heads·d), as heads (B, heads, T, d), normed and turned to their positions."""
        queries, keys = to_heads(queries, self.args.heads), to_heads(keys, self.args.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return self.rotate(queries, offset), self.rotate(keys, offset)


class MLP:
    def __init__(self, args: LlamaArgs, index: int, tensors: Tensors):
        name = f"layers.{index}.mlp"
        self.gate_proj = Linear.take(tensors, f"{name}.gate_proj", "model.", args.dim, args.hidden)
        self.up_proj = Linear.take(tensors, f"{name}.up_proj", "model.", args.dim, args.hidden)
        self.down_proj = Linear.take(tensors, f"{name}.down_proj", "model.", args.hidden, args.dim)
        self.gate_up = FusedLinear.of(tensors, "model.", self.gate_proj, self.up_proj)

    def __call__(self, x: mx.array, cache: Cache | None, adapters: LayerAdapters | None) -> Update:
        if isinstance(cache, JointView) and (given := self._adapted(x, cache.adapters)) is not None:
            return self.down_proj.unadapted(lora_swiglu(given), cache.adapters)
        if self.gate_up is not None:
            gate, up = self.gate_up(x, adapters)
        else:
            gate, up = self.gate_proj(x, adapters), self.up_proj(x, adapters)
        if isinstance(cache, JointView):
            return self.down_proj.unadapted(swiglu(gate, up), cache.adapters)
        return self.down_proj(swiglu(gate, up), adapters)

    def behind(
        self, x: mx.array, update: Update, norm: RMSNorm, cache: Cache | None, adapters: LayerAdapters | None
    ) -> Sum:
        """x + update, and what this makes of its norm. Few rows go through norm, gate and up in one kernel."""
        gate_up = self.gate_up
        if isinstance(cache, JointView) and gate_up is not None and gate_up.reads_sum(x, update, cache.adapters):
            x, gated = gate_up.of_sum(x, update, norm, gated=True)
            return x, self.down_proj.unadapted(gated, cache.adapters)
        # Without a cache it may be differentiated.
        x, normed = norm.of_sum(x, update, fused=cache is not None)
        return x, self(normed, cache, adapters)

    def _adapted(self, x: mx.array, adapters: RowAdapters | None) -> LoraSwigluInput | None:
        """Gate and up of one new token a row, x (rows, dim) or (rows, 1, dim), as what the rows' adapters still have to
        change: the kernel behind them does that. None where no adapter changes either."""
        if adapters is None:
            return None
        gate_sides, up_sides = (adapters.sides(linear.name) for linear in (self.gate_proj, self.up_proj))
        if gate_sides is up_sides is None:
            return None
        hidden, indices = self.gate_proj.shape[1], adapters.indices
        if self.gate_up is None:
            gate, up, starts = self.gate_proj(x), self.up_proj(x), (0, 0)
        else:
            # The same array: to take it apart would copy it.
            gate = up = self.gate_up.product(x)
            starts = (0, hidden)
        return LoraSwigluInput(x, gate, up, starts, hidden, indices, gate_sides, up_sides)


class Block:
    def __init__(self, args: LlamaArgs, index: int, tensors: Tensors):
        name = f"model.layers.{index}"
        self.self_attn, self.mlp = Attention(args, index, tensors), MLP(args, index, tensors)
        self.input_layernorm = RMSNorm.take(tensors, f"{name}.input_layernorm", args.dim, args.norm_eps)
        self.post_attention_layernorm = RMSNorm.take(
            tensors, f"{name}.post_attention_layernorm", args.dim, args.norm_eps
        )

    def __call__(self, x: mx.array, cache: Cache | None, adapters: LayerAdapters | None) -> mx.array:
        update = self.self_attn(self.input_layernorm(x), cache, adapters)
        return summed(*self.mlp.behind(x, update, self.post_attention_layernorm, cache, adapters))

    def forward(self, x: mx.array, update: Update, cache: Cache | None, adapters: LayerAdapters | None) -> Sum:
        """The block of x + update, as what is left to add, and to what: a kernel adds it where it is read."""
        x, update = self.self_attn.behind(x, update, self.input_layernorm, cache, adapters)
        return self.mlp.behind(x, update, self.post_attention_layernorm, cache, adapters)

    @property
    def linears(self) -> list[Linear]:
        attn, mlp = self.self_attn, self.mlp
        return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _ends(args: LlamaArgs, tensors: Tensors) -> tuple[str, bool]:
    """(the tensor of the embedding, whether there is a head of its own), by transformers' rule: a tied head that is in
    the file all the same is one of its own if it differs, and is the embedding if that is not in the file."""
    table, head = "model.embed_tokens", "lm_head"
    if not args.tied:
        return table, True
    if f"{head}.weight" not in tensors:
        return table, False
    if f"{table}.weight" not in tensors:
        return head, False
    return table, not tensors.drop_copy(f"{head}.weight", f"{table}.weight")


class Llama:
    """The model: tokens to hidden states to logits. Its weights never change; adapters come with each call.

    `own`: the layers that this process has; None: all.
    """

    #: The part of the model that this is; None: the whole.
    shard: Shard | None = None
    kv_bits = 16

    def __init__(self, args: LlamaArgs, tensors: Tensors, own: range | None = None):
        self.args = args
        table, head = _ends(args, tensors)
        self.embed_tokens = Embedding.take(tensors, table, args.vocab, args.dim)
        # Before the layers: while a tensor is laid out anew it takes twice its room, and the head is the largest.
        self.lm_head = Linear.take(tensors, "lm_head", "", args.dim, args.vocab) if head else None
        self.layers = [Block(args, index, tensors) for index in (range(args.layers) if own is None else own)]
        for index, layer in enumerate(self.layers):
            layer.self_attn.index = index
        # After the layers, whose tensors have shown that a head is no larger than the file.
        rotate = rope.Rope(args.head_dim, args.rope_base, args.rope_scaling, self._gguf_factors(args, tensors))
        for layer in self.layers:
            layer.self_attn.turn_by(rotate)
        self.norm = RMSNorm.take(tensors, "model.norm", args.dim, args.norm_eps)

    @staticmethod
    def _gguf_factors(args: LlamaArgs, tensors: Tensors) -> mx.array | None:
        if "rope_freqs.weight" not in tensors:
            return None
        return tensors.take("rope_freqs.weight", (args.head_dim // 2,), dtype=mx.float32)

    def unused(self, tensor: str) -> bool:
        """Whether a checkpoint may hold `tensor` though nothing needs it."""
        # Older checkpoints hold the rotary frequencies.
        return tensor.endswith("rotary_emb.inv_freq")

    @property
    def dtype(self) -> mx.Dtype:
        """What hidden states, keys and values are computed in."""
        return self.embed_tokens.dtype

    @property
    def kv_sizes(self) -> KvSizes:
        """The same for every layer."""
        args = self.args
        sides = [KvSide(args.kv_heads, args.head_dim, self.dtype)] * len(self.layers)
        taken = unfit(args.heads, args.kv_heads, args.head_dim, self.dtype, self.kv_bits) is None
        return KvSizes(sides, sides, joint=ATTEND.active and taken).in_bits(self.kv_bits)

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        adapters: LayerAdapters | None = None,
        run_block: RunBlock | None = None,
    ) -> mx.array:
        """Hidden states (B, T, dim) after the final norm, of `tokens` int32 (B, T).

        Without a cache the tokens are a whole sequence, causal from position 0 (training, scoring); right padding
        needs no mask. With one, they are what its view says, and it keeps their keys and values. `run_block` runs each
        block in the caller's way, cache and adapters included.
        """
        anchor = None if adapters is None else adapters.anchor
        if run_block is not None:
            x = self._before(tokens, anchor)
            for layer in self.layers:
                x = run_block(layer, x)
            return self.norm(self._behind(x, anchor))
        hidden: Sum = self._begin(tokens, anchor, whole=cache is None)
        for layer in self.layers:
            hidden = layer.forward(*hidden, cache, adapters)
        last = self._end(hidden, anchor, fused=cache is not None)
        return last.reshape(*tokens.shape, last.shape[-1])

    def _before(self, tokens: mx.array, anchor: mx.array | None = None) -> mx.array:
        """What the first layer takes. `anchor`: as `Shard.of_rank` has it."""
        return self.embed_tokens(tokens)

    def _behind(self, x: mx.array, anchor: mx.array | None = None) -> mx.array:
        """What the last norm takes, of what the last layer gave."""
        return x

    def _begin(self, tokens: mx.array, anchor: mx.array | None = None, *, whole: bool = False) -> Hidden:
        """What the first layer takes: there is nothing to add yet. `whole`: sequences, also of one token."""
        x = self._before(tokens, anchor)
        x = x if whole or tokens.shape[1] > 1 else without_tokens(x)
        return x, mx.zeros_like(x)

    def _end(self, hidden: Sum, anchor: mx.array | None = None, *, fused: bool = True) -> mx.array:
        """What the last norm makes of what the last layer gave. `fused`: as `RMSNorm.of_sum`."""
        return self.norm.of_sum(*hidden, fused=fused)[1]

    @property
    def stretches(self) -> Stretches:
        """The layers, as many together as share an array of `JointKeyValues`."""
        return Stretches(self._begin, in_parts(self.layers), self._end)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (…, vocab), float32, of hidden states (…, dim)."""
        return self.head(hidden).astype(mx.float32)

    def own_logits(self, hidden: mx.array) -> mx.array:
        return self.logits(hidden)

    def head(self, hidden: mx.array) -> mx.array:
        """The same in the model's own dtype: a kernel reads half the bytes of 16 bits."""
        return self.embed_tokens.as_linear(hidden) if self.lm_head is None else self.lm_head(hidden)

    @property
    def linears(self) -> dict[str, Linear]:
        """Dotted name -> every linear layer that an adapter may change."""
        return {linear.name: linear for layer in self.layers for linear in layer.linears}

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Dotted name -> (in, out) of each."""
        return {name: linear.shape for name, linear in self.linears.items()}

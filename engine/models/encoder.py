"""What the sentence encoders share: the post-norm Transformer block (Vaswani et al., 2017), and T5's relative bias.

A batch is packed: the tokens of its texts lie one after the other, (N,), so that the linear layers, nine tenths of the
work, see no padding. Only attention needs to know which tokens belong together: `Group` says it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.models.allowed import CONTEXT, RENAMED, TABLES
from engine.models.attention import UNSEEN, attention
from engine.models.fastmath import gelu
from engine.models.fields import Fields, renamed, spelled
from engine.models.layers import Embedding, LayerNorm, Linear
from engine.weights.tensors import Tensors
from stoker.errors import ModelError


@dataclass(frozen=True)
class EncoderArgs:
    """The sizes of one encoder. `positions`: rows of its table of positions."""

    layers: int
    dim: int
    hidden: int
    heads: int
    vocab: int
    positions: int
    norm_eps: float

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        return self.positions

    @property
    def embedded(self) -> int:
        """Numbers of a token's embedding: `dim`, unless a layer behind it makes that of fewer."""
        return self.dim

    @property
    def activation(self) -> Callable[[mx.array], mx.array]:
        """Between the two linear layers of a block."""
        return gelu


def encoder_sizes(config: Mapping[str, Any], architecture: str, norm_eps: float = 1e-12) -> dict[str, Any]:
    """The fields of `EncoderArgs` from Hugging Face's config.json; `norm_eps`: where that says none. Raises
    `ModelError` naming the field."""
    names = RENAMED.get(architecture, {})
    given = renamed(config, names)
    TABLES[architecture].check(given, "config.json")
    fields = Fields(given, "config.json", spelled(config, names))
    dim, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if dim % heads:
        raise ModelError(
            f"config.json: {fields.called('hidden_size')} is {dim}, which is no multiple of "
            f"{fields.called('num_attention_heads')}, {heads}"
        )
    return {
        "layers": fields.count("num_hidden_layers"),
        "dim": dim,
        "hidden": fields.count("intermediate_size"),
        "heads": heads,
        "vocab": fields.count("vocab_size"),
        "positions": fields.count("max_position_embeddings", CONTEXT[architecture]),
        "norm_eps": fields.number("layer_norm_eps", norm_eps),
    }


class Names(NamedTuple):
    """What a checkpoint calls the parts of a block. `norm` is behind the attention, `last` behind the block."""

    query: str
    key: str
    value: str
    output: str
    norm: str
    inner: str = "intermediate.dense"
    outer: str = "output.dense"
    last: str = "output.LayerNorm"


class Group(NamedTuple):
    """`rows` texts of `length` tokens each, next to each other in a packed batch.

    `mask`: bool (rows, length), True at real tokens; None where no text is padded.
    """

    rows: int
    length: int
    mask: mx.array | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def split(packed: mx.array, groups: Sequence[Group]) -> Iterator[mx.array]:
    """Each group's part of a packed array (N, …), as (rows, length, …)."""
    start = 0
    for group in groups:
        part = packed if len(groups) == 1 else packed[start : start + group.tokens]
        yield part.reshape(group.rows, group.length, *packed.shape[1:])
        start += group.tokens


def join(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


class Attention:
    """Self-attention of every token to those of its own text. One product makes queries, keys and values."""

    def __init__(self, args: EncoderArgs, layer: str, names: Names, tensors: Tensors):
        self.heads, self.head_dim = args.heads, args.dim // args.heads

        def linear(part: str) -> Linear:
            return Linear.take(tensors, f"{layer}.{part}", "", args.dim, args.dim, bias=True)

        self.qkv = side_by_side(*(linear(part) for part in (names.query, names.key, names.value)))
        self.output = linear(names.output)
        self.norm = LayerNorm.take(tensors, f"{layer}.{names.norm}", args.dim, args.norm_eps)

    def __call__(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        parts = []
        for part, addend in zip(split(self.qkv(x), groups), addends, strict=True):
            rows, length, _ = part.shape
            queries, keys, values = part.reshape(rows, length, 3, self.heads, self.head_dim).transpose(2, 0, 3, 1, 4)
            y = self.attend(queries, keys, values, addend)
            parts.append(y.swapaxes(1, 2).reshape(rows * length, -1))
        return self.norm.of_sum(x, self.output(join(parts)))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, addend: mx.array | None) -> mx.array:
        """Of one group, each (rows, heads, length, size). `addend`: what is added to the scores."""
        return attention(queries, keys, values, scale=self.head_dim**-0.5, mask=addend)


def side_by_side(*layers: Linear) -> Linear:
    """The layers as one, whose output is theirs side by side; all have a bias, or none."""
    weight = mx.concatenate([layer.weight for layer in layers], axis=1)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = mx.concatenate(biases) if biases else None
    mx.eval(weight, *([] if bias is None else [bias]))
    return Linear("+".join(layer.name for layer in layers), weight, bias)


class MLP:
    def __init__(self, args: EncoderArgs, layer: str, names: Names, tensors: Tensors):
        self.inner = Linear.take(tensors, f"{layer}.{names.inner}", "", args.dim, args.hidden, bias=True)
        self.outer = Linear.take(tensors, f"{layer}.{names.outer}", "", args.hidden, args.dim, bias=True)
        self.norm = LayerNorm.take(tensors, f"{layer}.{names.last}", args.dim, args.norm_eps)
        self.activation = args.activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm.of_sum(x, self.update(x))

    def update(self, x: mx.array) -> mx.array:
        """What is added to x before the norm."""
        return self.outer(self.activation(self.inner(x)))


class Block:
    """`layer`: what stands before the names of its tensors. `attention`: in place of the usual one."""

    def __init__(
        self, args: EncoderArgs, layer: str, names: Names, tensors: Tensors, attention: Attention | None = None
    ):
        self.attention = attention or Attention(args, layer, names, tensors)
        self.mlp = MLP(args, layer, names, tensors)

    def __call__(self, x: mx.array, groups: Sequence[Group], addends: Sequence[mx.array | None]) -> mx.array:
        return self.mlp(self.attention(x, groups, addends))


class EmbedderArgs(Protocol):
    """What is asked of the sizes of any embedding model. `context`: the most tokens of a text."""

    @property
    def vocab(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def context(self) -> int: ...


class Encoder:
    """A model of kind "embed": tokens to hidden states."""

    args: EmbedderArgs
    #: Token types of which one is added to every token; a model without any takes a text of any type.
    typed = True

    def token_ids(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """The ids of `tokens` without their types: the same one of type 1 has an id that is larger by the size of the
        vocabulary, so that one array says both."""
        return tokens

    def position_ids(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """The position of each of `tokens` (rows, length), as the model counts."""
        return np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    def forward(self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]) -> mx.array:
        """Hidden states (N, dim) of a packed batch: `tokens` and `position_ids` int32 (N,), N the sum over `groups`.

        Hidden states at padding are meaningless: pool with the group's mask.
        """
        raise NotImplementedError

    def __call__(self, tokens: mx.array, mask: mx.array | None = None) -> mx.array:
        """The same for one group: hidden states (B, T, dim) of `tokens` int32 (B, T), `mask` bool (B, T)."""
        group = Group(tokens.shape[0], tokens.shape[1], mask)
        position_ids = mx.array(self.position_ids(np.array(tokens, dtype=np.int32)).reshape(-1))
        return self.forward(tokens.reshape(-1), position_ids, [group]).reshape(*tokens.shape, -1)

    def unused(self, tensor: str) -> bool:
        """Whether a checkpoint may hold `tensor` though no sentence vector needs it."""
        raise NotImplementedError


class LayerNormed(Encoder):
    """One that ends in the LayerNorm of a sum, which a kernel pools too."""

    def forward(self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]) -> mx.array:
        x, update, norm = self.to_last_norm(tokens, position_ids, groups)
        return norm.of_sum(x, update)

    def to_last_norm(
        self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]
    ) -> tuple[mx.array, mx.array, LayerNorm]:
        """The hidden states before their last step: they are the norm of the sum of both."""
        raise NotImplementedError


def past_padding(tokens: NDArray[np.int32], pad: int) -> NDArray[np.int32]:
    """Positions as RoBERTa counts them: from `pad` + 1 on, and `pad` for the token of padding itself."""
    real = (tokens != pad).astype(np.int32)
    position_ids: NDArray[np.int32] = np.cumsum(real, axis=1, dtype=np.int32) * real + pad
    return position_ids


class RelativeBias:
    """T5's (Raffel et al., 2020): what a query adds to the score of a key by how far apart they are, in buckets.

    `table`: (buckets, heads). `farthest`: the distance from which on all share the last bucket. `context`: the most
    tokens of a text.
    """

    def __init__(self, table: mx.array, farthest: int, context: int):
        self._context = context
        #: Row context − 1 + distance: the bias of each head for a key that lies `distance` after its query.
        self._rows = table[mx.array(_buckets(context, table.shape[0], farthest))]
        mx.eval(self._rows)

    def __call__(self, length: int) -> mx.array:
        """(1, heads, length, length)."""
        positions = mx.arange(length)
        return self._rows[positions[None, :] - positions[:, None] + self._context - 1].transpose(2, 0, 1)[None]


def _buckets(context: int, count: int, farthest: int) -> NDArray[np.int32]:
    """The bucket of every distance key − query from 1 − context to context − 1.

    Half of the `count` buckets are for keys after the query. In each half, half of them hold a distance each, the rest
    grow logarithmically up to `farthest`, beyond which all share the last.
    """
    distances = np.arange(1 - context, context)
    half, exact = count // 2, count // 4
    size = np.abs(distances)
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / exact) / math.log(farthest / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int32), half - 1)
    return np.where(size < exact, size, far).astype(np.int32) + half * (distances > 0).astype(np.int32)


def unseen(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """What is added to the scores where the bool `mask` is False. Never a bool mask: fused attention on CUDA knows
    none."""
    return mx.where(mask, 0.0, max(UNSEEN, mx.finfo(dtype).min / 2)).astype(dtype)


def addend_of(group: Group, dtype: mx.Dtype, bias: mx.array | None) -> mx.array | None:
    """What is added to the scores of a group, of which `bias` is that by the positions of query and key."""
    if group.mask is None:
        return bias
    hidden = unseen(group.mask[:, None, None, :], dtype)
    return hidden if bias is None else bias + hidden


class PostNorm(LayerNormed):
    """BERT's kind: a table of positions, and `Block`s."""

    args: EncoderArgs
    words: Embedding
    #: Table of positions (positions, `args.embedded`).
    positions: mx.array
    norm: LayerNorm
    #: From the numbers of an embedding to those of a hidden state, where they are not as many.
    widened: Linear | None = None
    layers: list[Block]

    def position_bias(self, length: int) -> mx.array | None:
        """(1, heads, T, T): what each query adds to the score of each key, for models that know such a thing."""
        return None

    def to_last_norm(
        self, tokens: mx.array, position_ids: mx.array, groups: Sequence[Group]
    ) -> tuple[mx.array, mx.array, LayerNorm]:
        x = self.norm(self.words(tokens) + self.positions[position_ids])
        x = x if self.widened is None else self.widened(x)
        addends = [addend_of(group, x.dtype, self.position_bias(group.length)) for group in groups]
        for layer in self.layers[:-1]:
            x = layer(x, groups, addends)
        last = self.layers[-1]
        x = last.attention(x, groups, addends)
        return x, last.mlp.update(x), last.mlp.norm

    def unused(self, tensor: str) -> bool:
        # The position ids are a buffer; the pooler and the heads serve pre-training.
        return tensor == "embeddings.position_ids" or tensor.startswith(("pooler.", "cls.", "lm_head."))

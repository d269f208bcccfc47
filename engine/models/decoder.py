"""What the engine asks of a decoder: the Llama family's own, and those that run mlx-lm's model files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import mlx.core as mx

from engine.models.joint import Cache
from engine.models.kv_sizes import KvSizes
from engine.models.layers import LayerAdapters, Linear
from engine.models.shard import Shard
from engine.models.stretches import Stretches
from engine.models.view import LayerCache


class DecoderArgs(Protocol):
    @property
    def vocab(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def window(self) -> int | None: ...


class DecoderBlock(Protocol):
    """One layer of a decoder."""

    @property
    def linears(self) -> Sequence[Linear]: ...
    def __call__(self, x: mx.array, cache: LayerCache | None, adapters: LayerAdapters | None) -> mx.array: ...


#: Gives a block's output for its input: a trainer keeps the input alone, and runs the block again for its gradient.
RunBlock = Callable[[DecoderBlock, mx.array], mx.array]


class Decoder(Protocol):
    """Tokens to hidden states to logits."""

    #: Bits of the numbers of keys and values; 16: as the model computes them. Set before anything is kept.
    kv_bits: int

    @property
    def args(self) -> DecoderArgs: ...
    @property
    def dtype(self) -> mx.Dtype: ...
    @property
    def kv_sizes(self) -> KvSizes:
        """With numbers in `kv_bits`."""
        ...

    @property
    def linears(self) -> Mapping[str, Linear]: ...
    @property
    def linear_shapes(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def shard(self) -> Shard | None:
        """The part of the model that this is; None: the whole."""
        ...

    @property
    def stretches(self) -> Stretches | None:
        """Its parts, where it can be run in parts."""
        ...

    def __call__(
        self,
        tokens: mx.array,
        cache: Cache | None = None,
        adapters: LayerAdapters | None = None,
        run_block: RunBlock | None = None,
    ) -> mx.array:
        """Hidden states (B, T, dim) after the final norm, of `tokens` int32 (B, T)."""
        ...

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits (…, vocab), float32, of hidden states (…, dim)."""
        ...

    def own_logits(self, hidden: mx.array) -> mx.array:
        """Of a model that ranks share this rank's columns alone, (…, `shard.rows_of(vocab)`), for a gradient that all
        ranks make at the same time; else all of them."""
        ...

    def head(self, hidden: mx.array) -> mx.array:
        """The same in the model's own dtype."""
        ...

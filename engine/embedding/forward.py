"""From the tokens of texts to their vectors, in the way that the device likes best."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.checkpoints.loading import LoadedModel
from engine.embedding.packing import Grid, near_runs, shapes, shares
from engine.embedding.pooling import pool_packed
from engine.models.encoder import Encoder, Group, LayerNormed
from engine.models.heads import through
from engine.models.sentence import Pooling
from engine.platform import blas
from engine.platform.compiler import on_cpu
from kernels.mean_pool import KERNEL as MEAN_POOL
from kernels.mean_pool import MeanPoolInput, mean_pool

#: The ids of one text, int32 (tokens,): what `Encoder.token_ids` and `position_ids` take.
Tokens = NDArray[np.int32]
Vectors = NDArray[np.float32]

#: Tokens of one padded batch at most: on an H100 batches of 8,192 ran half as fast, larger ones no faster.
SHAPE_TOKENS = 32_768
#: Tokens of a step of which a small GPU makes about 0.1 s: a faster one is given more as soon as its pace is known.
LEAST_TOKENS = 4_096
#: cuDNN plans attention anew for each shape, which takes 50 ms on an H100; a batch takes 1.6 ms there and 0.1 for each
#: 1,000 tokens. So few shapes serve all texts there, and these are warm before the first.
PLANNED = Grid(SHAPE_TOKENS, widths=2, factor=4, batch=16_384)
#: Elsewhere a new shape is a trace, a few ms.
TRACED = Grid(SHAPE_TOKENS)
#: Texts of up to so many tokens find their shapes warm.
WARM_WIDTH = 512


class Forward(Protocol):
    #: Tokens of a step below which the device would idle.
    least_tokens: int
    #: Parts of a step that are computed side by side.
    streams: int

    def __call__(self, texts: Sequence[Tokens]) -> Vectors:
        """The vectors (texts, dim) of `texts`, in their order, as pooled: not normalized. Each has a token at least."""
        ...

    def warming(self) -> Iterator[None]:
        """Compile, in slices, what the first texts would wait for."""
        ...


def forward_of(model: LoadedModel, cores: int | None = None) -> Forward:
    return PackedForward(model, cores) if on_cpu() else PaddedForward(model)


class PackedForward:
    """For CPUs: batches with next to no padding, one for each core, computed side by side.

    MLX runs one stream's operations one after the other, and most of them in one thread; only BLAS knows more. So the
    texts are shared out to as many streams as there are cores, evaluated together, with one BLAS thread each.
    """

    def __init__(self, model: LoadedModel, streams: int | None = None) -> None:
        assert model.embedding is not None
        self._encoder, self._pooling, self._pad = model.encoder, model.embedding.pooling, model.tokenizer.pad_id or 0
        self._heads = model.heads
        self.streams = streams or core_count()
        # Products are as fast as they get from here on.
        self.least_tokens = 256 * self.streams

    def __call__(self, texts: Sequence[Tokens]) -> Vectors:
        runs = shares([len(text) for text in texts], self.streams)
        streams = _streams(len(runs))
        # One share alone may have all of BLAS's threads.
        with blas.one_thread() if len(runs) > 1 else nullcontext():
            parts = []
            for run, stream in zip(runs, streams, strict=True):
                with mx.stream(stream):
                    parts.append(self._packed([texts[index] for index in run]))
            # One evaluation of all: MLX then feeds the streams in turn, and they run side by side.
            mx.eval(parts)
        vectors = np.empty((len(texts), parts[0].shape[1]), dtype=np.float32)
        for run, part in zip(runs, parts, strict=True):
            vectors[run] = part
        return vectors

    def _packed(self, texts: Sequence[Tokens]) -> mx.array:
        """`texts` are sorted by length."""
        groups, tokens, position_ids, start = [], [], [], 0
        for rows, width in near_runs([len(text) for text in texts]):
            block, mask = padded(texts[start : start + rows], rows, width, self._pad)
            start += rows
            groups.append(Group(rows, width, None if mask is None else mx.array(mask)))
            tokens.append(self._encoder.token_ids(block).reshape(-1))
            position_ids.append(seen_position_ids(self._encoder, block, mask))
        hidden = self._encoder.forward(mx.array(np.concatenate(tokens)), mx.array(np.concatenate(position_ids)), groups)
        return through(self._heads, pool_packed(hidden, groups, self._pooling))

    def warming(self) -> Iterator[None]:
        """Nothing: loops are compiled once a machine."""
        return iter(())


def padded(texts: Sequence[Tokens], rows: int, width: int, pad: int) -> tuple[Tokens, NDArray[np.bool_] | None]:
    """The texts as rows of one block int32 (rows, width), and their mask bool (rows, width).

    None where no text is padded: attention without a mask is the faster one. Rows beyond the texts see all of their
    padding: nobody reads them. A text is padded with its own first token: what attention weighs with 0 has to be a
    number, and a damaged row of the weights makes none. So it spoils the texts that use it alone.
    """
    block = np.full((rows, width), pad, dtype=np.int32)
    block[: len(texts)] = np.fromiter((text[0] for text in texts), np.int32, len(texts))[:, None]
    lengths = np.full(rows, width)
    lengths[: len(texts)] = [len(text) for text in texts]
    mask = np.arange(width) < lengths[:, None]
    block[: len(texts)][mask[: len(texts)]] = np.concatenate(texts)
    return block, None if mask.all() else mask


def seen_position_ids(encoder: Encoder, block: Tokens, mask: NDArray[np.bool_] | None) -> Tokens:
    """The position ids of a padded block, int32 (tokens,); what pads a text has the position id of its first token."""
    position_ids = encoder.position_ids(block)
    return (position_ids if mask is None else np.where(mask, position_ids, position_ids[:, :1])).reshape(-1)


def core_count() -> int:
    """All cores, unlike BLAS, which leaves one: streams do not spin."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


_kept = threading.local()


def _streams(count: int) -> list[mx.Stream]:
    """`count` streams of this thread, made once: each holds a thread of its own."""
    kept: list[mx.Stream] = _kept.__dict__.setdefault("streams", [mx.default_stream(mx.default_device())])
    while len(kept) < count:
        kept.append(mx.new_stream(mx.default_device()))
    return kept[:count]


class PaddedForward:
    """For GPUs: padded batches of few shapes, each a compiled graph; all of them are under way before one is read.

    `planned`: whether the device plans each shape anew; None: as the one at hand does.
    """

    def __init__(self, model: LoadedModel, tokens: int = SHAPE_TOKENS, planned: bool | None = None) -> None:
        assert model.embedding is not None
        self._encoder, self._pooling, self._pad = model.encoder, model.embedding.pooling, model.tokenizer.pad_id or 0
        self._heads = model.heads
        #: By rows and width.
        self.compiled: dict[tuple[int, int], Callable[..., mx.array]] = {}
        self._planned = bool(mx.cuda.is_available()) if planned is None else planned
        self._grid = replace(PLANNED if self._planned else TRACED, tokens=tokens, longest=model.embedding.max_tokens)
        self._longest = min(WARM_WIDTH, model.embedding.max_tokens)
        self.least_tokens, self.streams = min(LEAST_TOKENS, tokens), 1

    def __call__(self, texts: Sequence[Tokens]) -> Vectors:
        lengths = [len(text) for text in texts]
        vectors, parts = None, []
        for indices, rows, width in shapes(lengths, self._grid):
            part = self._padded([texts[index] for index in indices], rows, width)
            mx.async_eval(part)  # type: ignore[no-untyped-call]
            parts.append((indices, part))
        for indices, part in parts:
            if vectors is None:
                vectors = np.empty((len(texts), part.shape[1]), dtype=np.float32)
            vectors[indices] = np.array(part)[: len(indices)]
        assert vectors is not None
        return vectors

    def warming(self) -> Iterator[None]:
        """One batch of each shape, where each is planned; elsewhere the least."""
        text = np.full(1, self._pad, dtype=np.int32)
        for rows, width in self._grid.all(self._longest if self._planned else 1):
            mx.eval(self._padded([text], rows, width))
            yield
            if not self._planned:
                return

    def _padded(self, texts: Sequence[Tokens], rows: int, width: int) -> mx.array:
        tokens, mask = padded(texts, rows, width, self._pad)
        ids = self._encoder.token_ids(tokens).reshape(-1)
        inputs = [mx.array(ids), mx.array(seen_position_ids(self._encoder, tokens, mask))]
        if mask is None and self._planned:
            # A mask costs 0.02 ms a layer there, and a form without would be planned apart.
            mask = np.ones(tokens.shape, dtype=np.bool_)
        if mask is not None:
            inputs.append(mx.array(mask))
        return self._graph(rows, width)(*inputs)

    def _graph(self, rows: int, width: int) -> Callable[..., mx.array]:
        """MLX traces it once with a mask and once without."""
        graph = self.compiled.get((rows, width))
        if graph is None:
            vectors = pooled(self._encoder, self._pooling, rows, width)
            graph = mx.compile(lambda *inputs: through(self._heads, vectors(*inputs)))
            self.compiled[rows, width] = graph
        return graph


def pooled(encoder: Encoder, pooling: Pooling, rows: int, width: int) -> Callable[..., mx.array]:
    """(tokens, position_ids, mask or nothing) of a batch `rows` × `width` → vectors (rows, dim), float32."""

    def run(tokens: mx.array, position_ids: mx.array, mask: mx.array | None = None) -> mx.array:
        groups = [Group(rows, width, mask)]
        if pooling == "mean" and isinstance(encoder, LayerNormed) and MEAN_POOL.active:
            x, update, norm = encoder.to_last_norm(tokens, position_ids, groups)
            x, update = x.reshape(rows, width, -1), update.reshape(rows, width, -1)
            lengths = mx.full((rows,), width, mx.int32) if mask is None else mx.sum(mask, axis=1).astype(mx.int32)
            given = MeanPoolInput(x, update, norm.weight, norm.bias, lengths, norm.eps, normalize=False, gradient=False)
            return mean_pool(given)
        return pool_packed(encoder.forward(tokens, position_ids, groups), groups, pooling)

    return run

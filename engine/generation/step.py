"""One pass of a batch through the model, from tokens to tokens, and the keys and values it leaves.

`Step` is one function for decoding and prefilling: `tokens` are (rows, 1) or (rows, many). `mx.compile` traces it once
for every set of shapes; so rows, tokens and KV lengths come in few sizes (`bucket`), and the traces are counted.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Literal

import mlx.core as mx

from engine.adapters.stacked import StackedLora
from engine.generation.sampling import SamplingBatch, choose
from engine.models.cache import KeyValues, View
from engine.models.compiler import fuses_on_cpu, on_cpu
from engine.models.llama import Llama


def bucket(least: int, smallest: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16 … that is at least `least` and `smallest`: at most half too much."""
    size = max(1, least, smallest)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= size else power


#: What is compiled. "all": the whole pass of prompts and of decoding, sampling included: for GPUs, where each kernel
#: that is launched costs. "decode": the model's part of decoding: for CPUs, where g++ takes a second for a new kernel,
#: and padding a prompt costs what it would save. "none".
Compiled = Literal["all", "decode", "none"]


def usual() -> Compiled:
    """What pays on this machine."""
    if not on_cpu():
        return "all"
    return "decode" if fuses_on_cpu() else "none"


#: Traces that are kept: one of a model with 30 layers takes 4 MB. Those used longest ago go first. Where prompts and
#: sampling are compiled too there are more shapes (40 with adapters and four ways to sample), each takes longer to
#: make, and a process has more memory.
TRACES: dict[Compiled, int] = {"all": 64, "decode": 12, "none": 0}


class Step:
    """The pass itself. `traces`: how often it was traced: once for each set of shapes, where it is compiled, and again
    for one that was given up."""

    def __init__(self, model: Llama, compiled: Compiled) -> None:
        self._model, self.traces = model, 0
        #: Whether decoding and prompts come in buckets.
        self.decode_buckets, self.prompt_buckets = compiled != "none", compiled == "all"
        self._compiled = compiled
        self._kept: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()

    def __call__(
        self,
        kv: KeyValues,
        tokens: mx.array,
        offset: mx.array,
        *,
        kv_length: int,
        last: mx.array | None = None,
        sampling: SamplingBatch | None = None,
        adapters: StackedLora | None = None,
        exact: bool = False,
    ) -> tuple[mx.array, ...]:
        """Put `tokens` int32 (rows, many) through the model, row i's at position `offset[i]`; nothing is evaluated.

        Returns what `sampling.choose` makes of each row's token at index `last[i]` (None: the only one); nothing when
        `sampling` is None, for a chunk in the middle of a prompt.
        """
        tree = None if adapters is None else (adapters.stacks, adapters.indices)
        stored = kv.keys, kv.values
        run = (
            self._traced(self._whole, stored, tokens, sampling, tree, kv_length)
            if self._compiled == "all"
            else self._whole
        )
        keys, values, chosen = run(stored, tokens, offset, last, sampling, tree, kv_length, exact)
        kv.keys, kv.values = keys, values
        return tuple(chosen)

    def _traced(
        self,
        function: Callable[..., Any],
        stored: tuple[list[mx.array], list[mx.array]],
        tokens: mx.array,
        sampling: SamplingBatch | None,
        tree: Any,
        kv_length: int,
    ) -> Callable[..., Any]:
        """`function` as compiled for these shapes. One object a trace: dropping it is the only way to free one."""
        key = tokens.shape, stored[0][0].shape, kv_length, _shapes_of(sampling), _shapes_of_stacks(tree)
        if key not in self._kept:
            # A partial: two compiled objects of one function would share their traces.
            self._kept[key] = mx.compile(functools.partial(function))
            if len(self._kept) > TRACES[self._compiled]:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _whole(
        self,
        stored: tuple[list[mx.array], list[mx.array]],
        tokens: mx.array,
        offset: mx.array,
        last: mx.array | None,
        sampling: SamplingBatch | None,
        tree: Any,
        kv_length: int,
        exact: bool,
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        forward = self._forward
        if self._compiled == "decode" and tokens.shape[1] == 1 and not exact:
            forward = self._traced(self._forward, stored, tokens, None, tree, kv_length)
        keys, values, logits = forward(stored, tokens, offset, last, tree, kv_length, exact, sampling is not None)
        if logits is None or sampling is None:
            return keys, values, []
        newest = tokens[:, 0] if "fresh" in sampling else None
        return keys, values, list(choose(logits, sampling, newest))

    def _forward(
        self,
        stored: tuple[list[mx.array], list[mx.array]],
        tokens: mx.array,
        offset: mx.array,
        last: mx.array | None,
        tree: Any,
        kv_length: int,
        exact: bool,
        wanted: bool,
    ) -> tuple[list[mx.array], list[mx.array], mx.array | None]:
        self.traces += 1
        model = self._model
        rows, many = tokens.shape
        view = View(stored, offset, (rows, many), kv_length=kv_length, exact=exact, window=model.args.window)
        adapters = None if tree is None else StackedLora(*tree)
        hidden = model(tokens, cache=view, adapters=adapters)
        if not wanted:
            return view.keys, view.values, None
        final = hidden[:, -1] if last is None else hidden[mx.arange(rows), last]
        return view.keys, view.values, model.head(final)


def _shapes_of(sampling: SamplingBatch | None) -> Hashable:
    if sampling is None:
        return None
    return tuple((name, value.shape if isinstance(value, mx.array) else value) for name, value in sampling.items())


def _shapes_of_stacks(tree: Any) -> Hashable:
    """All stacks have room for the same adapters and rank: one of them and their number say it all."""
    if tree is None:
        return None
    stacks = tree[0]
    return next(iter(stacks.values()))["a"].shape[::2], sum(map(len, stacks.values()))

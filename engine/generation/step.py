"""One pass of a batch through the model, from tokens to tokens, and the keys and values it leaves.

`Step` is one function for decoding and prefilling: `tokens` are (rows, 1) or (rows, many). `mx.compile` traces it once
for every set of shapes; so rows, tokens and columns come in few sizes (`bucket`), and the traces are counted.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from engine.adapters.stacked import StackedLora
from engine.generation.sampling import Columns, choose
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


class Step:
    """The pass itself. `traces`: how often it was traced: once for each set of shapes, where it is compiled."""

    def __init__(self, model: Llama, compiled: Compiled) -> None:
        self._model, self.traces = model, 0
        #: Whether decoding and prompts come in buckets.
        self.decode_buckets, self.prompt_buckets = compiled != "none", compiled == "all"
        self._pass = mx.compile(self._whole) if compiled == "all" else self._whole
        self._decode = mx.compile(self._forward) if compiled == "decode" else self._forward

    def __call__(
        self,
        kv: KeyValues,
        tokens: mx.array,
        offset: mx.array,
        *,
        columns: int,
        last: mx.array | None = None,
        sampling: Columns | None = None,
        adapters: StackedLora | None = None,
        exact: bool = False,
    ) -> tuple[mx.array, ...]:
        """Put `tokens` int32 (rows, many) through the model, row i's at position `offset[i]`; nothing is evaluated.

        Returns what `sampling.choose` makes of each row's token at index `last[i]` (None: the only one); nothing when
        `sampling` is None, for a chunk in the middle of a prompt.
        """
        tree = None if adapters is None else (adapters.stacks, adapters.indices)
        stored = kv.keys, kv.values
        keys, values, chosen = self._pass(stored, tokens, offset, last, sampling, tree, columns, exact)
        kv.keys, kv.values = keys, values
        return tuple(chosen)

    def _whole(
        self,
        stored: tuple[list[mx.array], list[mx.array]],
        tokens: mx.array,
        offset: mx.array,
        last: mx.array | None,
        sampling: Columns | None,
        tree: Any,
        columns: int,
        exact: bool,
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        forward = self._decode if tokens.shape[1] == 1 and not exact else self._forward
        keys, values, logits = forward(stored, tokens, offset, last, tree, columns, exact, sampling is not None)
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
        columns: int,
        exact: bool,
        wanted: bool,
    ) -> tuple[list[mx.array], list[mx.array], mx.array | None]:
        self.traces += 1
        model = self._model
        rows, many = tokens.shape
        view = View(stored, offset, (rows, many), columns=columns, exact=exact, window=model.args.window)
        adapters = None if tree is None else StackedLora(*tree)
        hidden = model(tokens, cache=view, adapters=adapters)
        if not wanted:
            return view.keys, view.values, None
        final = hidden[:, -1] if last is None else hidden[mx.arange(rows), last]
        return view.keys, view.values, model.head(final)

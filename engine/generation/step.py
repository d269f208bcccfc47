"""One pass of a batch through the model, from tokens to tokens, and the keys and values it leaves.

`Step` is one function for decoding and prefilling: tokens are (rows, 1) or (rows, many). `mx.compile` traces it once
for every set of shapes; so rows, tokens and KV lengths come in few sizes (`bucket`), and the traces are counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import mlx.core as mx

from engine.generation.forward_input import ForwardInput, filled, flatten, skeleton
from engine.generation.sampling import choose
from engine.generation.sampling_batch import SamplingBatch
from engine.models.cache import KeyValues, Stored, View
from engine.models.decoder import Decoder
from engine.models.joint import JointKeyValues, JointView
from engine.platform.compiler import fuses_on_cpu, on_cpu

T = TypeVar("T")
Input = TypeVar("Input")


@dataclass(frozen=True, eq=False)
class _Pass:
    """A whole pass: through the model, and from its logits to tokens."""

    given: ForwardInput
    sampling: SamplingBatch | None


@dataclass(frozen=True, eq=False)
class _Forward:
    """The model's part. `logits`: whether they are wanted."""

    given: ForwardInput
    logits: bool


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

    def __init__(self, model: Decoder, compiled: Compiled) -> None:
        self._model, self.traces = model, 0
        #: Passes that were compiled, one for each set of shapes that was new.
        self.traced = 0
        if model.kv_sizes.states and compiled == "all":
            # A recurrent layer sees every token that it is given, those of padding too: prompts are not padded then.
            compiled = "decode"
        #: Whether decoding and prompts come in buckets.
        self.decode_buckets, self.prompt_buckets = compiled != "none", compiled == "all"
        self._compiled = compiled
        #: The compiled passes, the least recently used first.
        self.kept: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()

    def __call__(
        self, kv: KeyValues | JointKeyValues, given: ForwardInput, sampling: SamplingBatch | None = None
    ) -> tuple[mx.array, ...]:
        """Put tokens through the model, which writes and reads `kv`; nothing is evaluated.

        Returns what `sampling.choose` makes of each row's last token; nothing without `sampling`: for a chunk in the
        middle of a prompt.
        """
        if self._compiled == "all":
            kv.stored, chosen = self._traced(self._whole, kv.stored, _Pass(given, sampling))
        else:
            kv.stored, chosen = self.whole(kv.stored, given, sampling)
        return tuple(chosen)

    def _whole(self, stored: Stored, step: _Pass) -> tuple[Stored, list[mx.array]]:
        return self.whole(stored, step.given, step.sampling)

    def whole(
        self, stored: Stored, given: ForwardInput, sampling: SamplingBatch | None
    ) -> tuple[Stored, list[mx.array]]:
        """The pass as a function of arrays: what is stored after it, and what it chose."""
        wanted = _Forward(given, sampling is not None)
        if self._compiled == "decode" and given.tokens.shape[1] == 1 and not given.exact:
            written, logits = self._traced(self._forward, stored, wanted)
        else:
            written, logits = self._forward(stored, wanted)
        if logits is None or sampling is None:
            return written, []
        newest = given.tokens[:, 0] if sampling.counts_newest else None
        return written, list(choose(logits, sampling, newest))

    def _forward(self, stored: Stored, step: _Forward) -> tuple[Stored, mx.array | None]:
        self.traces += 1
        model, given = self._model, step.given
        rows, many = given.tokens.shape
        view: View | JointView
        if given.positions is None:
            view = View(stored, given.offset, (rows, many), given.kv_length, given.exact, model.args.window)
        else:
            heads = model.kv_sizes.keys[0].heads
            view = JointView(stored, given.offset, given.positions, heads, given.adapters)
        hidden = model(given.tokens, cache=view, adapters=given.adapters)
        if not step.logits:
            return view.written, None
        final = hidden[:, -1] if given.last is None else hidden[mx.arange(rows), given.last]
        return view.written, model.head(final)

    def _traced(self, function: Callable[[Stored, Input], T], stored: Stored, given: Input) -> T:
        """`function(stored, given)`, as compiled for these shapes."""
        arrays: list[Any] = []
        parts: list[Any] = [next(array.shape for arrays in stored for array in arrays)]
        flatten(given, arrays, parts)
        key: Hashable = tuple(parts)
        if key not in self.kept:
            shape = skeleton(given)

            # One function a trace: dropping it is the only way to free one.
            def run(stored: Stored, arrays: list[Any]) -> T:
                return function(stored, filled(shape, iter(arrays)))

            self.kept[key] = mx.compile(run)
            self.traced += 1
            if len(self.kept) > TRACES[self._compiled]:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        made: T = self.kept[key](stored, arrays)
        return made

"""One pass of a batch through the model, from tokens to tokens, and the keys and values it leaves.

`Step` is one function for decoding and prefilling: tokens are (rows, 1) or (rows, many). `mx.compile` traces it once
for every set of shapes, where the model has parts (`engine.models.stretches`) one part for all that are alike: on CPUs
of rows that decode, on GPUs of prompts; so rows, tokens and KV lengths come in few sizes (`bucket`), and the traces are
counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import mlx.core as mx

from engine.adapters.stacked import StackedLora
from engine.generation.forward_input import ForwardInput, filled, flatten, skeleton
from engine.generation.sampling import choose
from engine.generation.sampling_batch import SamplingBatch
from engine.models.attention import Mask
from engine.models.decoder import Decoder
from engine.models.joint import JointKeyValues, JointRun, JointView
from engine.models.key_values import KeyValues, Stored
from engine.models.mixed import MixedView
from engine.models.stretches import Hidden, Stretch
from engine.models.view import View
from engine.platform.compiler import fuses_on_cpu, on_cpu

#: What one pass writes and reads.
AnyView: TypeAlias = View | JointView | JointRun

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


@dataclass(frozen=True, eq=False)
class _Layers:
    """A stretch of layers. `given`: with the adapters of these. `mask`: the pass's. `pattern`: the number of the
    stretch that is traced for it."""

    given: ForwardInput
    mask: Mask
    x: mx.array
    update: mx.array
    weights: list[mx.array]
    pattern: int


@dataclass(frozen=True, eq=False)
class _End:
    """From hidden states to logits, `last` of each row, or `every` one; and with `sampling` to tokens, which depend on
    none that the host does not know."""

    hidden: mx.array
    last: mx.array | None
    every: bool = False
    sampling: SamplingBatch | None = None


@dataclass(eq=False)
class Underway:
    """A pass that goes through the layers a few stretches at a time. `hidden`: behind those that are `done`."""

    mask: Mask
    hidden: Hidden
    done: int = 0


_NOTHING: Stored = ([], [], [])

#: What is compiled. "all": the whole pass of prompts and of decoding, sampling included: for GPUs, where each kernel
#: that is launched costs. "decode": the model's part of decoding: for CPUs, where g++ takes a second for a new kernel,
#: and padding a prompt costs what it would save. "none".
Compiled = Literal["all", "decode", "none"]


def usual() -> Compiled:
    """What pays on this machine."""
    if not on_cpu():
        return "all"
    return "decode" if fuses_on_cpu() else "none"


#: Traces that are kept: one of 30 layers at once takes 4 MB, and a pass in parts has two or three of a sixth for each
#: set of shapes. Those used longest ago go first. Where prompts and sampling are compiled too there are more shapes (40
#: with adapters and four ways to sample), those of prompts in parts, and a process has more memory.
TRACES: dict[Compiled, int] = {"all": 96, "decode": 24, "none": 0}


class Step:
    """The pass itself. `traces`: how often Python went through layers: once for each set of shapes, where they are
    compiled, and again for one that was given up."""

    def __init__(self, model: Decoder, compiled: Compiled) -> None:
        self._model, self.traces = model, 0
        #: Passes, or parts of them, that were compiled: for each set of shapes that was new.
        self.traced = 0
        if model.kv_sizes.states and compiled == "all":
            # A recurrent layer sees every token that it is given, those of padding too: prompts are not padded then.
            compiled = "decode"
        #: What is compiled in parts, if the model has them: decoding on CPUs, prompts on GPUs. There each part of a
        #: decode step would launch the arithmetic of positions again: 24 layers took 1.02 to 1.5 times as long (H200).
        self._stretches = None if compiled == "none" else model.stretches
        #: Whether decoding and prompts come in buckets.
        self.decode_buckets, self.prompt_buckets = compiled != "none", compiled == "all"
        #: In how many parts a pass over prompts can go through the layers. Ranks that have layers each hand on between
        #: them what they made: a pass of another kind in between would wait for it, and it for that.
        self.parts = 1
        if self._stretches is not None and compiled == "all" and model.kv_sizes.counted is None:
            self.parts = len(self._stretches.parts)
        #: Whether a pass of rows that decode may take a chunk of prompts along: where neither is compiled for it. On a
        #: GPU each size of both would be compiled, and it took as long as two passes (H200).
        self.mixes = model.stretches is not None and not (self.prompt_buckets or model.kv_sizes.joint)
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
        kv.stored, chosen = self.whole(kv.stored, given, sampling)
        return tuple(chosen)

    def further(self, kv: KeyValues, given: ForwardInput, parts: int, underway: Underway | None) -> Underway:
        """Put prompts through so many of `self.parts`, as far as there are any. `underway`: what those before made;
        None: these are the first."""
        if underway is None:
            underway = self._underway(given)
        kv.stored = self._through(kv.stored, given, underway, parts)
        return underway

    def rest(
        self, kv: KeyValues, given: ForwardInput, sampling: SamplingBatch | None, underway: Underway
    ) -> tuple[mx.array, ...]:
        """The same as a call, of prompts that are under way."""
        kv.stored, chosen = self._in_parts(kv.stored, given, sampling, underway)
        return tuple(chosen)

    def mixed(
        self, kv: KeyValues, given: ForwardInput, prompts: KeyValues, chunk: ForwardInput, sampling: SamplingBatch
    ) -> tuple[mx.array, ...]:
        """The same for a new token of each row of `kv` and, in one pass, a `chunk` of the `prompts`; nothing of it is
        compiled.

        `given.adapters`: of each token of both. `chunk.last`: of the prompts whose next tokens are chosen too, behind
        those of the rows, the index in the chunk's tokens, one prompt after the other.
        """
        assert chunk.last is not None
        view = MixedView(self._layers_view(kv.stored, given), self._layers_view(prompts.stored, chunk))
        tokens = mx.concatenate([given.tokens[:, 0], chunk.tokens.reshape(-1)])
        hidden = self._model(tokens[:, None], cache=view, adapters=given.adapters)
        kv.stored, prompts.stored = (part.written for part in view.views)
        rows = given.tokens.shape[0]
        chosen = mx.concatenate([mx.arange(rows), rows + chunk.last])
        logits = self._logits(_End(hidden[chosen], None))
        return tuple(_chosen(logits, replace(given, tokens=tokens[chosen][:, None]), sampling))

    def whole(
        self, stored: Stored, given: ForwardInput, sampling: SamplingBatch | None
    ) -> tuple[Stored, list[mx.array]]:
        """The pass as a function of arrays: what is stored after it, and what it chose."""
        every, decoding = self._compiled == "all", given.tokens.shape[1] == 1 and not given.exact
        if not every and not (self._compiled == "decode" and decoding):
            return self._pass(stored, _Pass(given, sampling))
        prompts = not decoding and given.places is None
        if self._stretches is not None and (prompts or not every):
            return self._in_parts(stored, given, sampling, self._underway(given))
        if every:
            return self._traced(self._pass, stored, _Pass(given, sampling))
        written, logits = self._traced(self._forward, stored, _Forward(given, sampling is not None))
        return written, _chosen(logits, given, sampling)

    def _pass(self, stored: Stored, step: _Pass) -> tuple[Stored, list[mx.array]]:
        written, logits = self._forward(stored, _Forward(step.given, step.sampling is not None))
        return written, _chosen(logits, step.given, step.sampling)

    def _forward(self, stored: Stored, step: _Forward) -> tuple[Stored, mx.array | None]:
        self.traces += 1
        given, view = step.given, self._view(stored, step.given)
        hidden = self._model(given.tokens, cache=view, adapters=given.adapters)
        if not step.logits:
            return self._behind(hidden, view.written), None
        return view.written, self._logits(_End(hidden, given.last, given.every))

    def _in_parts(
        self, stored: Stored, given: ForwardInput, sampling: SamplingBatch | None, underway: Underway
    ) -> tuple[Stored, list[mx.array]]:
        """The rest of a pass, its parts compiled one by one."""
        assert self._stretches is not None
        stored = self._through(stored, given, underway, len(self._stretches.parts))
        hidden = self._stretches.end(underway.hidden)
        if given.tokens.shape[1] == 1:
            hidden = hidden[:, None]
        if sampling is None:
            return self._behind(hidden, stored), []
        end = _End(hidden, given.last, given.every)
        if self._compiled == "all":
            return stored, self._traced(self._chosen_of, _NOTHING, replace(end, sampling=sampling))
        return stored, _chosen(self._traced(lambda _, end: self._logits(end), _NOTHING, end), given, sampling)

    def _underway(self, given: ForwardInput) -> Underway:
        """A pass in front of the first layer."""
        assert self._stretches is not None
        mask = None if given.places is not None else self._layers_view(_NOTHING, given).mask
        return Underway(mask, self._stretches.begin(given.tokens))

    def _through(self, stored: Stored, given: ForwardInput, underway: Underway, parts: int) -> Stored:
        """Take a pass through so many stretches more, as far as there are any: what is stored then."""
        assert self._stretches is not None
        joint, adapters = given.places is not None, given.adapters
        keys, values, states = map(list, stored)
        for part in self._stretches.parts[underway.done : underway.done + parts]:
            own = given if adapters is None else replace(given, adapters=_adapters_of(part, adapters))
            step = _Layers(own, underway.mask, *underway.hidden, part.weights, part.pattern.index)
            made, underway.hidden = self._traced(self._layers, part.stored(stored, joint=joint), step)
            place = part.place(joint=joint)
            keys[place], values[place] = made[:2]
            underway.done += 1
        return keys, values, states

    def _behind(self, hidden: mx.array, written: Stored) -> Stored:
        """What a pass stored whose logits nobody wants. Where ranks have layers each, all of them make the whole pass
        all the same: what a rank stores needs none of the exchanges behind its own layers."""
        if self._model.kv_sizes.counted is None:
            return written
        keys, values, states = ([mx.depends(array, hidden) for array in arrays] for arrays in written)
        return keys, values, states

    def _layers(self, stored: Stored, step: _Layers) -> tuple[Stored, Hidden]:
        self.traces += 1
        assert self._stretches is not None
        pattern = self._stretches.parts[step.pattern]
        view = self._view(stored, step.given, step.mask, pattern.first)
        hidden = pattern.forward((step.x, step.update), step.weights, view, step.given.adapters)
        return view.written, hidden

    def _chosen_of(self, _: Stored, end: _End) -> list[mx.array]:
        assert end.sampling is not None
        return list(choose(self._logits(end), end.sampling))

    def _logits(self, end: _End) -> mx.array:
        hidden, last = end.hidden, end.last
        if end.every:
            return self._model.head(hidden.reshape(-1, hidden.shape[-1]))
        return self._model.head(hidden[:, -1] if last is None else hidden[mx.arange(hidden.shape[0]), last])

    def _view(self, stored: Stored, given: ForwardInput, mask: Mask = None, first: int = 0) -> AnyView:
        if given.places is None:
            return self._layers_view(stored, given, mask, first)
        side = self._model.kv_sizes.keys[0]
        if given.tokens.shape[1] > 1:
            mask = self._layers_view(_NOTHING, given).mask
            return JointRun(stored, given.offset, given.places, given.tokens.shape[1], given.kv_length, side, mask)
        return JointView(stored, given.offset, given.places, side, given.adapters, first)

    def _layers_view(self, stored: Stored, given: ForwardInput, mask: Mask = None, first: int = 0) -> View:
        rows, many = given.tokens.shape
        sight = given.offset, (rows, many), given.kv_length, given.exact, self._model.args.window
        return View(stored, *sight, mask=mask, first=first, sizes=self._model.kv_sizes)

    def _traced(self, function: Callable[[Stored, Input], T], stored: Stored, given: Input) -> T:
        """`function(stored, given)`, as compiled for these shapes."""
        arrays: list[Any] = []
        parts: list[Any] = [next((array.shape for arrays in stored for array in arrays), None)]
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


def _chosen(logits: mx.array | None, given: ForwardInput, sampling: SamplingBatch | None) -> list[mx.array]:
    if logits is None or sampling is None:
        return []
    return list(choose(logits, sampling, given.tokens[:, 0] if sampling.counts_newest else None))


def _adapters_of(part: Stretch, adapters: StackedLora) -> StackedLora | None:
    """Those of the layers of a stretch, by the names that its pattern has for them."""
    names = zip(part.linears, part.pattern.linears, strict=True)
    stacks = {there: adapters.stacks[name] for name, there in names if name in adapters.stacks}
    return StackedLora(stacks, adapters.indices) if stacks else None

"""The trainer: a generator that advances by one micro-step a turn and yields a report a step.

The caller decides when the next micro-step runs, and may stop between any two: `resumable` is then all there is to
keep.

On a group each rank has a trainer of the run, and all make their turns together: each takes its share of the
micro-batches, the sums over all ranks are made in turns of their own, and behind them every rank has the same state.

Where ranks share the model, each makes every micro-batch with its part of it, and has its part of the state.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from engine.adapters.lora import (
    LoraConfig,
    LoraWeights,
    chosen_targets,
    initialise,
    square_norms,
    target_shapes,
)
from engine.models.decoder import Decoder
from engine.platform.compiler import on_cpu
from engine.training.data import Batches, TokenizedExample, TrainingBatch, collate
from engine.training.flat import FlatLayout, Layout
from engine.training.guard import MAX_ROLLBACKS, RATE_FACTOR, divergence, overflow
from engine.training.objective import Objective
from engine.training.optimizer import Moments, adamw, clipped
from engine.training.parted import layout_of
from engine.training.ranks import ALONE, Ranks, as_floats, from_floats, part_of, share_of
from engine.training.run_ahead import RunAhead
from engine.training.schedule import learning_rate
from engine.training.state import TrainState
from stoker.contract import TrainReport, TrainRequest
from stoker.errors import JobFailed

#: Sizes of batches are rounded up to this where steps are compiled for each shape.
_ALIGN = 64


class Trainer:
    """One run on `decoder`, whose own weights stay as they are. `ranks`: those that share its steps, or the model.

    `state` and `anchor` come from a checkpoint when a run goes on: the anchor is the last regular checkpoint, to which
    a run that diverges is rolled back. They are whole until `run` is called, and from then on as `layout` has them.
    """

    def __init__(
        self,
        decoder: Decoder,
        request: TrainRequest,
        examples: Sequence[TokenizedExample],
        held_out: Sequence[TokenizedExample] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        self.request, self.decoder, self._shard = request, decoder, decoder.shard
        self._ranks = ranks if self._shard is None else ALONE
        self.linears = decoder.linears
        targets = chosen_targets(decoder.linear_shapes, request.targets)
        self.config = LoraConfig(request.rank, request.alpha, targets, request.rslora, request.dora)
        shapes = target_shapes(decoder.linear_shapes, targets)
        squares = self._square_norms(shapes) if self._shard is None else {}
        # Where ranks share the model, the norms are found together: when it runs.
        norms = squares or {name: mx.ones((out,)) for name, (_, out) in shapes.items()}
        start = initialise(self.config, shapes, request.seed, norms if request.dora else None).matrices
        self._whole = FlatLayout(start)
        self.layout: Layout = self._whole if self._shard is None else layout_of(start, self._shard)
        self.objective = Objective(decoder, request, self.config, self.layout, squares)
        self._batches = Batches(examples, request.batch_size, request.seed)
        self._held_out = _in_batches(held_out, request.batch_size)
        # The CPU back-end gains nothing from it, and would trace every shape anew.
        compiled: Callable[..., Callable[..., mx.array]] = (lambda function: function) if on_cpu() else mx.compile
        self._align = 1 if on_cpu() else _ALIGN
        self._run_ahead = RunAhead()
        self._slope = compiled(mx.value_and_grad(self.objective.training_loss))
        self._value = compiled(self.objective.held_out_loss)
        # Of micro-batches that are dealt out this rank has the same examples each time.
        size = min(request.batch_size, len(examples))
        self._part = part_of(size, self._ranks)
        loss_of_part = partial(self.objective.training_loss, drawn=(size, self._part.start))
        self._slope_of_part = compiled(mx.value_and_grad(loss_of_part))
        weights = self._whole.pack(start)
        self.state = TrainState(weights, Moments.zeros(self._whole.size))
        self.anchor = self.state
        #: The whole state of this turn, where a checkpoint or the best step has it.
        self._kept: TrainState | None = None
        #: Of a step under way on a group: where it began.
        self._began: TrainState | None = None
        mx.eval(self.state.arrays)

    def run(self) -> Generator[TrainReport | None, None, None]:
        """Advance to the end. Yields None after a micro-step that is not the last of its step, or of an evaluation.

        Raises `JobFailed` when the run diverges once more than it may.
        """
        state, anchor = self.state, self.anchor
        self.state = self.layout.own(state)
        self.anchor = self.state if anchor is state else self.layout.own(anchor)
        return self._turns()

    def _square_norms(self, layers: Iterable[str]) -> dict[str, mx.array]:
        return {name: self._square_norms_of(name) for name in layers} if self.request.dora else {}

    def _square_norms_of(self, name: str) -> mx.array:
        """Of a layer that another rank has, those that it finds."""
        if self._shard is None or self._shard.split == "heads":
            return square_norms(self.linears[name])
        linear, (_, out) = self.linears.get(name), self.decoder.linear_shapes[name]
        found = self._shard.sum(mx.zeros((out,)) if linear is None else square_norms(linear))
        mx.eval(found)
        return found

    def _measure(self) -> None:
        """Find the norms of the layers of which each rank has a part: before the first step, what it begins with."""
        self.objective.squares = self._square_norms(self._whole.layers)
        state, anchor = self.state, self.anchor
        self.state = self._measured(state)
        self.anchor = self.state if anchor is state else self._measured(anchor)

    def _measured(self, state: TrainState) -> TrainState:
        if state.step or not self.objective.squares:
            return state
        matrices = self.layout.unpack(state.weights)
        for name, squares in self.objective.squares.items():
            matrices[name]["m"] = mx.sqrt(squares)
        weights = self.layout.pack(matrices)
        mx.eval(weights)
        return replace(state, weights=weights)

    def _turns(self) -> Generator[TrainReport | None, None, None]:
        if self._shard is not None:
            self._measure()
        while not self.finished:
            self._kept = None
            if self.state.unreported is None:
                yield from self._step()
            if self.state.unreported is not None:
                yield from self._report()

    @property
    def finished(self) -> bool:
        state, request = self.state, self.request
        if state.unreported is not None:
            return False
        return state.step >= request.steps or bool(request.stop_after and state.stale >= request.stop_after)

    @property
    def is_anchor(self) -> bool:
        """Whether the state is one that a regular checkpoint keeps."""
        return self.state is self.anchor and self.state.step > 0

    def resumable(self) -> TrainState:
        """A whole state from which any number of ranks may go on: now, or on a group, whose ranks have each a part of
        the step under way, where that began. Ranks that share the model ask for it at the same time."""
        return self.layout.whole(self._began or self.state)

    @property
    def whole(self) -> TrainState:
        """The whole state: where ranks share the model, before the first turn, and behind one that made a checkpoint or
        the best step."""
        return self._kept or self.state

    @property
    def witness(self) -> str:
        """What each rank must say alike between two turns; "" within a step. At a checkpoint it has the weights'
        checksum."""
        state = self.state
        if self._began is not None:
            return ""
        numbers = {**state.numbers, "unreported": state.unreported is not None}
        weights = zlib.crc32(np.array(self.layout.common(state.weights)).tobytes()) if self.is_anchor else 0
        return f"{zlib.crc32(json.dumps(numbers).encode()):08x}-{weights:08x}"

    def adapter(self, state: TrainState | None = None) -> LoraWeights:
        """The adapter as it is in a whole state, by default `whole`."""
        matrices = self._whole.unpack((state or self.whole).weights)
        mx.eval(matrices)
        return LoraWeights(self.config, matrices)

    def _step(self) -> Generator[TrainReport | None, None, None]:
        """Micro-steps until the optimizer's, which either makes a new state or rolls back."""
        began = time.perf_counter()
        before = self.state.tokens
        self._began = self.state if self._ranks.size > 1 else None
        while True:
            self._micro_step()
            if self.state.micro % self.request.accumulation == 0:
                break
            yield None
        if self._ranks.size > 1:
            # Only when each has its share does any wait for the sum.
            yield None
            self._sum_up(before)
            yield None
        problem = self._optimize(began, before)
        self._began = None
        if problem:
            yield self._roll_back(self.state.step + 1, problem)

    def _micro_step(self) -> None:
        """One forward and backward pass: add its gradient to the state's sum."""
        state = self.state
        share = share_of(state.micro, self.request.accumulation, self._ranks)
        part = slice(None) if share.whole else self._part
        examples = self._batches.examples(share.micro)
        if not examples[part]:
            # Fewer examples than ranks: this one idles.
            self.state = replace(state, micro=share.after)
            return
        batch = collate(examples, self._align, part)
        slope = self._slope if share.whole else self._slope_of_part
        with self._run_ahead.bounded(batch.inputs.size):
            loss, gradient = slope(state.weights, self._key(share.micro), *_arrays(batch))
            if state.gradient is not None:
                gradient = state.gradient + gradient
            mx.eval(loss, gradient)
        self.state = replace(
            state,
            micro=share.after,
            gradient=gradient,
            loss_sum=state.loss_sum + _number(loss),
            targets=state.targets + batch.count,
            tokens=state.tokens + batch.tokens,
        )

    def _sum_up(self, before: int) -> None:
        """Make each rank's part of the step the whole step. `before`: tokens where it began."""
        state = self.state
        gradient = mx.zeros((self.layout.size,)) if state.gradient is None else state.gradient
        own = as_floats(state.loss_sum, state.targets, state.tokens - before)
        total = self._ranks.sum(mx.concatenate([gradient, own]))
        loss, (targets, tokens) = from_floats(np.array(total[self.layout.size :]).tolist())
        self.state = replace(
            state,
            gradient=total[: self.layout.size],
            loss_sum=loss,
            targets=targets,
            tokens=before + tokens,
        )

    def _optimize(self, began: float, before: int) -> str | None:
        """The optimizer's step on the mean over all targets of the micro-steps; or what speaks against it."""
        state, request = self.state, self.request
        assert state.gradient is not None
        loss = state.loss_sum / state.targets
        gradient = self.layout.summed(state.gradient / state.targets)
        norm = self.layout.norm(gradient)
        gradient = clipped(gradient, norm, request.clip)
        rate = learning_rate(request, state.step) * state.rate_factor
        weights, moments = adamw(
            state.weights, state.moments, gradient, step=state.step + 1, rate=rate, decay=request.weight_decay
        )
        mx.eval(weights, moments.first, moments.second, norm)
        problem = divergence(loss, _number(norm), state.recent, request.spike)
        if problem is None:
            seconds = time.perf_counter() - began
            fields = {
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": _number(norm),
                "tokens_per_second": (state.tokens - before) / seconds,
            }
            self.state = state.stepped(weights, moments, loss, fields)
        return problem

    def _roll_back(self, step: int, problem: str) -> TrainReport:
        """Go back to the anchor with a lower rate, as `step` diverged; the reports and the rollbacks keep counting."""
        state, anchor = self.state, self.anchor
        said = f"diverged at step {step}: {problem}"
        if state.rollbacks >= MAX_ROLLBACKS:
            raise JobFailed(
                f"training {said}; it was rolled back {state.rollbacks} times before. "
                "Lower learning_rate, add warmup_steps, or look at the examples."
            )
        factor = state.rate_factor * RATE_FACTOR
        self.state = self.anchor = replace(
            anchor, reports=state.reports + 1, rollbacks=state.rollbacks + 1, rate_factor=factor
        )
        return TrainReport(
            index=state.reports,
            step=anchor.step,
            steps=self.request.steps,
            loss=anchor.last_loss,
            learning_rate=learning_rate(self.request, anchor.step) * factor,
            gradient_norm=0.0,
            tokens=anchor.tokens,
            tokens_per_second=0.0,
            memory_bytes=self._run_ahead.peak,
            note=f"{said}; rolled back to step {anchor.step}, learning rate times {factor:g}",
        )

    def _report(self) -> Generator[TrainReport | None, None, None]:
        """Evaluate if it is time, and report the step that is done."""
        state, request = self.state, self.request
        fields = state.unreported
        assert fields is not None
        due = request.eval_every and state.step % request.eval_every == 0
        held_out = None
        if self._held_out and (due or state.step == request.steps):
            held_out = yield from self._evaluate()
            if problem := overflow(held_out):
                yield self._roll_back(state.step, problem)
                return
            better = state.best_loss is None or held_out < state.best_loss
            state = replace(
                state,
                best_loss=held_out if better else state.best_loss,
                best_step=state.step if better else state.best_step,
                stale=0 if better else state.stale + 1,
            )
        self.state = replace(state, unreported=None, reports=state.reports + 1)
        if state.step % request.checkpoint_every == 0 or self.finished:
            self.anchor = self.state
        if self.is_anchor or (held_out is not None and state.best_step == state.step):
            self._kept = self.layout.whole(self.state)
        yield TrainReport(
            index=state.reports,
            step=state.step,
            steps=request.steps,
            tokens=state.tokens,
            held_out_loss=held_out,
            memory_bytes=self._run_ahead.peak,
            epoch=state.micro / self._batches.an_epoch,
            last=self.finished,
            loss=fields["loss"],
            learning_rate=fields["learning_rate"],
            gradient_norm=fields["gradient_norm"],
            tokens_per_second=fields["tokens_per_second"],
        )

    def _evaluate(self) -> Generator[None, None, float]:
        """Mean loss over the held-out examples, without dropout and smoothing."""
        total, count, ranks = 0.0, 0, self._ranks
        for first in range(0, len(self._held_out), ranks.size):
            for examples in self._held_out[first + ranks.rank : first + ranks.rank + 1]:
                batch = collate(examples, self._align)
                with self._run_ahead.bounded():
                    loss = self._value(self.state.weights, *_arrays(batch))
                    mx.eval(loss)
                total += _number(loss)
                count += batch.count
            yield None
        if ranks.size > 1:
            total, (count,) = from_floats(np.array(ranks.sum(as_floats(total, count))).tolist())
            yield None
        return total / count

    def _key(self, micro: int) -> mx.array:
        """The random key of a micro-step: a function of the seed and its number."""
        draws = np.random.default_rng((self.request.seed, micro, 2)).integers(2**32, size=2, dtype=np.uint32)
        return mx.array(draws)


def _in_batches(examples: Sequence[TokenizedExample], size: int) -> list[list[TokenizedExample]]:
    ordered = sorted(examples, key=len)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _arrays(batch: TrainingBatch) -> tuple[mx.array, ...]:
    return batch.inputs, batch.positions, batch.targets, batch.weights


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar))

"""Runs as the ranks behind the first one have them: the same trainer, without a folder, reports or a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
from pydantic import Field

from engine.models.decoder import Decoder
from engine.training.data import TokenizedExample, divided
from engine.training.ranks import Ranks, RunPlan, of_rank_0
from engine.training.state import TrainState
from engine.training.trainer import Trainer
from stoker.contract import TrainRequest
from stoker.contract.base import Message
from stoker.errors import JobFailed

Count = Annotated[int, Field(ge=1, lt=2**40)]


class RunHeader(Message):
    """A plan's small part. The rest follows as arrays: `examples` in all with `tokens` in all, and of each state the
    weights and the moments, `weights` numbers each; `gradient`: and that of the step under way. `anchor`: None, it is
    the state."""

    run: Annotated[str, Field(max_length=128)]
    model: Annotated[str, Field(max_length=128)]
    request: TrainRequest
    examples: Count
    tokens: Count
    weights: Count
    state: dict[str, Any]
    gradient: bool
    anchor: dict[str, Any] | None


def header_of(plan: RunPlan) -> RunHeader:
    return RunHeader(
        run=plan.run,
        model=plan.model,
        request=plan.request,
        examples=len(plan.examples),
        tokens=sum(map(len, plan.examples)),
        weights=plan.state.weights.size,
        state=plan.state.numbers,
        gradient=plan.state.gradient is not None,
        anchor=None if plan.anchor is plan.state else plan.anchor.numbers,
    )


def send(ranks: Ranks, plan: RunPlan) -> None:
    """Rank 0's side of `FollowedRun`."""
    # A token and whether it is learned are one number.
    words = [example.tokens * 2 + example.learned for example in plan.examples]
    of_rank_0(ranks, mx.array(np.concatenate(words).astype(np.int32)))
    of_rank_0(ranks, mx.array([[len(example), example.line] for example in plan.examples], mx.int32))
    for state in [plan.state] if plan.anchor is plan.state else [plan.state, plan.anchor]:
        for array in state.arrays.values():
            of_rank_0(ranks, array)


class FollowedRun:
    """A run that rank 0 began. Made at the same time as it calls `send`."""

    def __init__(self, decoder: Decoder, header: RunHeader, ranks: Ranks) -> None:
        words = of_rank_0(ranks, mx.zeros((header.tokens,), mx.int32))
        lines = of_rank_0(ranks, mx.zeros((header.examples, 2), mx.int32))
        state = _state(ranks, header.weights, header.state, gradient=header.gradient)
        anchor = state if header.anchor is None else _state(ranks, header.weights, header.anchor)
        learned, held_out = divided(_examples(np.array(words), np.array(lines)), header.request)
        self._trainer = Trainer(decoder, header.request, learned, held_out, ranks)
        if decoder.shard is None:
            # What rank 0 has of a step under way is counted there alone.
            state = replace(state, gradient=None, loss_sum=0.0, targets=0)
        self._trainer.state = state
        self._trainer.anchor = state if header.anchor is None else anchor
        self._turns = self._trainer.run()

    def advance(self) -> str:
        """The turn that rank 0 makes too; its witness."""
        try:
            next(self._turns)
        except JobFailed as error:
            # Rank 0 has met the same, and says so to the job.
            return str(error)[:200]
        return self._trainer.witness

    def keep(self) -> None:
        """Give this rank's part of what rank 0 keeps of the run."""
        self._trainer.resumable()


def _state(ranks: Ranks, size: int, numbers: dict[str, Any], *, gradient: bool = False) -> TrainState:
    names = ["weights", "first", "second", *(["gradient"] if gradient else [])]
    return TrainState.of({name: of_rank_0(ranks, mx.zeros((size,))) for name in names}, numbers)


def _examples(words: np.ndarray, lines: np.ndarray) -> Sequence[TokenizedExample]:
    parts = np.split(words, np.cumsum(lines[:-1, 0]))
    return [
        TokenizedExample(part // 2, part % 2 == 1, int(line))
        for part, (_, line) in zip(parts, lines.tolist(), strict=True)
    ]

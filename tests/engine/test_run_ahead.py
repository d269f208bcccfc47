"""A training step takes what it needs and a share more, however far MLX could run ahead."""

from __future__ import annotations

import mlx.core as mx
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.platform.compiler import fuses_on_cpu
from engine.training import run_ahead
from engine.training.run_ahead import SHARE, SHARE_CPU, RunAhead
from engine.training.trainer import Trainer
from tests.engine import tiny
from tests.engine.test_training import example

UNBOUNDED = 1 << 40


class Memory:
    """What MLX says of memory, with numbers of the test's own."""

    def __init__(self, active: int) -> None:
        self.active = self.peak = active
        self.limit = UNBOUNDED

    def get_active_memory(self) -> int:
        return self.active

    def get_peak_memory(self) -> int:
        return self.peak

    def reset_peak_memory(self) -> None:
        self.peak = 0

    def set_memory_limit(self, limit: int) -> int:
        self.limit, before = limit, self.limit
        return before


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory(active=1000)
    monkeypatch.setattr(run_ahead, "mx", found)
    monkeypatch.setattr(run_ahead, "on_cpu", lambda: False)
    return found


def limit_of(ahead: RunAhead, memory: Memory, tokens: int, takes: int = 0) -> int:
    """The limit within a step that takes so much."""
    with ahead.bounded(tokens):
        memory.peak = max(memory.peak, memory.active + takes)
        return memory.limit


def test_the_first_step_launches_nothing_early_and_shows_what_the_others_may_take(memory: Memory) -> None:
    ahead = RunAhead()
    assert limit_of(ahead, memory, tokens=64, takes=400) == 1000
    assert limit_of(ahead, memory, tokens=64, takes=700) == 1000 + 400 * (1 + SHARE)
    memory.active = 1200
    assert limit_of(ahead, memory, tokens=0) == 1200 + 400 * (1 + SHARE), "an evaluation has the same room"
    assert limit_of(ahead, memory, tokens=32) == 1200 + 400 * (1 + SHARE)
    assert memory.limit == UNBOUNDED


def test_a_larger_step_shows_anew_what_it_needs(memory: Memory) -> None:
    ahead = RunAhead()
    limit_of(ahead, memory, tokens=64, takes=400)
    assert limit_of(ahead, memory, tokens=65, takes=800) == 1000
    assert limit_of(ahead, memory, tokens=65) == 1000 + 800 * (1 + SHARE)


def test_a_step_that_fails_leaves_mlxs_own_limit_and_shows_nothing(memory: Memory) -> None:
    ahead = RunAhead()
    with pytest.raises(RuntimeError, match="the device"), ahead.bounded(64):
        raise RuntimeError("the device")
    assert memory.limit == UNBOUNDED
    assert limit_of(ahead, memory, tokens=64, takes=400) == 1000


def test_the_peak_is_that_of_the_whole_run(memory: Memory) -> None:
    ahead = RunAhead()
    limit_of(ahead, memory, tokens=64, takes=900)
    limit_of(ahead, memory, tokens=65, takes=100)
    assert ahead.peak == 1900
    limit_of(ahead, memory, tokens=65, takes=950)
    assert ahead.peak == 1950


def test_a_cpu_runs_ahead_by_a_smaller_share(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_ahead, "on_cpu", lambda: True)
    ahead = RunAhead()
    limit_of(ahead, memory, tokens=64, takes=400)
    assert limit_of(ahead, memory, tokens=64) == 1000 + 400 * (1 + SHARE_CPU)


def test_every_micro_step_and_every_evaluation_of_a_run_is_bounded(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel
) -> None:
    fuses_on_cpu()  # it evaluates too, once a process
    usual, evaluate = mx.get_memory_limit(), mx.eval
    bounded: list[bool] = []

    def noting(*arrays: object) -> None:
        bounded.append(mx.get_memory_limit() < usual)
        evaluate(*arrays)

    asked = tiny.asking(steps=2, batch_size=1, accumulation=2, held_out=0.3, eval_every=1)
    shown = example([1, 2, 3], 1)
    trainer = Trainer(model.decoder, asked, [shown] * 2, held_out=[shown])
    monkeypatch.setattr(mx, "eval", noting)
    reports = [report for report in trainer.run() if report is not None]
    assert all(report.held_out_loss for report in reports)
    # Two micro-steps, what the optimizer does, an evaluation.
    assert bounded == [True, True, False, True] * 2
    assert mx.get_memory_limit() == usual

"""Loss, gradients, schedules, optimizer and guard against what they are said to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.models.llama import Llama
from engine.training import loss as loss_module
from engine.training.data import TokenizedExample, collate
from engine.training.guard import divergence
from engine.training.loss import cross_entropy
from engine.training.optimizer import Moments, adamw, clipped
from engine.training.schedule import learning_rate
from engine.training.trainer import Trainer
from tests.engine import reference_float64, tiny
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.tiny import largest


def test_the_loss_is_that_of_the_whole_logits(monkeypatch: pytest.MonkeyPatch, tiny_llama: Llama) -> None:
    """However many chunks it is made in; its slope too."""
    hidden = mx.random.normal((11, TINY.dim), key=mx.random.key(1))
    targets = mx.array([3, 60, 7, 0, 5, 5, 9, 30, 31, 32, 1])
    weights = mx.array([1.0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0])

    def plain(hidden: mx.array, smoothing: float) -> mx.array:
        logits = tiny_llama.logits(hidden)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        wanted = mx.take_along_axis(logs, targets[:, None], axis=-1)[:, 0]
        return -mx.sum(weights * ((1 - smoothing) * wanted + smoothing * mx.mean(logs, axis=-1)))

    for smoothing in (0.0, 0.2):
        value, slope = mx.value_and_grad(plain)(hidden, smoothing)
        for rows in (100, 4, 1):
            monkeypatch.setattr(loss_module, "MAX_LOGITS_CPU", rows * TINY.vocab)
            found, found_slope = mx.value_and_grad(
                lambda hidden, smoothing=smoothing: cross_entropy(
                    tiny_llama.logits, hidden, targets, weights, smoothing
                )
            )(hidden)
            assert found.item() == pytest.approx(value.item(), abs=1e-4)
            assert largest(found_slope - slope) < 1e-5


def test_padding_does_not_change_a_loss(tiny_llama: Llama) -> None:
    rows = [TokenizedExample.of([([3], False), (list(range(4, 4 + n)), True)]) for n in (2, 5, 9)]
    trainer = Trainer(tiny_llama, tiny.asking(), rows)

    def loss(examples: list[TokenizedExample], align: int) -> float:
        batch = collate(examples, align)
        arrays = batch.inputs, batch.positions, batch.targets, batch.weights
        return float(np.array(trainer.objective.held_out_loss(trainer.state.weights, *arrays)))

    apart = sum(loss([row], 1) for row in rows)
    assert loss(rows, 1) == pytest.approx(apart, abs=1e-4)
    assert loss(rows, 16) == pytest.approx(apart, abs=1e-4)


PATHS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"rslora": True},
    "DoRA": {"dora": True},
    "label smoothing": {"label_smoothing": 0.15},
    "dropout": {"dropout": 0.3},
    "gradient checkpointing": {"dora": True, "dropout": 0.3, "gradient_checkpointing": True},
}
ROWS = [
    TokenizedExample.of([([3, 9], False), ([4, 8, 15, 16], True)]),
    TokenizedExample.of([([23], False), ([42, 5], True)]),
]


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "biases"])
def test_gradients_are_central_differences_in_float64(options: dict[str, Any], bias: bool) -> None:
    """Of every trained matrix of every layer, along a random direction; the differences are those of
    `reference_float64.Model`, the same loss written anew in numpy, every operation in float64 (MLX's exp is not)."""
    mx.random.seed(3)
    decoder = Llama(replace(TINY, qkv_bias=bias), RandomTensors())
    trainer = Trainer(decoder, tiny.asking(targets=tiny.LAYERS, rank=3, **options), ROWS)
    # Not at the start, where B is zero and A has no slope; and with norms that DoRA has moved.
    weights = trainer.state.weights + 0.05 * mx.random.normal(trainer.state.weights.shape)
    batch, key = collate(ROWS), mx.array([1, 2], mx.uint32)
    value, slope = mx.value_and_grad(trainer.objective.training_loss)(
        weights, key, batch.inputs, batch.positions, batch.targets, batch.weights
    )
    matrices, slopes = (
        reference_float64.arrays(trainer.layout.unpack(weights)),
        reference_float64.arrays(trainer.layout.unpack(slope)),
    )
    model = reference_float64.Model(trainer, matrices, key)
    assert float(np.array(value)) == pytest.approx(model.loss(matrices, ROWS), rel=1e-5)
    random, step = np.random.default_rng(5), 1e-5
    for name, sides in matrices.items():
        for side, matrix in sides.items():
            direction = random.normal(size=matrix.shape)

            def moved(by: float, name: str = name, side: str = side, direction: np.ndarray = direction) -> float:
                changed = {**matrices[name], side: matrices[name][side] + by * direction}
                return model.loss({**matrices, name: changed}, ROWS)

            wanted = (moved(step) - moved(-step)) / (2 * step)
            bound = float(np.linalg.norm(slopes[name][side]) * np.linalg.norm(direction))
            assert float(np.sum(slopes[name][side] * direction)) == pytest.approx(wanted, abs=2e-5 * bound), (
                name,
                side,
            )


def test_the_rate_warms_up_and_stays() -> None:
    asked = tiny.asking(learning_rate=1.0, warmup_steps=3)
    assert [learning_rate(asked, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(tiny.asking(learning_rate=0.5), 0) == 0.5


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_rate_falls_to_nothing_behind_the_last_step(warmup: int) -> None:
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5)):
        asked = tiny.asking(learning_rate=1.0, schedule=schedule, steps=8 + warmup, warmup_steps=warmup)
        rates = [learning_rate(asked, step) for step in range(9 + warmup)]
        assert rates[warmup] == 1.0
        assert rates[warmup + 4] == pytest.approx(middle)
        assert rates[warmup + 8] == pytest.approx(0.0, abs=1e-12)
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    cosine = tiny.asking(learning_rate=1.0, schedule="cosine", steps=8)
    assert learning_rate(cosine, 2) == pytest.approx(0.5 + 0.5**1.5)


def test_the_optimizer_is_adamw_with_one_count_for_all() -> None:
    """Against the paper's formula (algorithm 2, with the schedule's rate as its multiplier), in float64."""
    random = np.random.default_rng(0)
    weights = random.normal(size=9)
    found, moments = mx.array(weights, mx.float32), Moments.zeros(9)
    first = second = np.zeros(9)
    for step in range(1, 6):
        gradient = random.normal(size=9) * 10.0**-step
        found, moments = adamw(found, moments, mx.array(gradient, mx.float32), step=step, rate=1e-2 / step, decay=0.1)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weights = weights - 1e-2 / step * (update + 0.1 * weights)
        assert np.abs(np.array(found) - weights).max() < 1e-6


def test_a_gradient_is_shortened_to_the_bound_and_never_lengthened() -> None:
    long = clipped(mx.array([3.0, 4.0]), mx.array(5.0), 1.0)
    assert np.array(long) == pytest.approx([0.6, 0.8], abs=1e-6)
    short = clipped(mx.array([0.3, 0.4]), mx.array(0.5), 1.0)
    assert short.tolist() == mx.array([0.3, 0.4]).tolist()


USUAL = (2.0,) * 16


@pytest.mark.parametrize(
    ("loss", "norm", "recent", "spike", "wrong"),
    [
        (float("nan"), 1.0, (), 3.0, "loss nan"),
        (2.0, float("inf"), (), 0.0, "gradient norm inf"),
        (6.1, 1.0, USUAL, 3.0, "loss 6.100, over 3 times the 2.000"),
        (5.9, 1.0, USUAL, 3.0, None),
        (6.1, 1.0, USUAL, 0.0, None),
        (6.1, 1.0, USUAL[:7], 3.0, None),
        (0.9, 1.0, (0.01,) * 16, 3.0, None),
        (1.1, 1.0, (0.01,) * 16, 3.0, "over 3 times"),
    ],
)
def test_divergence_is_what_the_guard_says_it_is(
    loss: float, norm: float, recent: tuple[float, ...], spike: float, wrong: str | None
) -> None:
    found = divergence(loss, norm, recent, spike)
    assert found is None if wrong is None else wrong in str(found)

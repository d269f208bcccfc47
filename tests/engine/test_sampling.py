"""Sampling: every row by its own parameters, the same whatever stands beside it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.generation.sampling import Draw, Pick, sample
from stoker.contract import GenerateRequest

VOCABULARY = 50
CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 10.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1_000_000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
]


def draw(position: int = 0, **options: Any) -> Draw:
    return Draw(GenerateRequest(model="m", prompt="p", **options), position)


def logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


def reference(row: np.ndarray, request: GenerateRequest, uniform: float) -> tuple[int, float, float]:
    """transformers' order (temperature, top-k, top-p), in float64; also how near `uniform` is to another token."""
    scaled = row.astype(np.float64) / request.temperature
    order = np.argsort(-scaled)
    ranked = scaled[order][: request.top_k or None]
    probability = np.exp(ranked - ranked.max())
    probability /= probability.sum()
    kept = probability[np.cumsum(probability) - probability < request.top_p]
    kept /= kept.sum()
    edges = np.cumsum(kept)
    rank = min(int(np.searchsorted(edges, uniform, side="right")), len(kept) - 1)
    return int(order[rank]), float(kept[rank]), float(np.abs(edges[:-1] - uniform).min(initial=1.0))


@pytest.mark.parametrize("options", CASES)
def test_a_row_is_drawn_as_transformers_would(options: dict[str, Any]) -> None:
    rows = logits(64, seed=3)
    draws = [draw(position, seed=11, **options) for position in range(64)]
    for row, one, pick in zip(rows, draws, sample(mx.array(rows), draws), strict=True):
        token, probability, margin = reference(row, one.request, one.uniform)
        if margin > 1e-5:  # nearer than that, float32 may land on the neighbour
            assert pick.token_id == token
            assert pick.probability == pytest.approx(probability, rel=1e-3)


def test_greedy_takes_the_best_and_says_so() -> None:
    rows = logits(8)
    for row, pick in zip(rows, sample(mx.array(rows), [draw()] * 8), strict=True):
        assert pick.token_id == int(row.argmax())
        assert pick.probability == 1.0


def test_logit_and_logprob_are_the_raw_models_whatever_the_temperature() -> None:
    rows = logits(8)
    draws = [draw(temperature=5.0, top_k=3, seed=seed) for seed in range(8)]
    for row, pick in zip(rows, sample(mx.array(rows), draws), strict=True):
        assert pick.logit == row[pick.token_id]
        wanted = row[pick.token_id] - np.log(np.exp(row.astype(np.float64)).sum())
        assert pick.logprob == pytest.approx(wanted, abs=1e-5)


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    rows = logits(len(CASES) + 1)
    draws = [draw(position, seed=5, **options) for position, options in enumerate(CASES)] + [draw(3)]
    together = sample(mx.array(rows), draws)
    alone = [sample(mx.array(row[None]), [one])[0] for row, one in zip(rows, draws, strict=True)]
    order = np.random.default_rng(1).permutation(len(draws))
    shuffled = sample(mx.array(rows[order]), [draws[place] for place in order])
    for place, pick in enumerate(together):
        other = shuffled[int(np.flatnonzero(order == place)[0])]
        assert pick.token_id == alone[place].token_id == other.token_id
        assert pick.logprob == pytest.approx(alone[place].logprob, abs=1e-6)


def test_a_number_depends_on_seed_and_position_alone() -> None:
    first = draw(7, seed=3, temperature=1.0).uniform
    assert first == draw(7, seed=3, top_k=4).uniform
    others = {draw(position, seed=seed).uniform for seed in range(20) for position in range(20)}
    assert len(others) == 400
    assert all(0 <= value < 1 for value in others)


def test_the_largest_seed_and_position_can_be_drawn() -> None:
    assert 0 <= draw(32_767, seed=2**63 - 1).uniform < 1


def chi_square(picks: list[Pick], wanted: np.ndarray) -> float:
    counts = np.bincount([pick.token_id for pick in picks], minlength=len(wanted))
    expected = wanted * len(picks)
    return float(((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.8}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(options: dict[str, Any], wanted: list[float]) -> None:
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32)
    rows = np.tile(np.log(probabilities), (4000, 1))
    picks = sample(mx.array(rows), [draw(place, seed=17, temperature=1.0, **options) for place in range(4000)])
    never = [place for place, share in enumerate(wanted) if share == 0]
    assert not {pick.token_id for pick in picks} & set(never)
    assert chi_square(picks, np.array(wanted)) < 23.5  # 4 degrees of freedom: one in 10,000


def test_tokens_that_cannot_be_are_never_drawn() -> None:
    row = np.full((1, 8), -np.inf, dtype=np.float32)
    row[0, [2, 5]] = 0.0
    picks = [sample(mx.array(row), [draw(place, temperature=10.0, seed=2)])[0] for place in range(50)]
    assert {pick.token_id for pick in picks} == {2, 5}


@pytest.mark.parametrize("temperature", [1e-38, 1e-44, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    rows = logits(2)
    picks = sample(mx.array(rows), [draw(temperature=temperature), draw(temperature=1.0, top_k=1)])
    assert [pick.token_id for pick in picks] == rows.argmax(axis=-1).tolist()
    assert [pick.probability for pick in picks] == [1.0, 1.0]

"""Sampling: every row by its own parameters, the same in every batch."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.generation.draws import Draw, Pick, Uniforms, uniforms
from engine.generation.forward_input import flatten
from engine.generation.sampling import process, sample, warp
from engine.generation.sampling_batch import sampling_batch
from engine.models.fastmath import fast
from stoker.contract import GenerateRequest

GOLDENS = Path(__file__).parent.parent / "goldens"
GOLDEN = json.loads((GOLDENS / "sampling.json").read_text())
CASES: list[dict[str, Any]] = GOLDEN["cases"]
VOCABULARY = 50


def draw(
    position: int = 0, *, tally: dict[int, int] | None = None, mask: Any = None, fresh: bool = False, **options: Any
) -> Draw:
    request = GenerateRequest(model="m", prompt="p", **options)
    return Draw(request, float(uniforms(request.seed, position, 1)[0]), tally or {}, mask, fresh)


def logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / "sampling.npz"))


def test_every_processor_and_their_order_are_those_of_transformers(golden: dict[str, np.ndarray]) -> None:
    """All cases in one batch: each row by its own parameters."""
    tally = dict.fromkeys(GOLDEN["prompt"], 0)
    rows = golden["logits"].reshape(-1, golden["logits"].shape[-1])
    draws = [draw(tally=tally, **case) for case in CASES for _ in range(golden["logits"].shape[1])]
    made = sampling_batch(draws, rows.shape[-1])
    assert made.random is not None
    found = np.array(warp(process(mx.array(rows), made), made.random))
    wanted = golden["scores"].reshape(rows.shape)
    # What is e^87 times less likely than the best is zero in float32.
    wanted = np.where(wanted < wanted.max(axis=-1, keepdims=True) - 87, -np.inf, wanted)
    assert np.array_equal(np.isinf(found), np.isinf(wanted))
    kept = np.isfinite(wanted)
    np.testing.assert_allclose(found[kept], wanted[kept], rtol=2e-6, atol=1e-6)


def test_the_token_drawn_is_where_the_uniform_number_falls(golden: dict[str, np.ndarray]) -> None:
    """Inverse CDF over transformers' scores, in the order of the vocabulary; float32 may miss by one at a border."""
    tally = dict.fromkeys(GOLDEN["prompt"], 0)
    for number, case in enumerate(CASES):
        rows, scores = golden["logits"][number], golden["scores"][number].astype(np.float64)
        draws = [draw(index, tally=tally, seed=11, **case) for index in range(len(rows))]
        for one, row, pick in zip(draws, scores, sample(mx.array(rows), draws), strict=True):
            probability = np.exp(row - row.max())
            probability /= probability.sum()
            edges = np.cumsum(probability)
            if np.abs(edges - one.uniform).min() > 1e-5:
                assert pick.token_id == int(np.searchsorted(edges, one.uniform, side="right")), case
                assert pick.probability == pytest.approx(probability[pick.token_id], rel=1e-3)


def test_presence_counts_a_token_once_and_frequency_as_often_as_it_came() -> None:
    row = np.zeros((1, 8), dtype=np.float32)
    tally = {1: 0, 2: 1, 3: 4}  # 1 is of the prompt alone
    made = sampling_batch([draw(tally=tally, presence_penalty=0.5, frequency_penalty=0.25)], 8)
    found = np.array(process(mx.array(row), made))[0]
    assert found.tolist() == [0, 0, -0.75, -1.5, 0, 0, 0, 0]


def test_a_token_that_the_host_has_not_seen_yet_is_counted_too() -> None:
    rows = logits(3, vocabulary=16)
    options: dict[str, Any] = {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    known = [draw(tally={1: 0, 4: 2}, fresh=True, **options), draw(tally={7: 1}, fresh=True, **options), draw()]
    later = [draw(tally={1: 0, 4: 3}, **options), draw(tally={7: 1, 9: 1}, **options), draw()]
    last = mx.array([4, 9, 5])
    found = process(mx.array(rows), sampling_batch(known, 16), last)
    assert np.allclose(np.array(found), np.array(process(mx.array(rows), sampling_batch(later, 16))))


def test_a_repeated_token_is_made_less_likely_with_either_sign_of_its_logit() -> None:
    row = np.array([[2.0, -2.0, 1.0, -1.0]], dtype=np.float32)
    made = sampling_batch([draw(tally={0: 3, 1: 3}, repetition_penalty=2.0)], 4)
    assert np.array(process(mx.array(row), made))[0].tolist() == [1.0, -4.0, 1.0, -1.0]


def test_a_mask_leaves_only_what_a_grammar_allows() -> None:
    rows = logits(3)
    allowed = [3, 31, 32, 49]
    mask = np.zeros(2, dtype=np.int32)
    for token in allowed:
        mask[token // 32] |= np.uint32(1 << token % 32).astype(np.int32)
    found = sample(mx.array(rows), [draw(mask=mask), draw(seed=1, temperature=5.0, mask=mask), draw()])
    assert found[0].token_id == allowed[int(rows[0, allowed].argmax())]
    assert found[1].token_id in allowed
    assert found[2].token_id == int(rows[2].argmax())


def test_alternatives_are_the_raw_models_best_in_order() -> None:
    rows = logits(2)
    first, second = sample(mx.array(rows), [draw(top_logprobs=5, temperature=3.0, seed=4), draw()])
    order = np.argsort(-rows[0])[:5]
    total = np.log(np.exp(rows[0].astype(np.float64)).sum())
    assert [token for token, _ in first.alternatives] == order.tolist()
    assert [logprob for _, logprob in first.alternatives] == pytest.approx(rows[0][order] - total, abs=1e-5)
    assert second.alternatives == ()


def test_columns_are_padded_with_rows_that_are_greedy() -> None:
    rows = logits(4)
    draws = [draw(seed=1, temperature=1.0, top_k=5, repetition_penalty=1.1, tally={4: 1}, logit_bias={3: 1.0})]
    made = sampling_batch(draws, VOCABULARY, 4)
    arrays: list[mx.array] = []
    flatten(made, arrays, [])
    assert {array.shape[0] for array in arrays} == {4}
    assert np.allclose(np.array(process(mx.array(rows), made))[1:], rows[1:])


def test_a_penalty_on_a_token_that_the_model_does_not_have_touches_nothing() -> None:
    made = sampling_batch(
        [draw(seed=1, repetition_penalty=1.1, tally={4: 1, VOCABULARY: 3, VOCABULARY + 10: 1})], VOCABULARY
    )
    assert made.penalties is not None
    assert int(np.array(made.penalties.seen_ids).max()) == 4
    assert float(np.array(made.penalties.counts).sum()) == 1.0


def test_a_bias_on_a_token_that_the_model_does_not_have_touches_nothing() -> None:
    made = sampling_batch([draw(logit_bias={4: 2.0, VOCABULARY: 3.0, VOCABULARY + 10: 1.0})], VOCABULARY)
    assert made.bias is not None
    assert int(np.array(made.bias.ids).max()) == 4
    assert float(np.array(made.bias.values).sum()) == 2.0


def test_a_row_draws_its_numbers_beyond_the_first_block() -> None:
    numbers = Uniforms(3, 1)
    assert [numbers(position) for position in range(200)] == uniforms(3, 0, 200, 1).tolist()
    assert numbers(5) == uniforms(3, 5, 1, 1)[0]


def test_greedy_takes_the_best_and_says_so() -> None:
    rows = logits(8)
    for row, pick in zip(rows, sample(mx.array(rows), [draw()] * 8), strict=True):
        assert pick.token_id == int(row.argmax())
        assert pick.probability == 1.0


def test_logit_and_logprob_are_the_raw_models_at_every_temperature() -> None:
    rows = logits(8)
    draws = [draw(temperature=5.0, top_k=3, seed=seed) for seed in range(8)]
    for row, pick in zip(rows, sample(mx.array(rows), draws), strict=True):
        assert pick.logit == row[pick.token_id]
        wanted = row[pick.token_id] - np.log(np.exp(row.astype(np.float64)).sum())
        assert pick.logprob == pytest.approx(wanted, abs=1e-5)


def test_a_logprob_is_the_raw_models_where_logits_are_changed() -> None:
    rows = logits(3)
    mask = np.array([0b11110, 0], dtype=np.int32)
    asked: dict[str, Any] = {"logit_bias": {7: 30.0}, "repetition_penalty": 1.8, "presence_penalty": 2.0}
    draws = [draw(**asked, tally={7: 1, 8: 2}), draw(temperature=2.0, seed=3, **asked), draw(mask=mask)]
    for row, pick in zip(rows, sample(mx.array(rows), draws), strict=True):
        wanted = row[pick.token_id] - np.log(np.exp(row.astype(np.float64)).sum())
        assert pick.logprob == pytest.approx(wanted, abs=1e-5)


def test_a_row_is_the_same_alone_and_in_any_batch() -> None:
    rows = logits(len(CASES) + 1)
    draws = [draw(position, seed=5, **options) for position, options in enumerate(CASES)] + [draw(3)]
    together = sample(mx.array(rows), draws)
    alone = [sample(mx.array(row[None]), [one])[0] for row, one in zip(rows, draws, strict=True)]
    order = np.random.default_rng(1).permutation(len(draws))
    shuffled = sample(mx.array(rows[order]), [draws[index] for index in order])
    for index, pick in enumerate(together):
        other = shuffled[int(np.flatnonzero(order == index)[0])]
        assert pick.token_id == alone[index].token_id == other.token_id
        assert pick.logprob == pytest.approx(alone[index].logprob, abs=1e-6)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.95, 0.9999])
def test_a_nucleus_is_what_lies_before_its_share_in_order(spread: float, top_p: float) -> None:
    """As sorting says it, for flat and steep distributions, with a grammar's mask too."""
    logits = np.random.default_rng(5).normal(0, spread, (4, 3000)).astype(np.float32)
    logits[1, ::3] = -np.inf
    draws = [draw(top_p=top_p, temperature=0.7)] * 4
    random = sampling_batch(draws, 3000).random
    assert random is not None
    kept = np.array(warp(mx.array(logits), random)) > -np.inf
    for row in range(4):
        order = np.argsort(-logits[row], kind="stable")
        weights = np.exp((logits[row, order].astype(np.float64) - logits[row].max()) / 0.7)
        mass = np.cumsum(weights) / weights.sum()
        count = int(kept[row].sum())
        assert kept[row, order[:count]].all(), "the likeliest ones"
        # As far as sums in float32 are exact.
        assert mass[count - 1] >= top_p - 5e-6
        assert count == 1 or mass[count - 2] < top_p + 5e-6


def test_scores_that_are_alike_at_the_border_of_a_nucleus_are_kept_together_and_none_below_them() -> None:
    scores = mx.array([[4.0, 3.0, 3.0, 2.0, 1.0] + [-30.0] * 59])
    random = sampling_batch([draw(top_p=0.6, temperature=1.0)], 64).random
    assert random is not None
    assert (np.array(warp(scores, random)) > -np.inf).nonzero()[1].tolist() == [0, 1, 2]


def test_top_p_alone_next_to_top_k_puts_no_whole_vocabulary_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast(mx.zeros(1)):
        pytest.skip("where nothing fuses it is sorted")
    logits = mx.array(np.random.default_rng(6).normal(0, 2, (3, 4000)).astype(np.float32))
    rows = [draw(top_p=0.9, temperature=1.0), draw(top_p=0.9, top_k=40, temperature=1.0), draw(temperature=1.0)]
    sorted_widths: list[int] = []
    plain = mx.sort

    def noting(x: mx.array, axis: int) -> mx.array:
        sorted_widths.append(x.shape[-1])
        return plain(x, axis=axis)

    monkeypatch.setattr(mx, "sort", noting)
    together = sample(logits, rows)
    assert sorted_widths == [64]
    assert together == [sample(logits[row : row + 1], [rows[row]])[0] for row in range(3)]


def test_a_number_depends_on_seed_and_position_alone() -> None:
    block = uniforms(3, 0, 20)
    assert block.tolist() == [float(uniforms(3, position, 1)[0]) for position in range(20)]
    others = {value for seed in range(20) for completion in range(2) for value in uniforms(seed, 0, 20, completion)}
    assert len(others) == 800
    assert all(0 <= value < 1 for value in others)


def test_a_number_is_the_first_that_numpys_philox_draws_at_that_position() -> None:
    bits = np.random.Philox(key=5, counter=9)
    assert float(uniforms(5, 0, 10)[9]) == np.random.Generator(bits).random()


def test_the_largest_seed_and_position_can_be_drawn() -> None:
    assert 0 <= uniforms(2**63 - 1, 32_767, 1, 15)[0] < 1


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
        ({"min_p": 0.25}, [0.4 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.1 / 0.95, 0]),
        ({"logit_bias": {4: float(np.log(8))}}, [0.4 / 1.35, 0.3 / 1.35, 0.15 / 1.35, 0.1 / 1.35, 0.4 / 1.35]),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(options: dict[str, Any], wanted: list[float]) -> None:
    probabilities = np.array([0.4, 0.3, 0.15, 0.1, 0.05], dtype=np.float32)
    rows = np.tile(np.log(probabilities), (4000, 1))
    picks = sample(mx.array(rows), [draw(index, seed=17, temperature=1.0, **options) for index in range(4000)])
    never = [index for index, share in enumerate(wanted) if share == 0]
    assert not {pick.token_id for pick in picks} & set(never)
    assert chi_square(picks, np.array(wanted)) < 23.5  # 4 degrees of freedom: one in 10,000


def test_tokens_that_cannot_be_are_never_drawn() -> None:
    row = np.full((1, 8), -np.inf, dtype=np.float32)
    row[0, [2, 5]] = 0.0
    picks = [sample(mx.array(row), [draw(index, temperature=10.0, seed=2)])[0] for index in range(50)]
    assert {pick.token_id for pick in picks} == {2, 5}


def test_the_lowest_temperature_is_greedy() -> None:
    rows = logits(2)
    picks = sample(mx.array(rows), [draw(temperature=1e-6), draw(temperature=1.0, top_k=1)])
    assert [pick.token_id for pick in picks] == rows.argmax(axis=-1).tolist()
    assert [pick.probability for pick in picks] == [1.0, 1.0]


BOUNDS: dict[str, list[float]] = {
    "temperature": [1e-6, 10.0],
    "top_p": [1e-9, 1.0],
    "min_p": [0.0, 1e-6, 1.0],
    "repetition_penalty": [0.01, 10.0],
    "presence_penalty": [-100.0, 100.0],
    "frequency_penalty": [-100.0, 1e-6, 100.0],
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e4])
def test_probabilities_are_finite_at_all_bounds(dtype: mx.Dtype, scale: float) -> None:
    """Every combination, with a tally as long as an answer may be, on logits from small to absurd."""
    bounds = itertools.product(*BOUNDS.values())
    options: list[dict[str, Any]] = [dict(zip(BOUNDS, values, strict=True)) for values in bounds]
    tally = {1: 0, 2: 1, 3: 32_768, 4: 32_768}
    draws = [draw(index, tally=tally, top_k=index % 3, **one) for index, one in enumerate(options)]
    rows = mx.array(np.clip(logits(len(draws)) * scale / 3, -6e4, 6e4)).astype(dtype)
    for one, pick in zip(options, sample(rows, draws), strict=True):
        assert math.isfinite(pick.logit), one
        assert math.isfinite(pick.logprob), one
        assert 0.0 < pick.probability <= 1.0 + 1e-6, one


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_logit_that_is_not_finite_marks_its_own_row_alone(bad: float, dtype: mx.Dtype) -> None:
    """Also where it is not the one that is chosen, and every comparison with it is false."""
    rows = logits(4)
    rows[1, 7] = rows[2, :] = bad
    asked: list[dict[str, Any]] = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}]
    for options in [*asked, {"temperature": 1.0, "top_p": 0.5}]:
        picks = sample(mx.array(rows).astype(dtype), [draw(seed=3, **options)] * 4)
        assert [math.isfinite(pick.logit) for pick in picks] == [True, False, False, True]
        assert all(0 <= pick.token_id < VOCABULARY for pick in picks)
        alone = sample(mx.array(rows[[0, 3]]).astype(dtype), [draw(seed=3, **options)] * 2)
        assert [picks[0].token_id, picks[3].token_id] == [pick.token_id for pick in alone]


def test_logits_beyond_the_tokenizer_are_never_allowed_under_a_grammar() -> None:
    """A head may be padded to a round number: a mask is as long as the tokenizer, and says nothing of the rest."""
    rows = logits(2, vocabulary=128)
    rows[:, 100:] = 50.0
    mask = np.array([0b1110], dtype=np.int32)  # 32 tokens, of which three are allowed
    picks = sample(mx.array(rows), [draw(mask=mask), draw(seed=2, temperature=5.0, mask=mask)])
    assert {pick.token_id for pick in picks} <= {1, 2, 3}
    made = np.array(sampling_batch([draw(mask=mask), draw()], 128).mask).view(np.uint32)
    assert made.tolist() == [[0b1110, 0, 0, 0], [2**32 - 1] * 4]


def test_rows_of_padding_pick_nothing() -> None:
    for alternatives in (0, 2):
        assert len(sample(mx.array(logits(4)), [draw(top_logprobs=alternatives), draw()])) == 2

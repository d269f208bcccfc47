"""`sample` at what is hard for it, on the emulator: every draw within the rule of `kernels/sample/rule.py`."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kernels.backend import using
from kernels.check import check_hard, run_case
from kernels.emulator.observe import observing
from kernels.kernel import DTYPES, Case
from kernels.sample import KERNEL, SampleInput
from kernels.sample.hard import LARGE, VOCABULARIES, call, of_vocabulary, patterns, settings
from kernels.sample.rule import Floats, Setting, cuts, errors

IDS = [str(dtype).rpartition(".")[2] for dtype in DTYPES]


def _failures(cases: list[Case], dtype: mx.Dtype) -> list[str]:
    found = [(case.label, run_case(KERNEL, case, "emulator", 1)) for case in cases]
    return [f"{label}: {error}" for label, error in found if not error <= KERNEL.tolerances[dtype]]


def _run(arguments: tuple[object, ...], *, checked: bool = True) -> list[mx.array]:
    with using("emulator"), observing(checked=checked):
        return KERNEL(*arguments)


@pytest.mark.parametrize("score", [2.9, 0.11, -1e-6, 0.0, -7.03])
def test_a_nucleus_of_more_equal_scores_than_a_window_holds_ends_with_one_of_them(score: float) -> None:
    """The mass that was wanted came to more than the finer sums, each rounded by itself: no part had it, and the
    search in none of 0 scores never ended on a GPU."""
    rows = [Setting(top_p=float(np.float32(p)), uniform=0.7) for p in (0.9999, 0.99999, 0.999999, 1 - 2.0**-24)]
    arguments = call(np.full(1200, score, np.float32), rows, mx.float32)
    made = _run(arguments)
    assert max(errors(arguments, made)) <= KERNEL.tolerances[mx.float32]
    assert made[0].tolist() == [840] * len(rows)


def test_the_draw_that_never_ended_on_two_gpus_ends() -> None:
    """Normal logits of 151,936 tokens in bfloat16, temperature 0.8, `top_p` at the sum of each bin of 1/8: where the
    sums of bins and of their parts disagreed."""
    logits = np.random.default_rng(1).standard_normal(151_936).astype(np.float32)
    scores = np.array(mx.array(logits).astype(mx.bfloat16).astype(mx.float32)) / np.float32(0.8)
    weights = np.exp(scores.astype(np.float64) - scores.max())
    bins = np.floor(scores * 8)
    rows = []
    for low in np.unique(bins)[8:24:8]:
        at = np.float32(weights[bins >= low].sum() / weights.sum())
        rows += [
            Setting(0.8, 0, float(p)) for p in (np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(2)))
        ]
    arguments = call(logits, rows, mx.bfloat16)
    assert max(errors(arguments, _run(arguments))) <= KERNEL.tolerances[mx.bfloat16]


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "step"),
    [
        (mx.float32, 2, 3),
        (mx.float16, 33, 3),
        pytest.param(mx.float32, 1300, 4, marks=pytest.mark.slow),
        (mx.bfloat16, 4097, 9),
        pytest.param(mx.bfloat16, 262_144, 60, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value).rpartition(".")[2],
)
def test_hard_inputs_are_drawn_by_the_rule(dtype: mx.Dtype, vocabulary: int, step: int) -> None:
    assert _failures([*of_vocabulary(dtype, np.random.default_rng(1), vocabulary, step)], dtype) == []


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [*VOCABULARIES, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_every_hard_input_is_drawn_by_the_rule(dtype: mx.Dtype, vocabulary: int) -> None:
    step = 5 if vocabulary in LARGE else 1
    assert _failures([*of_vocabulary(dtype, np.random.default_rng(1), vocabulary, step)], dtype) == []


def _random_rows(random: np.random.Generator, rows: int, vocabulary: int, dtype: mx.Dtype) -> SampleInput:
    """Arguments of `rows` draws, each row of its own pattern, scale and setting."""
    logits: list[Floats] = []
    chosen: list[Setting] = []
    ways = [*settings(vocabulary)]
    while len(logits) < rows:
        for _, row in patterns(random, vocabulary):
            scale = np.float32(2.0 ** random.integers(-2, 2))
            logits.append(np.asarray(row, np.float32) * scale)
            way = ways[random.integers(len(ways))]
            top_p = float(np.float32(random.random())) if way.top_p < 1.0 and random.random() < 0.8 else way.top_p
            chosen.append(way._replace(top_p=top_p, uniform=float(np.float32(random.random() * (1 - 2.0**-24)))))
    return call(np.stack(logits[:rows]), chosen[:rows], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_hundred_thousand_draws_follow_the_rule(dtype: mx.Dtype, seed: int) -> None:
    """All of them together, each row with a pattern, a scale and parameters of its own."""
    random = np.random.default_rng(seed)
    for rows, vocabulary in ((2000, 40), (1500, 300), (700, 1300)):
        arguments = _random_rows(random, rows, vocabulary, dtype)
        found = errors(arguments, _run(arguments, checked=False))
        worst = int(np.argmax(found))
        assert found[worst] <= KERNEL.tolerances[dtype], (
            vocabulary,
            worst,
            [a[worst].tolist() for a in arguments[1:7]],
        )


def test_a_number_of_one_draws_the_last_token_that_is_kept() -> None:
    arguments = call(np.zeros(1300, np.float32), [Setting(uniform=1.0), Setting(uniform=0.0)], mx.float32)
    assert _run(arguments)[0].tolist() == [1299, 0]


def test_a_row_without_any_score_takes_token_0_with_probability_0_and_hurts_no_other() -> None:
    logits = np.stack([np.full(600, np.nan), np.zeros(600), np.full(600, -np.inf)]).astype(np.float32)
    token, _, logprob, probability = _run(call(logits, [Setting(uniform=0.999)] * 3, mx.float32))
    assert token.tolist() == [0, 599, 0]
    assert probability.tolist() == [0.0, pytest.approx(1 / 600), 0.0]
    assert np.isfinite(np.array(logprob)).all()


def test_a_chunk_whose_tokens_are_all_too_faint_is_not_drawn_from() -> None:
    """Together they still weigh something, and a number of 0 takes the first chunk that does."""
    logits = np.where(np.arange(1100) < 600, -87.2, 0.0)
    logits[600:] = [0.0, *[-87.2] * 499]
    token, *_, probability = _run(call(logits, [Setting(uniform=0.0)], mx.float32))
    assert (token.tolist(), probability.tolist()) == ([600], [1.0])


def test_top_k_is_exact_however_faint_the_kth_is() -> None:
    """The first token that is kept, under the best by forty: only the last bin, which has no lower edge, reaches it."""
    logits = np.append(np.linspace(-1, 0, 2999), 40.0)
    token, *_ = _run(call(logits, [Setting(top_k=k, uniform=0.0) for k in (1, 2, 3, 1500)], mx.float32))
    assert token.tolist() == [2999, 2998, 2997, 1500]


def test_the_reference_keeps_to_the_rule_too() -> None:
    for vocabulary in VOCABULARIES[:6]:
        for name, logits in patterns(np.random.default_rng(2), vocabulary):
            rows = [Setting(0.8, 50, 0.9, 0.01), Setting(top_p=0.5), Setting(float("nan")), Setting(uniform=1.0)]
            arguments = call(logits, rows, mx.float32)
            assert max(errors(arguments, KERNEL.reference(*arguments))) <= 1e-4, (vocabulary, name)


def test_the_rule_lets_no_more_pass_than_it_says() -> None:
    """Of 1,000 equal steps a cut one token away is refused, as are a wrong token, number and probability."""
    scores = np.linspace(0, -1, 1000).astype(np.float32)
    assert cuts(scores, Setting(top_k=10)) == (scores[9], scores[9])
    tightest, loosest = cuts(scores, Setting(top_p=0.5))
    assert tightest == loosest
    arguments = call(scores, [Setting(top_p=0.5)], mx.float32)
    token, *rest = KERNEL.reference(*arguments)
    assert max(errors(arguments, [token, *rest])) < 1e-5
    assert max(errors(arguments, [token + 1, *rest])) > 1e-3
    assert max(errors(arguments, [*[token, *rest][:3], rest[2] * 1.0001])) > 2e-5


def test_a_hard_case_is_named_before_it_runs_and_judged_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """On a device that does not come back from a case the last line says which it was."""
    arguments = call(np.zeros(1300, np.float32), [Setting(), Setting(top_k=3)], mx.float32)
    refused = (arguments[0], arguments[1].astype(mx.float16), *arguments[2:])

    def two(_: mx.Dtype, __: np.random.Generator) -> list[Case]:
        return [Case("all equal", arguments), Case("not taken", refused)]

    kernel = replace(KERNEL, hard=two)
    results = check_hard(kernel, mx.float32, "emulator")
    first = next(results)
    assert (first.passed, first.shapes, first.detail) == (True, 2, "all equal")
    assert capsys.readouterr().out.split(maxsplit=2)[2].strip() == "all equal"
    (second,) = results
    assert not second.passed
    assert "not taken: the kernel does not take a shape that it says it takes" in second.detail
    assert list(check_hard(replace(KERNEL, hard=None), mx.float32, "emulator")) == []

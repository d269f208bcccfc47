"""Ranks that share a run: who does what, and that together they make what one makes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.training.ranks import ALONE, Ranks, as_floats, from_floats, of_rank_0, part_of, share_of, text_of_rank_0
from engine.training.trainer import Trainer
from tests.engine import ringed, tiny
from tests.engine.test_training import examples
from tests.engine.training_child import open_run

Reports = list[dict[str, Any]]


def rank(number: int, size: int) -> Ranks:
    return cast(Ranks, SimpleNamespace(rank=number, size=size))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 4, 7])
def test_each_micro_batch_of_a_step_is_one_ranks_or_dealt_out_to_all(size: int, accumulation: int) -> None:
    for begun in range(accumulation):
        micro, whole, dealt = accumulation + begun, Counter[int](), Counter[int]()
        while True:
            shares = [share_of(micro, accumulation, rank(number, size)) for number in range(size)]
            for share in shares:
                (whole if share.whole else dealt)[share.micro] += 1
            (micro,) = {share.after for share in shares}
            if micro % accumulation == 0:
                break
        done = [*whole.elements(), *dealt]
        assert sorted(done) == list(range(accumulation + begun, 2 * accumulation))
        assert set(dealt.values()) <= {size}
        assert len(dealt) < max(2, size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_the_examples_that_are_dealt_out_are_each_one_ranks_and_as_many_for_all(size: int, count: int) -> None:
    rows = list(range(count))
    parts = [rows[part_of(count, rank(number, size))] for number in range(size)]
    assert [*chain.from_iterable(parts)] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_counts_survive_the_sum_of_float32_numbers() -> None:
    own = [as_floats(0.5, count, 2**33 + count) for count in (2**24 + 1, 3, 4095)]
    loss, counts = from_floats(np.array(own[0] + own[1] + own[2]).tolist())
    assert (loss, counts) == (1.5, [2**24 + 4099, 3 * 2**33 + 2**24 + 4099])


def test_what_rank_0_gives_is_the_same_bit_for_bit() -> None:
    given = mx.array([-0.0, 1e-45, float("inf"), 3.0])
    assert np.array(of_rank_0(ALONE, given)).tobytes() == np.array(given).tobytes()
    assert text_of_rank_0(ALONE, "é…") == "é…"


def test_the_part_of_a_rank_drops_the_inputs_that_the_whole_batch_drops(model: LoadedModel) -> None:
    """The gradients of the parts are together that of the whole."""
    found = examples(model)[:3]
    asked = tiny.asking(steps=1, batch_size=3, dropout=0.4)

    class Part(SimpleNamespace):
        size, sums = 3, 0

        def sum(self, array: mx.array) -> mx.array:
            return array

    def gradient(ranks: Any) -> tuple[np.ndarray, int, int]:
        trainer = Trainer(model.decoder, asked, found, ranks=ranks)
        next(trainer.run())
        state = trainer.state
        assert state.gradient is not None
        return np.array(state.gradient), state.targets, state.tokens

    whole = Trainer(model.decoder, tiny.asking(steps=1, batch_size=3, dropout=0.4, accumulation=2), found)
    next(whole.run())
    assert whole.state.gradient is not None
    gradients, targets, tokens = zip(*(gradient(Part(rank=number)) for number in range(3)), strict=True)
    assert np.abs(sum(gradients) - np.array(whole.state.gradient)).max() < 1e-5
    assert (sum(targets), sum(tokens)) == (whole.state.targets, whole.state.tokens)


def test_a_rank_without_examples_idles_and_a_state_within_a_step_is_that_of_its_beginning(model: LoadedModel) -> None:
    ranks: Any = SimpleNamespace(rank=0, size=2, sum=lambda array: array)
    trainer = Trainer(model.decoder, tiny.asking(steps=2, batch_size=1), examples(model)[:2], ranks=ranks)
    began = trainer.state
    turns = trainer.run()
    next(turns)
    assert (trainer.state.micro, trainer.state.gradient) == (1, None)
    assert trainer.resumable() is began
    assert trainer.witness == ""


MANY: dict[str, dict[str, Any]] = {
    "dealt": {"dropout": 0.2, "seed": 3},
    "mixed": {"dropout": 0.2, "accumulation": 4, "label_smoothing": 0.1},
    "idle": {"batch_size": 1, "accumulation": 4},
    "dora": {"dora": True, "gradient_checkpointing": True, "schedule": "cosine", "warmup_steps": 2},
}
COMMON = {"steps": 5, "batch_size": 3, "checkpoint_every": 2, "learning_rate": 5e-3, "held_out": 0.2, "eval_every": 2}


def ringed_runs(home: Path, ranks: int, cases: list[tuple[str, dict[str, Any], int]]) -> list[Reports]:
    said = ringed.run(home, ranks, "tests.engine.rank_child", str(home), json.dumps(cases))
    return list(json.loads(said))


def alone(home: Path, options: dict[str, Any]) -> Reports:
    run, found = open_run(home, options), Reports()
    while not run.finished:
        report = run.advance()
        found += [] if report is None else [report.model_dump()]
    return found


def same(found: Reports, wanted: Reports) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("loss", "held_out_loss", "gradient_norm"):
            assert (ours[name] or 0.0) == pytest.approx(theirs[name] or 0.0, rel=1e-5, abs=1e-5), name
        for name in ("index", "step", "tokens", "epoch", "learning_rate", "last"):
            assert ours[name] == theirs[name]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_make_what_one_makes_and_go_on_with_each_others_checkpoints(tmp_path: Path) -> None:
    wanted = {name: alone(tmp_path / "alone" / name, {**COMMON, **options}) for name, options in MANY.items()}
    cases: list[tuple[str, dict[str, Any], int]] = [(name, {**COMMON, **options}, 0) for name, options in MANY.items()]
    for ranks in (2, 3):
        for (name, _, _), found in zip(cases, ringed_runs(tmp_path / str(ranks), ranks, cases), strict=True):
            same(found, wanted[name])
    # Paused by one in the middle of a step, then by three, then by two; and it ends on one.
    options, home = {**COMMON, **MANY["mixed"]}, tmp_path / "moved"
    first = open_run(home / "moved", options)
    for _ in range(6):
        first.advance()
    first.pause()
    (home / "moved" / "run").rename(home / "case")
    for ranks, turns in ((3, 5), (2, 7)):
        ringed_runs(home, ranks, [("case", options, turns)])
    (home / "case").rename(home / "moved" / "run")
    last = open_run(home / "moved", options)
    found = [report.model_dump() for report in last.reported]
    assert found
    while not last.finished:
        report = last.advance()
        found += [] if report is None else [report.model_dump()]
    same(found, wanted["mixed"])

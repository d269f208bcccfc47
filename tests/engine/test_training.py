"""Training: the same numbers as torch, a base that stays as it was, and what each option means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.flat import Matrices
from engine.adapters.lora import LoraConfig, LoraWeights, TrainableLora
from engine.checkpoints.loading import LoadedModel
from engine.models.decoder import DecoderBlock
from engine.models.llama import Llama
from engine.training import objective
from engine.training import trainer as trainer_module
from engine.training.data import TokenizedExample, tokenize
from engine.training.objective import Objective
from engine.training.optimizer import Moments
from engine.training.state import TrainState
from engine.training.trainer import Trainer
from stoker.contract import TrainReport
from stoker.contract.dataset import Example
from stoker.errors import JobFailed
from tests.engine import tiny

GOLDENS = Path(__file__).parents[1] / "goldens"
RUN = json.loads((GOLDENS / "tiny_lora.json").read_text())


def golden_matrices(golden: Any, when: str) -> dict[str, dict[str, np.ndarray]]:
    """By our names: PEFT's and transformers' have `model.` before them where ours may not."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key in golden.files:
        if key.startswith(f"{when}."):
            name, side = key.removeprefix(f"{when}.").rsplit(".", 1)
            found.setdefault(name, {})[side] = golden[key]
    return found


def ours(name: str, model: LoadedModel) -> str:
    return name if name in model.linear_shapes else name.removeprefix("model.")


class Given:
    """Batches that a test has written down."""

    def __init__(self, batches: Sequence[Sequence[TokenizedExample]]) -> None:
        self._batches, self.an_epoch = batches, len(batches)

    def examples(self, number: int) -> list[TokenizedExample]:
        return list(self._batches[number])


def test_a_run_makes_torchs_losses_norms_and_matrices(
    monkeypatch: pytest.MonkeyPatch, golden_model: LoadedModel
) -> None:
    golden = np.load(GOLDENS / "tiny_lora.npz")
    config = LoraConfig(RUN["rank"], RUN["alpha"], tuple(RUN["targets"]))
    start = {
        ours(name, golden_model): {
            "a": mx.array(pair["a"]),
            "b": mx.zeros((RUN["rank"], golden[f"end.{name}.b"].shape[1])),
        }
        for name, pair in golden_matrices(golden, "start").items()
    }
    rows = [[example(row["tokens"], row["start"]) for row in batch] for batch in RUN["batches"]]
    monkeypatch.setattr(trainer_module, "initialise", lambda *_: LoraWeights(config, start))
    monkeypatch.setattr(trainer_module, "Batches", lambda *_: Given(rows))
    names = ("rank", "alpha", "targets", "learning_rate", "warmup_steps", "weight_decay", "clip")
    asked = tiny.asking(**{name: RUN[name] for name in names}, steps=len(rows), batch_size=3)

    probe = mx.array([RUN["probe"]])
    before = golden_model.decoder.logits(golden_model.decoder(probe))[0]
    assert np.abs(np.array(before) - golden["logits_before"]).max() < 1e-4
    reports, weights = finish(Trainer(golden_model.decoder, asked, rows[0]))
    for report, wanted in zip(reports, RUN["reports"], strict=True):
        assert report.loss == pytest.approx(wanted["loss"], abs=2e-4)
        assert report.gradient_norm == pytest.approx(wanted["gradient_norm"], rel=1e-3)
        assert report.learning_rate == pytest.approx(wanted["learning_rate"])
    for name, pair in golden_matrices(golden, "end").items():
        for side in "ab":
            found = np.array(weights.matrices[ours(name, golden_model)][side])
            assert np.abs(found - pair[side]).max() < 1e-3, f"{name}.{side}"
    after = golden_model.decoder.logits(golden_model.decoder(probe, adapters=tiny.trainable(golden_model, weights)))[0]
    assert np.abs(np.array(after) - golden["logits_after"]).max() < 2e-4


def example(tokens: Sequence[int], start: int) -> TokenizedExample:
    """One whose `tokens[start:]` count."""
    return TokenizedExample.of([(tokens[:start], False), (tokens[start:], True)])


def finish(trainer: Trainer) -> tuple[list[TrainReport], LoraWeights]:
    reports = [report for report in trainer.run() if report is not None]
    return reports, trainer.adapter()


def run(model: LoadedModel, found: Sequence[TokenizedExample], **options: Any) -> tuple[list[TrainReport], LoraWeights]:
    return finish(Trainer(model.decoder, tiny.asking(**options), found))


def examples(model: LoadedModel) -> list[TokenizedExample]:
    rows = [Example("t3 t4", "t5 t6 t7"), Example("", "t8 t9 t10 t11"), Example("t1", "t12")]
    return tokenize(rows, model.tokenizer, 64)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"dora": True}], ids=["LoRA", "dropout", "DoRA"])
def test_the_same_seed_makes_the_same_run_bit_for_bit(model: LoadedModel, options: dict[str, Any]) -> None:
    runs = [run(model, examples(model), steps=5, seed=seed, **options) for seed in (1, 1, 2)]
    losses = [[report.loss for report in reports] for reports, _ in runs]
    assert losses[0] == losses[1] != losses[2]
    for name, sides in runs[0][1].matrices.items():
        for side, array in sides.items():
            assert np.array_equal(np.array(array), np.array(runs[1][1].matrices[name][side]))


@pytest.mark.parametrize("dora", [False, True])
def test_training_leaves_the_base_as_it_was(model: LoadedModel, dora: bool) -> None:
    tokens = mx.array([[3, 1, 4, 1, 5]])
    before = np.array(model.decoder(tokens))
    reports, weights = run(model, examples(model), steps=5, learning_rate=1e-2, dora=dora)
    assert np.array_equal(np.array(model.decoder(tokens)), before)
    after = model.decoder(tokens, adapters=tiny.trainable(model, weights))
    assert np.abs(np.array(after) - before).max() > 1e-3
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert [report.index for report in reports] == [0, 1, 2, 3, 4]
    assert [report.is_last for report in reports] == [False] * 4 + [True]


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_has_learned_nothing_changes_nothing(model: LoadedModel, dora: bool) -> None:
    tokens = mx.array([[3, 1, 4, 1, 5]])
    fresh = Trainer(model.decoder, tiny.asking(dora=dora), examples(model)).adapter()
    found = model.decoder(tokens, adapters=tiny.trainable(model, fresh))
    assert np.abs(np.array(found) - np.array(model.decoder(tokens))).max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_a_run_learns_what_it_is_shown(model: LoadedModel, options: dict[str, Any]) -> None:
    reports, _ = run(model, examples(model), steps=40, batch_size=3, learning_rate=1e-2, rank=4, **options)
    assert reports[-1].loss < 0.3 * reports[0].loss


def test_accumulation_makes_the_steps_of_the_larger_batch(model: LoadedModel) -> None:
    """Its micro-batches hold 4, 5 and 2 targets: a mean of their means would be another step."""
    found = examples(model)
    whole = run(model, found, steps=4, batch_size=3, learning_rate=1e-2, dora=True)
    parts = run(model, found, steps=4, batch_size=1, accumulation=3, learning_rate=1e-2, dora=True)
    for one, other in zip(whole[0], parts[0], strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        assert one.tokens == other.tokens
    for name, sides in whole[1].matrices.items():
        for side, array in sides.items():
            assert np.abs(np.array(array) - np.array(parts[1].matrices[name][side])).max() < 1e-4, name


@pytest.mark.parametrize("dora", [False, True])
def test_gradient_checkpointing_changes_no_number(model: LoadedModel, dora: bool) -> None:
    options: dict[str, Any] = {"steps": 3, "dora": dora, "dropout": 0.2}
    plain, saving = (
        run(model, examples(model), **options, gradient_checkpointing=checkpointing) for checkpointing in (False, True)
    )
    assert [report.loss for report in plain[0]] == pytest.approx([report.loss for report in saving[0]], abs=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_the_matrices_of_a_run_come_in_what_the_model_computes_in(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, dora: bool
) -> None:
    """Both scaled by the root of the scale, except DoRA's, whose norms are in float32."""
    trainer = Trainer(model.decoder, tiny.asking(rank=2, alpha=8.0, dora=dora), examples(model))
    given: list[dict[str, mx.array]] = []

    class Noted(TrainableLora):
        def __init__(self, matrices: Matrices, scale: float, **options: Any) -> None:
            given.extend(matrices.values())
            assert scale == (4.0 if dora else 1.0)
            super().__init__(matrices, scale, **options)

    monkeypatch.setattr(objective, "TrainableLora", Noted)
    monkeypatch.setattr(type(model.decoder), "dtype", mx.bfloat16)
    ids = mx.array([[3, 4]], mx.int32)
    trainer.objective.held_out_loss(trainer.state.weights, ids, mx.array([0]), mx.array([4]), mx.array([1.0]))
    start = next(iter(trainer.adapter().matrices.values()))["a"]
    found = given[0]["a"]
    assert found.dtype == (mx.float32 if dora else mx.bfloat16)
    wanted = start if dora else (2.0 * start).astype(mx.bfloat16)
    assert np.array_equal(np.array(found.astype(mx.float32)), np.array(wanted.astype(mx.float32)))


def test_each_block_is_run_in_the_way_that_checkpointing_asks_for(model: LoadedModel) -> None:
    """The numbers are the same without it: what would not be saved is memory."""
    seen: list[DecoderBlock] = []

    def run_block(block: DecoderBlock, x: mx.array) -> mx.array:
        seen.append(block)
        return block(x, None, None)

    assert isinstance(model.decoder, Llama)
    tokens = mx.array([[1, 2, 3]])
    found = model.decoder(tokens, run_block=run_block)
    assert seen == model.decoder.layers
    assert mx.allclose(found, model.decoder(tokens), atol=1e-5)


def test_dropout_leaves_out_inputs_of_the_adapter_alone(model: LoadedModel) -> None:
    """B is zero before the first step, so that nothing can be seen of it there; in the second it can."""
    runs = [run(model, examples(model), steps=3, dropout=dropout, learning_rate=1e-2)[0] for dropout in (0.0, 0.5)]
    first, later = zip(*([reports[0].loss, reports[2].loss] for reports in runs), strict=True)
    assert first[0] == first[1]
    assert later[0] != later[1]


@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_each_micro_step_of_a_step_drops_other_inputs(model: LoadedModel, dropout: float) -> None:
    """On the same examples: without dropout each adds the same to the gradient."""
    trainer = Trainer(model.decoder, tiny.asking(accumulation=3, batch_size=1, dropout=dropout), examples(model)[:1])
    steps, sums = trainer.run(), [np.zeros(trainer.layout.size, np.float32)]
    for _ in range(2):
        assert next(steps) is None
        assert trainer.state.gradient is not None
        sums.append(np.array(trainer.state.gradient))
    first, second = sums[1], sums[2] - sums[1]
    assert np.abs(first).max() > 1e-3
    assert (np.abs(first - second).max() > 1e-3) == (dropout > 0)


@pytest.mark.parametrize(("dropout", "differ"), [(0.5, True), (0.0, False)])
def test_what_is_dropped_depends_on_the_seed_and_on_the_step(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, dropout: float, differ: bool
) -> None:
    """With the same start and the same batches for every seed, nothing else of a run does."""
    found = examples(model)
    start = tiny.adapter(model, 8, 0)
    monkeypatch.setattr(trainer_module, "initialise", lambda *_: start)
    monkeypatch.setattr(trainer_module, "Batches", lambda *_: Given([found] * 4))
    frozen: dict[str, Any] = {"steps": 2, "dropout": dropout, "learning_rate": 1e-9, "weight_decay": 0.0}
    losses = [
        [report.loss for report in run(model, found, seed=seed, targets=tiny.LAYERS, **frozen)[0]] for seed in (1, 2)
    ]
    assert (abs(losses[0][0] - losses[1][0]) > 1e-3) == differ, "seeds"
    assert (abs(losses[0][0] - losses[0][1]) > 1e-3) == differ, "steps"


def test_what_is_held_out_is_evaluated_as_it_will_be_used(model: LoadedModel) -> None:
    """Every example, also of a last batch that is not full; without dropout, without smoothing; by target."""
    rows = [example(range(3, 3 + length), 1) for length in (3, 6, 12)]
    asked = tiny.asking(steps=1, batch_size=2, eval_every=1, held_out=0.5, dropout=0.5, label_smoothing=0.3)
    trainer = Trainer(model.decoder, asked, examples(model), rows)
    reports, _ = finish(trainer)
    total = 0.0
    for row in rows:
        # `learning_rate` 0 is not allowed; this one moves no weight that float32 could show.
        still = tiny.asking(steps=1, batch_size=1, learning_rate=1e-12, weight_decay=0.0)
        alone = Trainer(model.decoder, still, [row])
        alone.state = replace(alone.state, weights=trainer.state.weights)
        total += finish(alone)[0][0].loss * (len(row) - 1)
    assert reports[0].held_out_loss == pytest.approx(total / (2 + 5 + 11), abs=1e-5)


def test_reports_count_steps_epochs_tokens_and_time(monkeypatch: pytest.MonkeyPatch, model: LoadedModel) -> None:
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    found = [example(range(3, 9), 2)] * 6
    trainer = Trainer(model.decoder, tiny.asking(steps=3, batch_size=2, accumulation=2), found)
    reports, _ = finish(trainer)
    assert [report.epoch for report in reports] == pytest.approx([2 / 3, 4 / 3, 2])
    assert [report.tokens for report in reports] == [20, 40, 60]
    assert [report.tokens_per_second for report in reports] == [10, 10, 10], (
        "of the step's own tokens, in its two seconds"
    )
    state = trainer.state
    assert (state.first_loss, state.last_loss) == (reports[0].loss, reports[-1].loss)


def test_the_guard_compares_with_the_last_steps_alone() -> None:
    state = TrainState(mx.zeros((1,)), Moments.zeros(1))
    for loss in range(20):
        state = state.stepped(state.weights, state.moments, float(loss), {"learning_rate": 1.0})
    assert state.recent == tuple(map(float, range(4, 20)))
    assert (state.step, state.first_loss, state.last_loss) == (20, 0.0, 19.0)


def test_what_is_held_out_is_evaluated_and_the_best_is_known(model: LoadedModel) -> None:
    found = examples(model)
    trainer = Trainer(model.decoder, tiny.asking(steps=5, eval_every=2, held_out=0.4), found[:2], found[2:])
    reports, _ = finish(trainer)
    losses = {report.step: report.held_out_loss for report in reports if report.held_out_loss is not None}
    assert list(losses) == [2, 4, 5]
    assert trainer.state.best_loss == min(losses.values())
    assert losses[trainer.state.best_step] == trainer.state.best_loss


def test_a_run_stops_early_when_what_is_held_out_gets_no_better(model: LoadedModel) -> None:
    found = examples(model)
    asked = tiny.asking(steps=50, eval_every=1, held_out=0.4, stop_after=2, learning_rate=0.5, spike=0.0)
    trainer = Trainer(model.decoder, asked, found[:2], found[2:])
    reports, _ = finish(trainer)
    assert len(reports) < 50
    assert [report.is_last for report in reports[-2:]] == [False, True]
    assert trainer.state.best_step == len(reports) - 2


class Diverging(Trainer):
    """Its losses are not numbers in the steps (from 1) that a test names; each counts once."""

    bad: list[int]

    def _micro_step(self) -> None:
        super()._micro_step()
        if self.bad and self.state.step + 1 == self.bad[0]:
            self.bad.pop(0)
            self.state = replace(self.state, loss_sum=float("nan"))


def test_a_run_that_diverges_goes_back_to_its_last_checkpoint_with_a_lower_rate(model: LoadedModel) -> None:
    trainer = Diverging(model.decoder, tiny.asking(steps=8, checkpoint_every=2), examples(model))
    trainer.bad = [6]
    reports, _ = finish(trainer)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert [report.index for report in reports] == list(range(10))
    assert reports[5].note.startswith("diverged at step 6: loss nan, gradient norm ")
    assert reports[5].note.endswith("; rolled back to step 4, learning rate times 0.5")
    rates = [report.learning_rate for report in reports]
    assert rates[:5] == [2e-4] * 5
    assert rates[5:] == [1e-4] * 5
    assert trainer.state.rollbacks == 1


def test_a_run_that_diverges_again_and_again_ends_and_says_what_to_do(model: LoadedModel) -> None:
    trainer = Diverging(model.decoder, tiny.asking(steps=8), examples(model))
    trainer.bad = [3, 3, 3]
    reports: list[TrainReport] = []
    with pytest.raises(JobFailed, match=r"diverged at step 3: loss nan.*rolled back 2 times.*Lower learning_rate"):
        reports.extend(report for report in trainer.run() if report)
    assert trainer.state.rate_factor == 0.25


class Overflowing(Objective):
    """What is held out has a loss that is no number in as many batches as a test says."""

    bad = 0

    def held_out_loss(self, weights: mx.array, inputs: mx.array, *wanted: mx.array) -> mx.array:
        loss = super().held_out_loss(weights, inputs, *wanted)
        if not self.bad:
            return loss
        self.bad -= 1
        return loss * float("nan")


def bad_batches(trainer: Trainer, count: int) -> None:
    assert isinstance(trainer.objective, Overflowing)
    trainer.objective.bad = count


@pytest.fixture
def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "Objective", Overflowing)


@pytest.mark.usefixtures("overflowing")
def test_a_step_whose_held_out_loss_is_no_number_is_one_that_diverges(model: LoadedModel) -> None:
    """It ended the run with an error of the report's. The next loss would have been none either."""
    found = examples(model)
    asked = tiny.asking(steps=4, eval_every=1, held_out=0.4, batch_size=4, checkpoint_every=2)
    trainer = Trainer(model.decoder, asked, found[:2], found[2:])
    reports: list[TrainReport] = []
    for report in trainer.run():
        if report:
            reports.append(report)
            bad_batches(trainer, int([report.step for report in reports] == [1, 2]))
    assert [(report.index, report.step) for report in reports] == list(enumerate([1, 2, 2, 3, 4]))
    assert reports[2].note == "diverged at step 3: held-out loss nan; rolled back to step 2, learning rate times 0.5"
    assert trainer.state.best_loss == min(report.held_out_loss for report in reports if report.held_out_loss)


@pytest.mark.usefixtures("overflowing")
def test_a_run_whose_held_out_loss_is_never_a_number_ends_and_says_so(model: LoadedModel) -> None:
    found = examples(model)
    trainer = Trainer(model.decoder, tiny.asking(held_out=0.4, batch_size=4), found[:2], found[2:])
    bad_batches(trainer, 3)
    with pytest.raises(JobFailed, match=r"diverged at step 3: held-out loss nan; it was rolled back 2 times before"):
        finish(trainer)

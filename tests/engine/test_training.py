"""Training: the same numbers as torch, a base that stays as it was, and runs that do not disturb each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.lora import LoraConfig, LoraWeights, TrainableLora
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.loading import LoadedModel
from engine.models.llama import Llama, LlamaArgs
from engine.ticket import Ticket
from engine.training import trainer
from engine.training.data import TokenizedExample, batches, collate, tokenize
from engine.training.lane import TrainLane
from engine.training.trainer import learning_rate, loss_of, train
from engine.weights import safetensors
from engine.weights.tensors import Tensors
from stoker.contract import TrainReport, TrainRequest
from stoker.contract.dataset import Example
from stoker.errors import DatasetError, InvalidRequest, JobCancelled, JobFailed
from tests.engine import tiny

GOLDENS = Path(__file__).parents[1] / "goldens"
RUN = json.loads((GOLDENS / "tiny_lora.json").read_text())
LINES = b"\n".join(Example("", tiny.text(ids)).to_line().encode() for ids in ([3, 4, 5, 6], [7, 8, 9], [9, 9, 9, 3]))


def asking(**options: Any) -> TrainRequest:
    fields = {"model": "tiny", "name": "style", "dataset": "dataset:x", "steps": 3, "batch_size": 2, "max_length": 64}
    return TrainRequest(**{**fields, **options})


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama)


@pytest.fixture
def golden_model() -> LoadedModel:
    folder = GOLDENS / "tiny-llama"
    arrays = safetensors.read(folder / "model.safetensors")
    readers = {name: (lambda array=array: array) for name, array in arrays.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    args = LlamaArgs.from_config(json.loads((folder / "config.json").read_text()))
    return tiny.loaded(Llama(args, Tensors(readers, shapes, "tiny-llama", mx.float32)))


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
    rows = [[TokenizedExample(row["tokens"], row["start"]) for row in batch] for batch in RUN["batches"]]
    monkeypatch.setattr(trainer, "initialise", lambda *_: LoraWeights(config, start))
    monkeypatch.setattr(trainer, "batches", lambda *_: (collate(batch) for batch in rows))
    names = ("rank", "alpha", "targets", "learning_rate", "warmup_steps", "weight_decay", "clip")
    asked = asking(**{name: RUN[name] for name in names}, steps=len(rows), batch_size=3)

    probe = mx.array([RUN["probe"]])
    before = golden_model.decoder.logits(golden_model.decoder(probe))[0]
    assert np.abs(np.array(before) - golden["logits_before"]).max() < 1e-4
    reports, weights = finish(train(golden_model, rows[0], asked))
    for report, wanted in zip(reports, RUN["reports"], strict=True):
        assert report.loss == pytest.approx(wanted["loss"], abs=2e-4)
        assert report.gradient_norm == pytest.approx(wanted["gradient_norm"], rel=1e-3)
        assert report.learning_rate == pytest.approx(wanted["learning_rate"])
    for name, pair in golden_matrices(golden, "end").items():
        for side in "ab":
            found = np.array(weights.matrices[ours(name, golden_model)][side])
            assert np.abs(found - pair[side]).max() < 1e-3, f"{name}.{side}"
    adapters = TrainableLora(weights.matrices, config.scale)
    after = golden_model.decoder.logits(golden_model.decoder(probe, adapters=adapters))[0]
    assert np.abs(np.array(after) - golden["logits_after"]).max() < 5e-3


def finish(steps: Any) -> tuple[list[TrainReport], LoraWeights]:
    reports = []
    while True:
        try:
            reports.append(next(steps))
        except StopIteration as end:
            return reports, end.value


def examples(model: LoadedModel) -> list[TokenizedExample]:
    rows = [Example("t3 t4", "t5 t6 t7"), Example("", "t8 t9 t10 t11"), Example("t1", "t12")]
    return tokenize(rows, model.tokenizer, 64)


def test_the_same_seed_makes_the_same_run_bit_for_bit(model: LoadedModel) -> None:
    runs = [finish(train(model, examples(model), asking(steps=5, seed=seed))) for seed in (1, 1, 2)]
    losses = [[report.loss for report in reports] for reports, _ in runs]
    assert losses[0] == losses[1] != losses[2]
    for name, pair in runs[0][1].matrices.items():
        assert np.array_equal(np.array(pair["b"]), np.array(runs[1][1].matrices[name]["b"]))


def test_training_leaves_the_base_as_it_was(model: LoadedModel) -> None:
    tokens = mx.array([[3, 1, 4, 1, 5]])
    before = np.array(model.decoder(tokens))
    reports, weights = finish(train(model, examples(model), asking(steps=5, learning_rate=1e-2)))
    assert np.array_equal(np.array(model.decoder(tokens)), before)
    adapted = model.decoder(tokens, adapters=TrainableLora(weights.matrices, weights.config.scale))
    assert np.abs(np.array(adapted) - before).max() > 1e-3
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert [report.index for report in reports] == [0, 1, 2, 3, 4]


def test_a_run_learns_what_it_is_shown(model: LoadedModel) -> None:
    reports, _ = finish(train(model, examples(model), asking(steps=40, batch_size=3, learning_rate=2e-2, rank=4)))
    assert reports[-1].loss < 0.3 * reports[0].loss


def test_padding_does_not_change_a_loss(model: LoadedModel) -> None:
    found = examples(model)
    none = TrainableLora({}, 1.0)
    whole = loss_of(model.decoder, none, collate(found)).item()
    counts = [len(example.tokens) - example.start for example in found]
    apart = [loss_of(model.decoder, none, collate([example])).item() for example in found]
    assert whole == pytest.approx(np.average(apart, weights=counts), abs=1e-5)


def test_only_the_completion_counts_and_ends_with_the_end_token(model: LoadedModel) -> None:
    prompted, plain, _ = examples(model)
    assert prompted == TokenizedExample([3, 4, 5, 6, 7, tiny.EOS], 2)
    assert plain == TokenizedExample([8, 9, 10, 11, tiny.EOS], 1)
    batch = collate([prompted])
    assert batch.inputs.tolist() == [[3, 4, 5, 6, 7]]
    assert batch.places.tolist() == [1, 2, 3, 4]
    assert batch.targets.tolist() == [5, 6, 7, tiny.EOS]


def test_an_example_that_is_too_long_is_named(model: LoadedModel) -> None:
    rows = [Example("", "t1"), Example("t1 t2", "t3 t4")]
    assert len(tokenize(rows, model.tokenizer, 5)) == 2
    with pytest.raises(DatasetError, match="example 2: 5 tokens given; max_length is 4"):
        tokenize(rows, model.tokenizer, 4)


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own() -> None:
    rows = [TokenizedExample([3, place], 1) for place in range(4, 16)]

    def epochs(seed: int) -> Iterator[list[int]]:
        found = batches(rows, 4, seed)
        for _ in range(3):
            yield [target for _ in range(3) for target in next(found).targets.tolist()]

    first = list(epochs(1))
    assert first == list(epochs(1)) != list(epochs(2))
    assert all(sorted(epoch) == list(range(4, 16)) for epoch in first)
    assert first[0] != first[1] != first[2]


def test_a_batch_is_no_larger_than_the_dataset() -> None:
    assert next(batches([TokenizedExample([1, 2], 1)], 8, 0)).inputs.shape == (1, 1)


def test_the_rate_warms_up_and_stays() -> None:
    asked = asking(learning_rate=1.0, warmup_steps=3)
    assert [learning_rate(asked, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(asking(learning_rate=0.5), 0) == 0.5


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of every step after the second is not a number."""
    made: list[None] = []

    def loss(*args: Any) -> mx.array:
        made.append(None)
        return loss_of(*args) * (1.0 if len(made) < 3 else float("nan"))

    monkeypatch.setattr(trainer, "loss_of", loss)


@pytest.mark.usefixtures("diverging")
def test_a_run_that_diverges_ends_and_says_what_to_do(model: LoadedModel) -> None:
    with pytest.raises(JobFailed, match=r"diverged at step 3: loss nan, .* Lower learning_rate"):
        finish(train(model, examples(model), asking(steps=5)))


@pytest.fixture
def lane(model: LoadedModel, tmp_path: Path) -> TrainLane:
    return TrainLane(model, AdapterPool(model, AdapterStore(tmp_path)))


def admit(lane: TrainLane, job_id: str, **options: Any) -> Ticket:
    ticket = Ticket(job_id, "train")
    lane.admit(lane.prepare(ticket, asking(**options), LINES))
    return ticket


def run_all(lane: TrainLane) -> list[tuple[str, int]]:
    """Run until there is nothing to do; (job, step) of every report, in order."""
    told = []
    while lane.busy:
        lane.drop_stopped()
        output = lane.run() if lane.busy else None
        for job_id, report in output.entries if output else []:
            assert isinstance(report, TrainReport)
            told.append((job_id, report.step))
        for ticket, value in output.ended if output else []:
            ticket.resolve(value)
    return told


def test_runs_come_one_after_the_other_a_step_at_a_time(lane: TrainLane) -> None:
    first, second = admit(lane, "a", steps=2), admit(lane, "b", steps=1, name="other")
    assert run_all(lane) == [("a", 1), ("a", 2), ("b", 1)]
    result = first.result(0)
    assert (result.adapter, result.version, result.steps) == ("style", 1, 2)
    assert second.result(0).adapter == "other"


def test_a_trained_adapter_is_kept_with_what_it_was_made_of(lane: TrainLane, tmp_path: Path) -> None:
    ticket = admit(lane, "a", steps=2, rank=3)
    run_all(lane)
    notes = json.loads((tmp_path / "tiny/style/1/stoker.json").read_text())
    assert notes["job"] == "a"
    assert notes["request"]["rank"] == 3
    assert notes["loss"] == ticket.result(0).last_loss
    assert lane._pool.loaded == ("style@1",)


def test_a_cancelled_run_ends_at_once_and_writes_nothing(lane: TrainLane, tmp_path: Path) -> None:
    running, waiting, last = (admit(lane, name, steps=4) for name in "abc")
    lane.run()
    running.cancel()
    waiting.cancel()
    assert run_all(lane) == [("c", step) for step in (1, 2, 3, 4)]
    for ticket in (running, waiting):
        with pytest.raises(JobCancelled):
            ticket.result(0)
    assert last.result(0).version == 1
    assert [path.name for path in (tmp_path / "tiny/style").iterdir()] == ["1"]


@pytest.mark.usefixtures("diverging")
def test_a_run_that_fails_leaves_those_that_wait_alone(monkeypatch: pytest.MonkeyPatch, lane: TrainLane) -> None:
    failing, waiting = admit(lane, "a", steps=5), admit(lane, "b", steps=1)
    while not failing.done:
        lane.run()
    monkeypatch.setattr(trainer, "loss_of", loss_of)
    run_all(lane)
    with pytest.raises(JobFailed, match="diverged"):
        failing.result(0)
    assert waiting.result(0).steps == 1


def test_an_adapter_that_cannot_be_written_fails_its_own_run_alone(
    monkeypatch: pytest.MonkeyPatch, lane: TrainLane
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    failing, waiting = admit(lane, "a", steps=1), admit(lane, "b", steps=1)
    monkeypatch.setattr(lane._pool, "save", full)
    lane.run()
    lane.run()
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space"):
        failing.result(0)
    run_all(lane)
    assert waiting.result(0).steps == 1


def test_what_the_model_cannot_run_is_refused_before_it_waits(lane: TrainLane) -> None:
    ticket = Ticket("a", "train")
    with pytest.raises(DatasetError, match="gone from the broker"):
        lane.prepare(ticket, asking(), None)
    with pytest.raises(InvalidRequest, match="max_length: 2000 given; tiny takes 1024"):
        lane.prepare(ticket, asking(max_length=2000), LINES)
    with pytest.raises(DatasetError, match="dataset, line 2"):
        lane.prepare(ticket, asking(), b'{"text": "t1"}\n{"txt": "t1"}')


def test_a_lane_that_fails_ends_every_run(lane: TrainLane) -> None:
    tickets = [admit(lane, name) for name in "ab"]
    lane.run()
    lane.fail_all(MemoryError("no more"))
    for ticket in tickets:
        with pytest.raises(MemoryError):
            ticket.result(0)
    assert not lane.busy
    admit(lane, "c", steps=1)
    assert run_all(lane) == [("c", 1)]

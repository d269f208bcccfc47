"""Embedding: the texts of all jobs share batches, and every vector comes back to its own place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel, load
from engine.embedding.forward import PackedForward, PaddedForward, Tokens, Vectors
from engine.embedding.lane import EmbedLane, unit
from engine.embedding.pacer import EmbedPacer
from engine.models import sentence
from engine.ticket import Ticket
from stoker.contract import EmbedRequest
from stoker.contract.vectors import Embedded
from stoker.errors import InvalidRequest, JobCancelled, ModelError, TextTooLong
from tests.thorough import in_turn

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXTS = [row["text"] for row in json.loads((GOLDENS / "minilm.json").read_text())["texts"]]
VECTORS = np.load(GOLDENS / "minilm.npz")["alone"]


class Noted(PackedForward):
    """Notes the lengths of the texts in every batch."""

    def __init__(self, model: LoadedModel, streams: int) -> None:
        super().__init__(model, streams)
        self.batches: list[list[int]] = []

    def __call__(self, texts: Sequence[Tokens]) -> Vectors:
        self.batches.append([len(text) for text in texts])
        return super().__call__(texts)


class Driver:
    """Runs a lane as the engine does. `tokens` of a batch and `streams` are as given on every machine."""

    def __init__(self, model: LoadedModel, tokens: int = 4096, streams: int = 1) -> None:
        self.model, forward = model, Noted(model, streams)
        self.lane = EmbedLane(model, forward=forward, pacer=EmbedPacer(1e-9, tokens, tokens))
        self.batches = forward.batches

    def send(self, *texts: str, **options: Any) -> Ticket[Any]:
        ticket: Ticket[Any] = Ticket("j", "embed")
        request = EmbedRequest(model="minilm", texts=texts, **{"truncation": "end", **options})
        self.lane.admit(self.lane.prepare(ticket, request, None))
        return ticket

    def step(self) -> None:
        self.lane.drop_stopped()
        if self.lane.busy:
            for ticket, work in self.lane.run().ended:
                ticket.resolve(work)

    def run(self) -> None:
        while self.lane.busy:
            self.step()


def test_a_step_says_how_many_texts_it_had(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=8)
    driver.send("one", "two", "three four five six seven")
    rows = []
    while driver.lane.busy:
        rows.append(driver.lane.run().rows)
    assert sum(rows) == len([text for batch in driver.batches for text in batch]) > 0


def vectors(ticket: Ticket[Any]) -> np.ndarray:
    work = ticket.result(0)
    assert isinstance(work, Embedded)
    return work.vectors


@pytest.fixture
def driver(minilm: LoadedModel) -> Driver:
    return Driver(minilm)


def test_the_vectors_of_many_jobs_come_back_to_their_own_in_order(driver: Driver) -> None:
    order = np.random.default_rng(1).permutation(len(TEXTS))
    shares = np.array_split(order, 5)
    tickets = [driver.send(*(TEXTS[place] for place in share)) for share in shares]
    driver.run()
    for share, ticket in zip(shares, tickets, strict=True):
        assert np.abs(vectors(ticket) - VECTORS[share]).max() < 1e-4
    assert len(driver.batches) < len(tickets), "jobs share batches"


def test_a_batch_is_bounded_and_every_text_is_in_one(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=256)
    lengths = np.random.default_rng(2).integers(1, 120, 60)
    tickets = [driver.send(*("word " * int(length) for length in share)) for share in np.array_split(lengths, 4)]
    driver.run()
    assert sorted(length - 2 for batch in driver.batches for length in batch) == sorted(lengths.tolist())
    assert all(sum(batch) <= 256 for batch in driver.batches)
    assert all(np.isfinite(vectors(ticket)).all() for ticket in tickets)


def test_a_small_job_does_not_wait_behind_a_large_one(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=64)
    large = driver.send(*["word " * 14] * 200)
    for _ in range(3):
        driver.step()
    small = [driver.send("word " * 14) for _ in range(2)]
    driver.step()
    assert all(ticket.done for ticket in small)
    assert not large.done


def test_a_large_job_goes_on_during_a_flood_of_small_ones(minilm: LoadedModel) -> None:
    """As many come as fill every batch; a quarter of each is the large job's all the same."""
    driver = Driver(minilm, tokens=64)
    large = driver.send(*["word " * 14] * 20)
    for _ in range(22):
        for _ in range(4):
            driver.send("word " * 14)
        driver.step()
    assert large.done
    assert all(len(batch) == 4 for batch in driver.batches)


def test_a_text_longer_than_a_batch_goes_alone(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=8)
    tickets = [driver.send("word " * 50), driver.send("word " * 50)]
    driver.run()
    assert driver.batches == [[52], [52]]
    assert np.array_equal(vectors(tickets[0]), vectors(tickets[1]))


def test_texts_longer_than_a_batch_go_one_to_a_stream(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=8, streams=2)
    driver.send(*["word " * 50] * 3, "word " * 20)
    driver.run()
    assert driver.batches == [[52, 52], [52, 22]]


def test_a_job_is_embedded_by_length_and_comes_back_in_its_own_order(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=40)
    ticket = driver.send(*("word " * length for length in (3, 18, 8, 18, 3, 8, 8, 3, 8)))
    driver.run()
    assert driver.batches == [[20, 20], [10, 10, 10, 10], [5, 5, 5]]
    found = vectors(ticket)
    assert np.abs(found[0] - found[4]).max() < 1e-5
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_shorter_stall_makes_shorter_steps(minilm: LoadedModel) -> None:
    usual, short = EmbedLane(minilm), EmbedLane(minilm, stall=0.025)
    assert short.pacer.tokens == usual.pacer.tokens // 4


def test_a_step_reports_what_it_took_to_the_pacer(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    monkeypatch.setattr(driver.lane.pacer, "note", lambda tokens, seconds: noted.append(tokens))
    driver.send("word " * 14, "word " * 8)
    driver.run()
    assert noted == [26]


def test_a_text_that_would_leave_a_stream_idle_waits_for_the_next_batch(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=64, streams=2)
    driver.send(*["word " * 18] * 5)
    driver.run()
    assert driver.batches == [[20, 20], [20, 20], [20]]


@pytest.mark.parametrize("forward", [lambda m: PackedForward(m, 1), lambda m: PackedForward(m, 3), PaddedForward])
def test_a_vector_is_the_same_alone_and_in_any_batch(minilm: LoadedModel, forward: Any) -> None:
    run = forward(minilm)
    random = np.random.default_rng(5)
    lengths: tuple[int, ...] = (3, 200, 17, 17, 64, 5, 256, 130, 17)
    if forward is PaddedForward:
        lengths = (3, 40, 17, 17, 5, 40, 17)  # on a CPU each shape of it is a graph to be traced
    texts = [random.integers(1000, 20_000, length).astype(np.int32) for length in lengths]
    alone = np.concatenate([run([text]) for text in texts])
    assert np.abs(run(texts) - alone).max() < 1e-5
    assert np.abs(run(texts[::-1])[::-1] - alone).max() < 1e-5
    assert np.abs(run(texts[2:4]) - alone[2:4]).max() < 1e-5


def test_one_batch_holds_vectors_of_unit_length_and_others(driver: Driver) -> None:
    unit, raw, default = (driver.send("a warm model", normalize=wanted) for wanted in (True, False, None))
    driver.run()
    assert len(driver.batches) == 1
    lengths = [float(np.linalg.norm(vectors(ticket))) for ticket in (unit, raw, default)]
    assert lengths[0] == pytest.approx(1.0, abs=1e-5)
    assert lengths[1] != pytest.approx(1.0, abs=1e-2)
    assert lengths[2] == pytest.approx(1.0, abs=1e-5), "all-MiniLM-L6-v2 normalizes"
    assert np.abs(vectors(raw) / lengths[1] - vectors(unit)).max() < 1e-5


def test_a_text_that_is_too_long_is_named_with_both_lengths(driver: Driver) -> None:
    with pytest.raises(TextTooLong, match=r"texts\.1: 302 tokens given; minilm takes 256.*truncation=\"end\""):
        driver.send("fine", "word " * 300, truncation="error")
    assert not driver.lane.busy


def test_a_text_that_just_fits_is_taken_as_it_is(driver: Driver) -> None:
    ticket = driver.send("word " * 253 + "last", truncation="error")
    whole = driver.model.tokenizer.encode("word " * 253 + "last")
    (work,) = driver.lane.held
    assert len(whole) == 256
    assert work.texts[0].tolist() == whole
    driver.run()
    assert ticket.done


def test_a_cut_text_ends_as_the_model_knows_it(driver: Driver) -> None:
    ticket = driver.send("word " * 300)
    (work,) = driver.lane.held
    (tokens,) = work.texts
    whole = driver.model.tokenizer.encode("word " * 300)
    assert len(tokens) == 256
    assert (tokens[0], tokens[-1]) == (whole[0], whole[-1])
    driver.run()
    assert work.tokens == 256
    assert ticket.done


def test_a_cancelled_job_leaves_and_the_others_stay(minilm: LoadedModel) -> None:
    driver = Driver(minilm, tokens=16)
    stopped, other = driver.send(*TEXTS[:6]), driver.send(*TEXTS[6:9])
    driver.step()
    stopped.cancel()
    driver.run()
    with pytest.raises(JobCancelled):
        stopped.result(0)
    assert np.abs(vectors(other) - VECTORS[6:9]).max() < 1e-4


def test_a_lane_that_fails_ends_every_job_that_waits(driver: Driver) -> None:
    tickets = [driver.send("one", "two"), driver.send("three")]
    driver.lane.fail_all(MemoryError("no more"))
    for ticket in tickets:
        with pytest.raises(MemoryError):
            ticket.result(0)
    assert not driver.lane.busy


def test_a_batch_that_fails_ends_the_jobs_that_were_in_it(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Noted, texts: Sequence[Tokens]) -> Vectors:
        raise MemoryError("no more")

    monkeypatch.setattr(Noted, "__call__", fails)
    ticket = driver.send("one", "two")
    with pytest.raises(MemoryError) as error:
        driver.lane.run()
    driver.lane.fail_all(error.value)
    assert ticket.done, "else its caller waits for ever"


def opened(folder: Path, **options: Any) -> LoadedModel:
    return load("model", [str(folder)], **options)


@pytest.mark.parametrize(
    "forward",
    [lambda m: PackedForward(m, 2), PaddedForward, lambda m: PaddedForward(m, planned=True)],
    ids=["packed", "padded", "planned"],
)
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_packed_and_padded_batches_agree_with_the_goldens(name: str, forward: Any) -> None:
    golden = np.load(GOLDENS / "architectures.npz")
    rows = [key for key in golden.files if key.startswith(f"{name}.tokens.")]
    texts = [golden[key].astype(np.int32) for key in rows]
    wanted = np.stack([golden[key.replace("tokens", "output")].mean(axis=0) for key in rows])
    run = forward(opened(GOLDENS / "architectures" / name))
    assert np.abs(run(texts + texts[::-1]) - np.concatenate([wanted, wanted[::-1]])).max() < 1e-4


def test_no_batch_is_wider_than_the_model_reads() -> None:
    """Beyond its last position a gather reads what lies behind the table."""
    model = opened(GOLDENS / "architectures" / "mpnet")
    forward = PaddedForward(model, planned=True)
    forward([np.full(150, 5, dtype=np.int32)])
    assert [width for _, width in forward.compiled] == [model.embedding.max_tokens]  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "dtype"), in_turn(["bert", "mpnet"], ["float16", "bfloat16"]))
def test_sixteen_bits_are_near_to_thirty_two(name: str, dtype: str) -> None:
    bound = {"float16": 0.01, "bfloat16": 0.08}[dtype]
    random = np.random.default_rng(6)
    texts = [random.integers(8, 60, length).astype(np.int32) for length in (5, 9, 30, 12)]
    exact, rough = (PaddedForward(opened(GOLDENS / "architectures" / name, dtype=kind)) for kind in (None, dtype))
    left, right = unit(exact(texts)), unit(rough(texts))
    assert right.dtype == np.float32
    assert np.isfinite(right).all(), "a mask that overflows 16 bits makes NaN"
    assert np.abs(left - right).max() < bound


def test_prompts_of_e5_go_before_the_text(minilm: LoadedModel) -> None:
    driver = Driver(minilm)
    named = [driver.send("how hot is it?", prompt=name) for name in ("query", "passage")]
    written = [driver.send(f"{name}: how hot is it?") for name in ("query", "passage")]
    driver.run()
    for left, right in zip(named, written, strict=True):
        assert np.abs(vectors(left) - vectors(right)).max() < 1e-6


def test_the_prompt_that_the_models_files_name_goes_before_the_text_unless_another_is_asked_for(
    minilm: LoadedModel,
) -> None:
    assert minilm.embedding is not None
    spec = replace(minilm.embedding, prompts={"search": "find: "}, default_prompt="search")
    driver = Driver(replace(minilm, embedding=spec))
    for options in ({}, {"prompt": "search"}, {"prompt": "see: "}):
        driver.send("heat", **options)
    found = [work.texts[0].tolist() for work in driver.lane.held]
    encode = minilm.tokenizer.encode
    assert found == [encode("find: heat"), encode("find: heat"), encode("see: heat")]


@pytest.mark.parametrize(("own", "wanted"), [({}, "heat"), ({"document": "text: "}, "text: heat")])
def test_a_prompt_for_documents_is_nothing_where_the_model_has_none_and_no_text(
    minilm: LoadedModel, own: dict[str, str], wanted: str
) -> None:
    """As in sentence-transformers: a model that names a prompt for queries has none for documents."""
    assert minilm.embedding is not None
    spec = replace(minilm.embedding, prompts={"query": "find: ", **own})
    driver = Driver(replace(minilm, embedding=spec))
    driver.send("heat", prompt="document")
    assert [work.texts[0].tolist() for work in driver.lane.held] == [minilm.tokenizer.encode(wanted)]


def test_a_text_that_is_cut_has_its_prompt_still(minilm: LoadedModel) -> None:
    driver = Driver(minilm)
    driver.send("heat " * 300, prompt="query")
    (found,) = [work.texts[0].tolist() for work in driver.lane.held]
    asked = minilm.tokenizer.encode("query: heat")[:-1]
    assert found[: len(asked)] == asked
    assert len(found) == 256


def test_a_vector_is_cut_only_where_the_model_was_trained_for_it(minilm: LoadedModel) -> None:
    assert minilm.embedding is not None
    with pytest.raises(InvalidRequest, match=r"dimensions: 64 given; minilm makes 384\. It was not trained"):
        Driver(minilm).send("a warm model", dimensions=64)
    trained = replace(minilm, embedding=replace(minilm.embedding, dimensions=(64, 128)))
    driver = Driver(trained)
    whole, cut, plain, raw = (
        driver.send("a warm model", **options)
        for options in ({}, {"dimensions": 64}, {"normalize": False}, {"dimensions": 64, "normalize": False})
    )
    driver.run()
    assert vectors(cut).shape == (1, 64)
    assert np.linalg.norm(vectors(cut)) == pytest.approx(1, abs=1e-6)
    head = vectors(whole)[:, :64]
    assert np.abs(vectors(cut) - head / np.linalg.norm(head)).max() < 1e-6
    assert np.linalg.norm(vectors(plain)) != pytest.approx(1, abs=1e-2)
    assert np.abs(vectors(raw) - vectors(plain)[:, :64]).max() < 5e-6  # of another pass
    with pytest.raises(InvalidRequest, match="minilm makes 64, 128"):
        driver.send("a warm model", dimensions=65)


def test_what_may_be_cut_is_read_from_the_models_files(tmp_path: Path) -> None:
    for said, wanted in (
        ({}, ()),
        ({"is_matryoshka": True}, range(1, 385)),
        ({"matryoshka_dimensions": [128, 64]}, (64, 128)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(said))
        assert sentence.read_dimensions(tmp_path / "config.json", 384) == wanted
    unfit: list[Any] = [[0, 512], 64, "", {}]
    for sizes in unfit:
        (tmp_path / "config.json").write_text(json.dumps({"matryoshka_dimensions": sizes}))
        with pytest.raises(ModelError, match="matryoshka_dimensions"):
            sentence.read_dimensions(tmp_path / "config.json", 384)

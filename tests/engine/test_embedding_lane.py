"""Embedding: the texts of all jobs share batches, and every vector comes back to its own place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.embedding import lane as lane_module
from engine.embedding.lane import BATCH_TOKENS, EmbedLane, EmbedWork
from engine.loading import LoadedModel
from engine.ticket import Ticket
from stoker.contract import EmbedRequest
from stoker.errors import JobCancelled, TextTooLong

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXTS = [row["text"] for row in json.loads((GOLDENS / "minilm.json").read_text())["texts"]]
VECTORS = np.load(GOLDENS / "minilm.npz")["alone"]


class Driver:
    """Runs a lane as the engine does; notes the shape of every batch."""

    def __init__(self, model: LoadedModel) -> None:
        self.lane = EmbedLane(model)
        self.batches: list[list[int]] = []
        forward = self.lane._forward

        def noted(batch: list[Any]) -> np.ndarray:
            self.batches.append([len(text.tokens) for text in batch])
            return forward(batch)

        self.lane._forward = noted  # type: ignore[method-assign]

    def send(self, *texts: str, **options: Any) -> Ticket:
        ticket = Ticket("j", "embed")
        request = EmbedRequest(model="minilm", texts=texts, **{"truncate": True, **options})
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


def vectors(ticket: Ticket) -> np.ndarray:
    work = ticket.result(0)
    assert isinstance(work, EmbedWork)
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


def test_a_batch_is_bounded_and_of_texts_of_about_one_length(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "BATCH_TOKENS", 256)
    random = np.random.default_rng(2)
    lengths = random.integers(1, 120, 60)
    tickets = [driver.send(*("word " * int(length) for length in share)) for share in np.array_split(lengths, 4)]
    driver.run()
    assert sorted(length - 2 for batch in driver.batches for length in batch) == sorted(lengths.tolist())
    assert all(len(batch) * max(batch) <= 256 for batch in driver.batches)
    padded = sum(len(batch) * max(batch) for batch in driver.batches)
    assert padded < 1.3 * sum(map(sum, driver.batches)), "little of the work is padding"
    assert all(np.isfinite(vectors(ticket)).all() for ticket in tickets)


def test_the_text_that_waits_longest_goes_first(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "BATCH_TOKENS", 16)
    first = driver.send("word " * 100)
    for _ in range(20):
        driver.send("word")
    driver.step()
    assert first.done


def test_a_text_longer_than_a_batch_goes_alone(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "BATCH_TOKENS", 8)
    tickets = [driver.send("word " * 50), driver.send("word " * 50)]
    driver.run()
    assert driver.batches == [[52], [52]]
    assert np.array_equal(vectors(tickets[0]), vectors(tickets[1]))
    assert BATCH_TOKENS >= 256


def test_texts_of_one_length_need_no_mask_and_give_the_same(driver: Driver) -> None:
    same = driver.send("a warm model", "a cold start")
    driver.run()
    padded = driver.send("a warm model", "a much longer text about the boiler room of a ship")
    driver.run()
    assert np.abs(vectors(same)[0] - vectors(padded)[0]).max() < 1e-5


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
    with pytest.raises(TextTooLong, match=r"texts\.1: 302 tokens given; minilm takes 256.*truncate=True"):
        driver.send("fine", "word " * 300, truncate=False)
    assert not driver.lane.busy


def test_a_cut_text_ends_as_the_model_knows_it(driver: Driver) -> None:
    ticket = driver.send("word " * 300)
    (work,) = {text.work for text in driver.lane._waiting}
    (tokens,) = work.texts
    whole = driver.lane._model.tokenizer.encode("word " * 300)
    assert len(tokens) == 256
    assert (tokens[0], tokens[-1]) == (whole[0], whole[-1])
    driver.run()
    assert work.tokens == 256
    assert ticket.done


def test_a_cancelled_job_leaves_and_the_others_stay(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "BATCH_TOKENS", 16)
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
    def fails(batch: list[Any]) -> np.ndarray:
        raise MemoryError("no more")

    monkeypatch.setattr(driver.lane, "_forward", fails)
    ticket = driver.send("one", "two")
    with pytest.raises(MemoryError) as error:
        driver.lane.run()
    driver.lane.fail_all(error.value)
    assert ticket.done, "else its caller waits for ever"

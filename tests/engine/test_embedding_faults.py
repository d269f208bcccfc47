"""One bad text hurts its own job alone, no matter which call fails and which jobs run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from engine.checkpoints.loading import LoadedModel, load
from engine.embedding import lane as lane_module
from engine.embedding.forward import PackedForward, PaddedForward, Tokens, Vectors
from engine.embedding.lane import EmbedLane, unit
from engine.embedding.pacer import EmbedPacer
from engine.models.encoder import PostNorm
from engine.text.tokenizer import Tokenizer
from engine.ticket import Ticket
from stoker.contract import EmbedRequest
from stoker.errors import DeadlineExceeded, InvalidRequest, JobCancelled, ModelError, StokerError, TextTooLong
from tests.engine import tiny
from tests.engine.faults import DrivenLane, Fault, check_held, failing_call
from tests.thorough import quick

GOLDENS = Path(__file__).parents[1] / "goldens" / "architectures"
#: A token that the forward pass fails of, one whose row of the weights is no number, and one that is too large.
RAISES, NAN, INF = 61, 62, 63
#: A zero-width space.
UNSEEN = "\u200b"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """With a tokenizer that puts nothing around a text, so that one which it does not see has no token at all."""
    tokenizer = tiny.tokenizer(64)
    tokenizer.inner.normalizer = normalizers.Replace(UNSEEN, "")
    return replace(load("tiny", [str(GOLDENS / "bert")]), tokenizer=tokenizer)


class Faulty(PackedForward):
    """Fails of the token `RAISES`, of all once it is `dead`, and in the calls `hiccups` of more than one text."""

    dead = False
    calls = 0
    hiccups: tuple[int, ...] = ()
    scale = 1.0

    def __call__(self, texts: Sequence[Tokens]) -> Vectors:
        self.calls += 1
        assert all(len(text) for text in texts), "a forward pass over nothing"
        if self.dead or (len(texts) > 1 and self.calls in self.hiccups):
            raise RuntimeError("the device is gone")
        if any(RAISES in text for text in texts):
            raise ValueError("no such thing")
        vectors = super().__call__(texts) * np.float32(self.scale)
        for text, vector in zip(texts, vectors, strict=True):
            vector[3] = np.nan if NAN in text else np.inf if INF in text else vector[3]
        return vectors


class Traffic(DrivenLane):
    def __init__(self, model: LoadedModel, tokens: int = 64, streams: int = 1) -> None:
        super().__init__()
        self.forward = Faulty(model, streams)
        self.lane = EmbedLane(model, forward=self.forward, pacer=EmbedPacer(1e-9, tokens, tokens))

    def send(self, *texts: Sequence[int], deadline: float | None = None, **options: Any) -> Ticket[Any]:
        ticket: Ticket[Any] = Ticket(f"job {len(self.tickets)}", "embed", deadline)
        request = EmbedRequest(model="tiny", texts=tuple(tiny.text(ids) or UNSEEN for ids in texts), **options)
        work = self.lane.prepare(ticket, request, None)
        self.tickets.append(ticket)
        self.lane.admit(work)
        self.check()
        return ticket

    def check(self, whole: bool = True) -> None:
        held = [work.ticket for work in self.lane.held]
        check_held(self.tickets, held, whole=whole)
        if whole:
            assert all(work in self.lane.held for work in self.lane.waiting), "texts of a job that has ended still wait"


@pytest.fixture
def traffic(model: LoadedModel) -> Traffic:
    return Traffic(model)


def alone(model: LoadedModel, *texts: Sequence[int]) -> np.ndarray:
    """What each text gets in a batch of its own; zeros for one without a token."""
    run = PackedForward(model, 1)
    return np.concatenate([run([np.array(ids, np.int32)]) if ids else np.zeros((1, 32), np.float32) for ids in texts])


def check_vectors(model: LoadedModel, ticket: Ticket[Any], *texts: Sequence[int]) -> None:
    assert np.abs(ticket.result(0).vectors - alone(model, *texts)).max() < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_a_text_without_a_token_is_a_vector_of_zeros(model: LoadedModel, pooling: str) -> None:
    """As sentence-transformers has it: the sum over nothing, by a number that is not 0."""
    assert model.embedding is not None
    pooled = replace(model, embedding=replace(model.embedding, pooling=pooling))
    traffic = Traffic(pooled)
    whole, neighbour = traffic.send([]), traffic.send([3, 4, 5])
    mixed, scaled = traffic.send([3, 4, 5], [], [6]), traffic.send([], [7, 8], normalize=True)
    traffic.run()
    assert not whole.result(0).vectors.any()
    assert whole.result(0).tokens == 0
    check_vectors(pooled, neighbour, [3, 4, 5])
    check_vectors(pooled, mixed, [3, 4, 5], [], [6])
    assert np.linalg.norm(scaled.result(0).vectors, axis=1) == pytest.approx([0, 1], abs=1e-6)


def test_a_job_without_a_token_ends_in_a_lane_that_has_nothing_else(traffic: Traffic) -> None:
    ticket = traffic.send([], [])
    assert traffic.lane.busy
    traffic.step()
    assert ticket.result(0).vectors.shape == (2, 32)
    assert traffic.forward.calls == 0


def test_a_text_without_a_token_waits_for_the_others_of_its_job(traffic: Traffic, model: LoadedModel) -> None:
    ticket = traffic.send([], [3] * 60, [4] * 60)
    traffic.step()
    assert not ticket.done
    traffic.run()
    check_vectors(model, ticket, [], [3] * 60, [4] * 60)


@pytest.mark.parametrize("bad", [RAISES, NAN, INF])
@pytest.mark.parametrize("place", [0, 1, 6])
def test_a_text_that_fails_ends_its_job_by_name_and_no_other(model: LoadedModel, bad: int, place: int) -> None:
    traffic = Traffic(model)
    texts: list[list[int]] = [[4, 5, 6]] * 7
    before = traffic.send([3, 4])
    failing = traffic.send(*texts[:place], [7, bad, 8], *texts[place:])
    after = traffic.send([9] * 20, [3], [])
    traffic.run()
    kind = RuntimeError if bad == RAISES else ModelError
    with pytest.raises(kind, match=rf"^texts\.{place}: "):
        failing.result(0)
    check_vectors(model, before, [3, 4])
    check_vectors(model, after, [9] * 20, [3], [])


def test_what_a_damaged_weight_says_is_what_to_do(traffic: Traffic) -> None:
    failing = traffic.send([NAN])
    traffic.run()
    with pytest.raises(ModelError, match=r"texts\.0: its vector is not finite.*stoker models verify.*float32"):
        failing.result(0)


def test_want_of_memory_can_be_distinguished_from_a_texts_error(
    traffic: Traffic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text that is too large by itself is no reason for others to go back to their queue."""
    plain = Faulty.__call__

    def small(self: Faulty, texts: Sequence[Tokens]) -> Vectors:
        if sum(map(len, texts)) > 20:
            raise MemoryError("no more")
        return plain(self, texts)

    monkeypatch.setattr(Faulty, "__call__", small)
    large, others = traffic.send([3] * 30), [traffic.send([4] * 15) for _ in range(6)]
    traffic.run()
    with pytest.raises(MemoryError, match=r"texts\.0: MemoryError: no more"):
        large.result(0)
    assert all(other.result(0).vectors.any() for other in others), "two of them are too large together"


def test_a_failure_that_passes_is_nobodys(traffic: Traffic, model: LoadedModel) -> None:
    traffic.forward.hiccups = (1,)
    tickets = [traffic.send([3, 4, 5]), traffic.send([6])]
    traffic.run()
    check_vectors(model, tickets[0], [3, 4, 5])
    check_vectors(model, tickets[1], [6])


def test_a_device_that_computes_nothing_any_more_is_the_lanes_failure(traffic: Traffic) -> None:
    tickets = [traffic.send([3, 4, 5]), traffic.send([6]), traffic.send([])]
    traffic.forward.dead = True
    with pytest.raises(RuntimeError, match="the device is gone") as error:
        traffic.lane.run()
    traffic.check()
    traffic.lane.fail_all(error.value)
    traffic.check()
    assert all(ticket.done for ticket in tickets)
    assert not traffic.lane.busy


def test_vectors_that_cannot_be_finished_end_their_own_job(
    traffic: Traffic, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(vectors: Vectors) -> Vectors:
        raise MemoryError("no more")

    monkeypatch.setattr(lane_module, "unit", fails)
    failing, other = traffic.send([3, 4], normalize=True), traffic.send([5], normalize=False)
    traffic.run()
    with pytest.raises(MemoryError):
        failing.result(0)
    check_vectors(model, other, [5])


def test_a_vector_that_float16_cannot_hold_ends_its_own_job(traffic: Traffic, model: LoadedModel) -> None:
    """It would travel as infinity."""
    traffic.forward.scale = 1e6
    failing = traffic.send([], [3, 4], dtype="float16")
    others = [traffic.send([3, 4], dtype="float16", normalize=True), traffic.send([3, 4])]
    traffic.run()
    with pytest.raises(InvalidRequest, match=r"texts\.1: float16 given, .*65504.*float32"):
        failing.result(0)
    assert all(np.isfinite(other.result(0).vectors).all() for other in others)


def broken_tokenizer() -> Tokenizer:
    """One that fails of a word that it does not know."""
    inner = tokenizers.Tokenizer(models.WordLevel({f"t{index}": index for index in range(64)}, unk_token="[none]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(inner, eos_ids=(), pad_id=0)


def test_a_text_that_cannot_be_encoded_is_named(model: LoadedModel) -> None:
    lane = EmbedLane(replace(model, tokenizer=broken_tokenizer()))
    with pytest.raises(InvalidRequest, match=r"^texts\.2: .*UNK"):
        lane.prepare(Ticket("a", "embed"), EmbedRequest(model="tiny", texts=("t1", "t2", "x", "t3")), None)
    assert not lane.busy


def test_a_text_that_is_too_long_is_named_or_cut(traffic: Traffic, model: LoadedModel) -> None:
    long = [index % 50 + 3 for index in range(170)]
    with pytest.raises(TextTooLong, match=r"^texts\.1: 170 tokens given; tiny takes 160"):
        traffic.send([3], long)
    cut = traffic.send([3], long, truncation="end")
    traffic.run()
    # Nothing closes a text of this tokenizer: what is kept is its beginning, and no last word of another place.
    check_vectors(model, cut, [3], long[:160])


@pytest.mark.parametrize(("template", "closing"), [("$A", 0), ("t1 $A", 0), ("$A t2", 1), ("t1 $A t2 t2", 2)])
def test_a_cut_text_keeps_all_that_closes_it(model: LoadedModel, template: str, closing: int) -> None:
    tokenizer = tiny.tokenizer(64)
    tokenizer.inner.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("t1", 1), ("t2", 2)]
    )
    lane = EmbedLane(replace(model, tokenizer=tokenizer))
    request = EmbedRequest(model="tiny", texts=(tiny.text(range(3, 60)) + " t9" * 120,), truncation="end")
    (tokens,) = lane.prepare(Ticket("a", "embed"), request, None).texts
    assert len(tokens) == 160
    assert tokens[160 - closing :].tolist() == [2] * closing
    assert tokens[159 - closing] == 9


@pytest.mark.parametrize("forward", [lambda m: PackedForward(m, 1), PaddedForward], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_a_damaged_row_of_the_weights_spoils_the_texts_that_use_it_alone(name: str, forward: Any) -> None:
    """Also where others' length pads them: with the row of the pad token, or up to a position that is damaged."""
    damaged = load("tiny", [str(GOLDENS / name)])
    texts = [np.full(length, 9, np.int32) for length in (10, 11, 12)]
    wanted = forward(damaged)(texts)
    encoder = damaged.encoder
    assert isinstance(encoder, PostNorm)
    encoder.words.weight[damaged.tokenizer.pad_id or 0] = np.nan
    encoder.positions[int(encoder.position_ids(texts[2][None])[0, -1])] = np.inf
    found = forward(damaged)(texts)
    assert np.abs(found[:2] - wanted[:2]).max() < 1e-5
    assert not np.isfinite(found[2]).any()


def test_a_large_vector_gets_unit_length_and_no_zeros() -> None:
    assert unit(np.array([[3e30, 4e30]], np.float32)) == pytest.approx(np.array([[0.6, 0.8]]))
    assert not unit(np.zeros((1, 2), np.float32)).any()


@pytest.mark.parametrize("why", ["cancel", "deadline"])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("texts", [[[3] * 60] * 4, [[]], [[], [RAISES] * 60, [3] * 60]], ids=["large", "empty", "bad"])
def test_a_job_is_stopped_in_any_state(
    traffic: Traffic, model: LoadedModel, why: str, steps: int, texts: list[list[int]]
) -> None:
    other = traffic.send([4] * 60, [5])
    ticket = traffic.send(*texts)
    for _ in range(steps):
        traffic.step()
    ended = ticket.done
    if why == "cancel":
        ticket.cancel()
    else:
        ticket.deadline = 0.0
    traffic.step()
    assert ticket.done
    if not ended:
        with pytest.raises(JobCancelled if why == "cancel" else DeadlineExceeded):
            ticket.result(0)
    traffic.run()
    check_vectors(model, other, [4] * 60, [5])


@pytest.mark.parametrize("seed", quick(*range(3), of=range(12)))
def test_in_any_traffic_each_job_gets_its_own_end(model: LoadedModel, seed: int) -> None:
    random = np.random.default_rng(seed)
    traffic = Traffic(model, tokens=int(random.choice([8, 40, 200])), streams=int(random.integers(1, 4)))
    traffic.forward.hiccups = tuple(random.integers(1, 200, 6).tolist())
    sent: list[tuple[Ticket[Any], list[list[int]]]] = []
    for _ in range(40):
        for _ in range(random.integers(0, 4)):
            texts = [random.integers(3, 61, random.integers(0, 30)).tolist() for _ in range(random.integers(1, 6))]
            if random.random() < 0.25:
                texts[0] = [*texts[0], int(random.choice([RAISES, NAN, INF]))]
            sent.append((traffic.send(*texts, deadline=0.0 if random.random() < 0.05 else None), texts))
        if sent and random.random() < 0.15:
            sent[int(random.integers(len(sent)))][0].cancel()
        traffic.step()
    traffic.run()
    for ticket, texts in sent:
        bad = any(token >= RAISES for token in texts[0])
        if ticket.stop is not None and isinstance(ticket.error, JobCancelled | DeadlineExceeded):
            continue
        if bad:
            with pytest.raises((RuntimeError, StokerError), match=r"^texts\.0: "):
                ticket.result(0)
        else:
            check_vectors(model, ticket, *texts)


def test_no_job_is_lost_when_any_call_fails(model: LoadedModel) -> None:
    """A fault in each call that the lane makes, one after the other: what is open stays held once, until all ends."""
    bad = 0
    while True:
        bad += 1
        traffic = Traffic(model)
        with failing_call(lane_module, bad) as calls:
            try:
                stopped = traffic.send([3] * 60, [4] * 60)
                traffic.send([5], [], normalize=True)
                traffic.send([6, RAISES], [NAN])
                traffic.step()
                stopped.cancel()
                traffic.run()
            except (Fault, ValueError) as error:  # the second where the lane's own question failed too
                traffic.check(whole=False)
                traffic.lane.fail_all(error)
        traffic.check()
        assert all(ticket.done for ticket in traffic.tickets)
        if calls.count < bad:
            break
    assert bad > 50, "the calls are counted"

"""The lane of a model that ranks share: what rank 0 says is all that another rank needs to make the same of it."""

from __future__ import annotations

import gc
import itertools
import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation.draws import Pick
from engine.generation.followed import Admission, FollowedLane, LentAdapter
from engine.generation.lane import GenerateLane
from engine.generation.leading import LeadingLane, witness
from engine.generation.limits import LaneLimits
from engine.generation.prefill import Prefill
from engine.generation.row import Generation, Row
from engine.generation.step import Step
from engine.models.shard import Shard
from engine.ticket import Ticket
from engine.warm import WarmModels
from stoker.contract import GenerateRequest, GenerateResult, StreamToken
from stoker.contract.requests import MAX_PROMPT_IDS
from stoker.errors import ModelError, UnknownAdapter, WorkerUnavailable
from tests.engine import shared_model, tiny

LIMITS = LaneLimits(slots=3, kv_bytes=1 << 22)


class Notes:
    """A `Sharing` of one rank, which writes down what it is to say."""

    def __init__(self) -> None:
        self.shard = Shard(0, 1)
        self.words: list[tuple[Any, ...]] = []
        self.seconds: list[float] = []
        self.lost: list[str] = []

    def open(self, model: str, limits: LaneLimits) -> None:
        self.words.append(("open", limits))

    def lend(self, model: str, adapter: tuple[str, int], weights: LoraWeights) -> None:
        self.words.append(("lend", LentAdapter.of(*adapter, weights), weights))

    def forget(self, model: str, adapter: tuple[str, int]) -> None:
        self.words.append(("forget", *adapter))

    def admit(self, model: str, admission: Admission) -> None:
        # As it travels.
        self.words.append(("admit", Admission.model_validate_json(admission.model_dump_json())))

    def drop(self, model: str, numbers: list[int]) -> None:
        self.words.append(("drop", numbers))

    def turn(self, model: str, *, lookahead: bool) -> None:
        self.words.append(("turn", lookahead))

    def turned(self, witness: str) -> None:
        self.words.append(("turned", witness))

    def measured(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def lose(self, why: str) -> None:
        self.lost.append(why)
        raise WorkerUnavailable(why)


class Leading:
    def __init__(self, home: Path, model: LoadedModel | None = None, limits: LaneLimits = LIMITS) -> None:
        self.model = model or replace(tiny.loaded(shared_model.whole()), shard=Shard(0, 1))
        self.store = AdapterStore(home / "adapters")
        self.notes = Notes()
        self.pool = AdapterPool(self.model, self.store)
        self.lane = LeadingLane(self.model, self.pool, limits, self.notes)
        self.lane.warm()
        self.numbers = itertools.count()
        self.published: list[StreamToken] = []

    def prepared(self, published: Sequence[StreamToken] = (), **options: Any) -> Generation:
        prompt = tiny.text(range(3, 23))
        fields = {"model": self.model.name, "prompt": prompt, "max_tokens": 12, "ignore_eos": True}
        request = GenerateRequest(**{**fields, **options})
        ticket: Ticket[GenerateResult] = Ticket(f"job-{next(self.numbers)}", request.kind, priority=request.priority)
        return self.lane.prepare(ticket, request, published)

    def submit(self, published: Sequence[StreamToken] = (), **options: Any) -> Ticket[GenerateResult]:
        work = self.prepared(published, **options)
        self.lane.admit(work)
        return work.ticket

    def turn(self, turns: int = 1, *, lookahead: bool = True) -> None:
        """As the engine does it."""
        for _ in range(turns):
            self.lane.drop_stopped()
            output = self.lane.run(lookahead=lookahead)
            self.published += [entry for _, entry in output.entries if isinstance(entry, StreamToken)]
            for ticket, result in output.ended:
                ticket.resolve(result)

    def finish(self) -> None:
        while self.lane.busy:
            self.turn()

    def weights(self, seed: int, **options: Any) -> LoraWeights:
        return tiny.adapter(self.model, 4, seed, **options)


def followed(leading: Leading, home: Path, step: type[Step] = Step) -> tuple[GenerateLane, list[str], list[float]]:
    """Another rank that hears all of it; its lane, what it says of each turn, and what its clock has left."""
    model, store, left = leading.model, AdapterStore(home / "others"), iter(leading.notes.seconds)
    (_, limits), *words = leading.notes.words
    inner = GenerateLane(
        model, AdapterPool(model, store), limits, clock=left.__next__, agreed=lambda _: bool(next(left))
    )
    inner.step.__class__ = step
    inner.warm()
    lane, said = FollowedLane(inner), list[str]()
    for word, *given in words:
        if word == "lend":
            lent, weights = given
            store.write("tiny", lent.name, weights, {}, lent.version)
            lane.forget(lent.name, lent.version)
        elif word == "forget":
            lane.forget(*given)
        elif word == "admit":
            lane.admit(*given)
        elif word == "drop":
            lane.drop(*given)
        elif word == "turn":
            said.append(witness(lane.turn(lookahead=given[0])))
    return inner, said, list(left)


@pytest.fixture
def leading(tmp_path: Path) -> Leading:
    return Leading(tmp_path)


def witnesses(leading: Leading) -> list[str]:
    return [given[0] for word, *given in leading.notes.words if word == "turned"]


def mixed(leading: Leading) -> None:
    """Streams of three priorities, for which rows make way by who came last, and an answer that penalties change."""
    leading.submit(priority=8, max_tokens=30, seed=4, temperature=1.0)
    leading.submit(priority=8, max_tokens=30, n=2, temperature=0.8, presence_penalty=1.0)
    leading.turn(6)
    leading.submit(priority=2, prompt=tiny.text(range(5, 60)), seed=1, temperature=1.5, top_p=0.8)
    leading.submit(priority=5, max_tokens=5)
    leading.turn(3, lookahead=False)
    assert leading.lane.preempted
    for length in (700, 300):
        # Chunks of them are as long as the seconds say that chunks may be.
        leading.submit(priority=2, prompt=None, prompt_ids=tuple(3 + n * length % 60 for n in range(length)))


def late(leading: Leading) -> None:
    """The row that came last makes way, in any order in which they were admitted."""
    first, last = (leading.prepared(priority=8, max_tokens=20, seed=seed, temperature=1.0) for seed in (1, 2))
    leading.lane.admit(last)
    leading.lane.admit(first)
    leading.turn(3)
    leading.submit(priority=2, max_tokens=9)
    leading.submit(priority=2, max_tokens=9)
    leading.turn(2)
    assert leading.lane.preempted


def cancels(leading: Leading) -> None:
    tickets = [leading.submit(seed=seed, temperature=1.0, max_tokens=40) for seed in range(5)]
    leading.turn(7)
    tickets[0].cancel()
    tickets[4].cancel()


def adapters(leading: Leading) -> None:
    for name, seed in (("one", 1), ("two", 2), ("one", 3)):
        leading.store.write("tiny", name, leading.weights(seed), {})
        leading.submit(adapter=name, temperature=1.0, seed=seed)
        leading.turn(2)
    leading.submit(adapter="one@1", max_tokens=4)
    leading.submit(adapter="two", max_tokens=4)
    # Too late for the job before it.
    leading.store.write("tiny", "two", leading.weights(4), {})


@pytest.mark.parametrize("said", [True, False])
def test_an_adapter_whose_files_became_others_is_lent_again_and_serves_nobody_from_memory(
    leading: Leading, said: bool
) -> None:
    """Also where another process of the home has replaced them, and nobody says so."""

    def answer(adapter: str) -> tuple[int, ...]:
        ticket = leading.submit(adapter=adapter)
        leading.finish()
        return tuple(ticket.result(0).token_ids)

    leading.store.write("tiny", "style", leading.weights(1), {}, 1)
    before = answer("style@1")
    leading.store.set_aside("tiny", "style", 1)
    for version in (1, 2):
        leading.store.write("tiny", "style", leading.weights(5), {}, version)
    if said:
        leading.lane.forget("style", 1)
    assert answer("style@1") == answer("style@2") != before
    lent = [given[0].version for word, *given in leading.notes.words if word == "lend"]
    assert lent == [1, 1, 2]


def lending(leading: Leading) -> list[str]:
    """Which versions are lent and forgotten, in their order."""
    words = [(word, given) for word, *given in leading.notes.words if word in ("lend", "forget")]
    return [f"{word} {given[0].name if word == 'lend' else given[0]}" for word, given in words]


def test_the_adapter_used_longest_ago_is_forgotten_on_all_ranks_and_lent_again_to_its_next_job(
    leading: Leading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.generation.leading.MOST_LENT", 2)
    for seed, name in enumerate(("one", "two", "three")):
        leading.store.write("tiny", name, leading.weights(seed, dora=True), {})
    for name in ("one", "two", "one", "three", "two"):
        leading.submit(adapter=name)
        leading.finish()
    assert lending(leading) == ["lend one", "lend two", "forget two", "lend three", "forget one", "lend two"]
    assert sorted(leading.pool.loaded) == ["three@1", "two@1"]
    assert followed(leading, tmp_path)[1] == witnesses(leading)


def test_an_adapter_that_a_job_here_has_or_waits_for_is_not_forgotten(
    leading: Leading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.generation.leading.MOST_LENT", 1)
    names = ("one", "two", "three", "four", "last")
    for seed, name in enumerate(names):
        leading.store.write("tiny", name, leading.weights(seed), {})
    for name in names[:-1]:
        leading.submit(adapter=name)
        leading.turn()
    assert leading.lane.waiting
    assert lending(leading) == [f"lend {name}" for name in names[:-1]]
    leading.finish()
    # Its files have become others, which no other rank has heard.
    leading.lane.forget("two", 1)
    leading.submit(adapter="last")
    assert lending(leading)[4:] == [*(f"forget {name}" for name in names[:-1]), "lend last"]


@pytest.mark.parametrize("course", [mixed, late, cancels, adapters])
def test_a_rank_that_hears_what_rank_0_says_chooses_the_same_tokens_in_the_same_turns(
    course: Callable[[Leading], None], leading: Leading, tmp_path: Path
) -> None:
    course(leading)
    leading.finish()
    lane, said, left = followed(leading, tmp_path)
    assert len(set(said)) > 5
    assert said == witnesses(leading)
    assert not lane.busy
    # It asked its clock as often.
    assert not left
    assert lane.preempted == leading.lane.preempted


class Restless(Step):
    """Of which each pass is one that was compiled anew."""

    @property
    def traced(self) -> int:
        return time.perf_counter_ns()

    @traced.setter
    def traced(self, count: int) -> None: ...


def test_a_rank_that_compiles_passes_which_rank_0_has_makes_the_same_chunks(leading: Leading, tmp_path: Path) -> None:
    mixed(leading)
    leading.finish()
    _, said, left = followed(leading, tmp_path, Restless)
    assert said == witnesses(leading)
    assert not left


def test_a_job_goes_on_on_all_ranks_behind_the_tokens_that_were_published(leading: Leading, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 20}
    first = leading.submit(**asked)
    leading.finish()
    published = leading.published[:8]
    again = leading.submit(published, **asked)
    leading.finish()
    assert again.result(0).token_ids == first.result(0).token_ids
    *_, admission = [given[0] for word, *given in leading.notes.words if word == "admit"]
    assert [token.token_id for token in admission.published] == [token.token_id for token in published]
    assert followed(leading, tmp_path)[1] == witnesses(leading)


def test_a_job_that_fails_leaves_nothing_on_the_other_ranks(
    leading: Leading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error has the frames in which it was raised, with the keys and values of the prompt."""
    accept, lanes, prefills = Row.accept, list[FollowedLane](), list[weakref.ref[Prefill]]()

    class Fails(Prefill):
        def advance(self, *given: Any) -> Any:
            prefills.extend(weakref.ref(self) for row in self.rows if row.request.seed == 13)
            return super().advance(*given)

    class Held(FollowedLane):
        def __init__(self, lane: GenerateLane) -> None:
            super().__init__(lane)
            lanes.append(self)

    def accepted(row: Row, pick: Pick, index: int) -> StreamToken:
        if row.request.seed == 13:
            raise ModelError("its numbers are not finite")
        return accept(row, pick, index)

    monkeypatch.setattr(Row, "accept", accepted)
    monkeypatch.setattr("tests.engine.test_leading.FollowedLane", Held)
    failed = leading.submit(seed=13)
    leading.submit(seed=5)
    leading.finish()
    assert isinstance(failed.error, ModelError)
    monkeypatch.setattr("engine.generation.lane.Prefill", Fails)
    _, said, _ = followed(leading, tmp_path)
    assert said == witnesses(leading)
    gc.collect()
    assert len(lanes) == 1
    assert prefills
    assert [prefill() for prefill in prefills] == [None] * len(prefills)


def test_a_text_of_more_tokens_than_a_request_may_name_reaches_the_other_ranks(tmp_path: Path) -> None:
    model = replace(tiny.loaded(shared_model.whole()), shard=Shard(0, 1), context=2 * MAX_PROMPT_IDS)
    leading = Leading(tmp_path, model, replace(LIMITS, kv_bytes=1 << 40))
    prompt = [3, 4, 5] * (MAX_PROMPT_IDS // 3 + 1)
    assert len(prompt) > MAX_PROMPT_IDS
    leading.submit(prompt=tiny.text(prompt))
    inner, _, _ = followed(leading, tmp_path)
    (row,) = inner.held
    assert row.known == prompt


@pytest.mark.slow
def test_an_answer_keeps_to_its_grammar_on_all_ranks(smollm2: LoadedModel, tmp_path: Path) -> None:
    leading = Leading(tmp_path, smollm2, LaneLimits(slots=2))
    asked: dict[str, Any] = {"prompt": "A code:", "ignore_eos": False, "temperature": 2.0, "max_tokens": 16}
    coded = leading.submit(regex="[A-F]{2}-[0-9]{2}", **asked)
    leading.submit(**asked)
    leading.finish()
    assert re.fullmatch("[A-F]{2}-[0-9]{2}", coded.result(0).text)
    assert followed(leading, tmp_path)[1] == witnesses(leading)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_is_lent_once_and_travels_as_one_array(tmp_path: Path, dora: bool) -> None:
    # Whole layers take norms of their own too.
    leading = Leading(tmp_path, replace(tiny.loaded(shared_model.whole()), shard=Shard(0, 1).by_layers()))
    leading.store.write("tiny", "one", leading.weights(1, dora=dora), {})
    leading.submit(adapter="one")
    leading.submit(adapter="one@1")
    leading.finish()
    ((lent, weights),) = [given for word, *given in leading.notes.words if word == "lend"]
    assert (lent.name, lent.version) == ("one", 1)
    sent: list[Any] = []

    class Sent:
        """Two ranks, of which each sees what the other has."""

        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def sum(self, array: Any) -> Any:
            sent.append(array)
            return sent[0]

    lent.send(Sent(0), weights)
    received = lent.receive(Sent(1), leading.model.linear_shapes)
    assert received.config == weights.config
    for name, sides in weights.matrices.items():
        assert received.matrices[name].keys() == sides.keys()
        assert all(received.matrices[name][side].tolist() == array.tolist() for side, array in sides.items())


def test_an_adapter_that_cannot_be_had_is_its_own_jobs_error_and_no_rank_hears_of_it(leading: Leading) -> None:
    before = len(leading.notes.words)
    with pytest.raises(UnknownAdapter):
        leading.submit(adapter="nobody")
    assert len(leading.notes.words) == before
    assert not leading.lane.busy


def test_norms_that_fail_on_rank_0_end_the_group(leading: Leading, monkeypatch: pytest.MonkeyPatch) -> None:
    leading.store.write("tiny", "normed", leading.weights(1, dora=True), {})

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(AdapterPool, "measure", broken)
    with pytest.raises(WorkerUnavailable, match="an adapter's norms failed on rank 0: RuntimeError: out of memory"):
        leading.submit(adapter="normed")
    assert leading.notes.lost


def test_a_turn_that_fails_on_rank_0_ends_the_group(leading: Leading, monkeypatch: pytest.MonkeyPatch) -> None:
    leading.submit()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(leading.lane.step, "whole", broken)
    with pytest.raises(WorkerUnavailable, match="a turn failed on rank 0: RuntimeError: out of memory"):
        leading.turn()
    assert leading.notes.lost


def test_a_model_that_ranks_share_generates_trains_and_takes_adapters(tmp_path: Path) -> None:
    model, notes = replace(tiny.loaded(shared_model.whole()), shard=Shard(0, 1)), Notes()
    warm = WarmModels(AdapterStore(tmp_path / "adapters"), tmp_path / "runs", LIMITS, 1 << 20, 0.2, sharing=notes)
    for _ in warm.hold(model):
        pass
    assert set(warm.lanes) == {("tiny", "generate"), ("tiny", "train"), ("tiny", "adapters")}
    assert isinstance(warm.lanes["tiny", "generate"], LeadingLane)
    assert notes.words == [("open", LIMITS)]

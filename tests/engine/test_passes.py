"""How prompts come into the batch, pass by pass: what each reads and writes, and what a neighbour has of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation import lane
from engine.generation.draws import Pick
from engine.generation.forward_input import ForwardInput
from engine.generation.pacing import Chunk, LanePacer
from engine.generation.prefill import Prefill, PrefillPacer
from engine.generation.row import Row
from engine.generation.step import Compiled, Step
from engine.models.key_values import SMALLEST_KV_LENGTH, KeyValues
from engine.models.llama import Llama
from engine.prefixes.memory import SHORTEST, PrefixCache
from engine.ticket import Ticket
from tests.engine import bridged, tiny
from tests.engine.test_generate_lane import Driver, apart, request


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


@pytest.fixture
def driver(model: LoadedModel, tmp_path: Path) -> Driver:
    driver = Driver(model, AdapterPool(model, AdapterStore(tmp_path)), slots=6)
    driver.lane.step.prompt_buckets, driver.lane.step.mixes = True, False
    return driver


@pytest.fixture
def separate(model: LoadedModel, tmp_path: Path) -> Driver:
    """As a model of mlx-lm's files on a CPU, where prompts are not compiled and have passes of their own."""
    return apart(Driver(model, AdapterPool(model, AdapterStore(tmp_path)), slots=16))


class Pass(NamedTuple):
    """Over several tokens of each row: the rows of the storage, and the offset that is furthest."""

    rows: int
    offset: int
    tokens: int


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Pass]:
    """None writes beyond its storage, or reads less than it has written."""
    found: list[Pass] = []
    plain: Any = Step.__call__

    def noting(self: Step, kv: KeyValues, given: ForwardInput, sampling: Any) -> Any:
        rows, tokens = given.tokens.shape
        if tokens > 1:
            found.append(Pass(rows, int(mx.array(given.offset).max()), tokens))
            assert found[-1].offset + tokens <= given.kv_length <= kv.capacity
        return plain(self, kv, given, sampling)

    monkeypatch.setattr(Step, "__call__", noting)
    return found


def prompt(length: int, first: int = 0) -> list[int]:
    return [3 + (first + number * 7) % 50 for number in range(length)]


def test_a_chunk_that_is_padded_beyond_its_storage_gets_more(
    driver: Driver, model: LoadedModel, tmp_path: Path, passes: list[Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three prompts have 42 tokens of a chunk each, padded to 48: behind 210 of them, beyond the 256 they take."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    prompts = [prompt(SMALLEST_KV_LENGTH - 6, number) for number in range(3)]
    sent = [driver.send(request(one, max_tokens=3)) for one in prompts]
    driver.run()
    assert any(one.offset + one.tokens > SMALLEST_KV_LENGTH for one in passes)
    alone = Driver(model, AdapterPool(model, AdapterStore(tmp_path)))
    for one, together in zip(prompts, sent, strict=True):
        exact = alone.send(request(one, max_tokens=3))
        alone.run()
        assert together.ids == exact.ids


def test_of_completions_of_one_prompt_the_first_alone_reads_it(driver: Driver, passes: list[Pass]) -> None:
    driver.send(request(prompt(4 * SHORTEST), n=3, temperature=1.0, seed=1, max_tokens=3))
    driver.run()
    assert [one.rows for one in passes if one.tokens >= SHORTEST] == [1]


def test_prompts_are_read_together_up_to_so_many_tokens_padding_included(
    driver: Driver, passes: list[Pass], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "GROUP_TOKENS", 90)
    for number, length in enumerate((20, 30, 30, 31, 5, 5)):
        driver.send(request(prompt(length, number), max_tokens=2))
    driver.run()
    assert [one.rows for one in passes] == [3, 2, 1], "3 of 30 tokens, 2 of 31, and one that finds no place"


def test_prompts_of_two_priorities_are_not_read_together(driver: Driver, passes: list[Pass]) -> None:
    """The group has one turn: the worse would go before others of the better."""
    driver.send(request([3], max_tokens=60))
    driver.step()
    passes.clear()
    for number, priority in enumerate((7, 7, 8)):
        driver.send(request(prompt(20, number), max_tokens=2, priority=priority))
    driver.run()
    assert [one.rows for one in passes] == [2, 1]


def test_prompts_of_several_jobs_are_read_together(driver: Driver, passes: list[Pass]) -> None:
    for number in range(3):
        driver.send(request(prompt(20, number), max_tokens=2))
    driver.run()
    assert [one.rows for one in passes] == [3]


@pytest.mark.parametrize(
    ("asked", "decoding", "prompts"), [("none", False, False), ("decode", True, False), ("all", True, True)]
)
def test_a_lane_compiles_the_passes_that_it_was_asked_to(
    model: LoadedModel, tmp_path: Path, asked: Compiled, decoding: bool, prompts: bool
) -> None:
    step = Driver(model, AdapterPool(model, AdapterStore(tmp_path)), compiled=asked).lane.step
    assert (step.decode_buckets, step.prompt_buckets) == (decoding, prompts)


# --- on a CPU ---

#: (tokens of prompts that come at once, (rows, tokens of each) of the passes that read them)
GROUPS: list[tuple[list[int], list[tuple[int, int]]]] = [
    ([16] * 16, [(16, 16)]),
    ([16], [(1, 16)]),
    ([20, 60, 64, 16], [(1, 20), (2, 64), (1, 16)]),
    ([52, 60, 64], [(3, 64)]),
    ([16, 16, 200, 16, 16], [(2, 16), (1, 200), (2, 16)]),
    ([1, 1, 1], [(3, 2)]),
    ([64] * 5, [(4, 64), (1, 64)]),
    ([16, 120], [(1, 16), (1, 120)]),
]


@pytest.mark.parametrize(("lengths", "wanted"), GROUPS)
def test_a_cpu_reads_short_prompts_together_and_a_long_one_alone(
    separate: Driver,
    passes: list[Pass],
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    wanted: list[tuple[int, int]],
) -> None:
    """As many as a chunk takes, 256 tokens with their padding; what a prompt is padded is less than a pass."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    for number, length in enumerate(lengths):
        separate.send(request(prompt(length, number), max_tokens=1))
    separate.run()
    assert [(one.rows, one.tokens) for one in passes] == wanted


@pytest.mark.parametrize("left", [[5, 40, 2, 17, 1], [1, 1], [100, 90, 80], [33, 32, 31, 30]])
@pytest.mark.parametrize("tokens", [32, 256])
def test_prompts_of_a_group_get_the_tokens_that_each_gets_alone(
    model: LoadedModel,
    separate: Driver,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    left: list[int],
    tokens: int,
) -> None:
    """In one pass and in several, behind a beginning that is here of some of them, with adapters and without."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    monkeypatch.setattr(PrefillPacer, "begin_by", lambda *_: None)
    monkeypatch.setattr(PrefillPacer, "__init__", lambda pacer, *_, **__: pacer.__dict__.update(tokens=tokens))
    pool = AdapterPool(model, AdapterStore(tmp_path / "adapters"))
    pool.save("one", tiny.adapter(model, 2, 1), {})
    shared = prompt(30, 9)
    asked = [request(shared, max_tokens=1)]
    for number, length in enumerate(left):
        begun = shared if number % 2 else []
        asked.append(request(begun + prompt(length, number), max_tokens=4, adapter="one" if number == 2 else None))
    alone, together = Driver(model, pool, slots=1), Driver(model, pool, slots=16)
    wanted = [alone.send(one) for one in asked]
    alone.run()
    together.send(asked[0])
    together.run()
    found = [together.send(one) for one in asked[1:]]
    together.run()
    assert [one.ids for one in found] == [one.ids for one in wanted[1:]]


def test_prompts_that_begin_alike_wait_for_the_first_and_go_together_behind_it(
    separate: Driver, passes: list[Pass]
) -> None:
    """What they share goes through the model once."""
    shared = prompt(40)
    for number in range(5):
        separate.send(request(shared + prompt(9, number), max_tokens=1))
    separate.run()
    assert passes == [(1, 0, 49), (4, 40, 9)]


def test_a_prompt_waits_for_none_of_another_adapter(
    model: LoadedModel, separate: Driver, tmp_path: Path, passes: list[Pass]
) -> None:
    """Its keys and values are others."""
    AdapterPool(model, AdapterStore(tmp_path)).save("one", tiny.adapter(model, 2, 1), {})
    for adapter in (None, "one"):
        separate.send(request(prompt(40), max_tokens=1, adapter=adapter))
    separate.run()
    assert passes == [(2, 0, 40)]


def test_prompts_that_have_no_slot_make_no_chunk_longer(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    plain = LanePacer.chunk

    def noting(pacer: LanePacer, priority: int, *, prompts: int, **how: bool) -> Chunk:
        asked.append(prompts)
        return plain(pacer, priority, prompts=prompts, **how)

    driver = apart(Driver(model, AdapterPool(model, AdapterStore(tmp_path)), slots=3))
    for number in range(2):
        driver.send(request(prompt(4, number), max_tokens=60))
    while not driver.lane.batch.in_flight:
        driver.step()
    monkeypatch.setattr(LanePacer, "chunk", noting)
    for number in range(5):
        driver.send(request(prompt(90, number), max_tokens=2))
    for _ in range(2):
        driver.step()
    assert set(asked) == {1}


def test_completions_of_a_prompt_too_short_to_be_kept_go_together(separate: Driver, passes: list[Pass]) -> None:
    separate.send(request(prompt(9), n=6, temperature=1.0, seed=1, max_tokens=1))
    separate.run()
    assert passes == [(6, 0, 9)]


def test_what_the_compiling_of_a_pass_takes_says_nothing_of_chunks(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[int] = []
    monkeypatch.setattr(PrefillPacer, "note", lambda _, tokens, *__: noted.append(tokens))
    pool, step = AdapterPool(model, AdapterStore(tmp_path)), Step(model.decoder, "all")
    for length in (20, 21, 60, 20):
        row = Driver(model, pool).lane.prepare(Ticket("job", "generate"), request(prompt(length)), None).rows[0]
        row.adapter = 0
        Prefill(model.decoder, pool, step, [row], PrefixCache(0), time.perf_counter).advance(PrefillPacer(256), 1.0)
    assert noted == [21, 20], "those of shapes that were there before"


@pytest.mark.parametrize("name", ["llama", "lfm2"])
def test_a_group_that_has_to_go_in_several_passes_gets_the_same_tokens(
    model: LoadedModel, tmp_path: Path, passes: list[Pass], name: str
) -> None:
    """As one that waited behind a better priority, while chunks became shorter; its rows are through one by one."""
    used = bridged.bridged(name) if name == "lfm2" else model
    pool = AdapterPool(used, AdapterStore(tmp_path))
    lengths = (9, 30, 20)
    found: dict[Row, Pick] = {}
    asked = [request(prompt(length, number), max_tokens=1) for number, length in enumerate(lengths)]
    lane_of = Driver(used, pool, slots=1).lane
    rows = [lane_of.prepare(Ticket("job", "generate"), one, None).rows[0] for one in asked]
    for row in rows:
        row.adapter = 0
    group = Prefill(used.decoder, pool, Step(used.decoder, "none"), rows, PrefixCache(0), time.perf_counter)
    while group.rows:
        found |= group.advance(PrefillPacer(36), 1.0)
    chunks = [12, 18] if name == "llama" else [9, 11, 10]
    assert [one.tokens for one in passes] == chunks
    alone = Driver(used, pool, slots=1)
    wanted = [alone.send(one) for one in asked]
    alone.run()
    assert [[found[row].token_id] for row in rows] == [sent.ids for sent in wanted]


def test_a_recurrent_model_reads_prompts_of_one_length_together_without_padding(
    tmp_path: Path, passes: list[Pass]
) -> None:
    """A state has seen every token that it was given."""
    model = bridged.bridged("lfm2")
    pool = AdapterPool(model, AdapterStore(tmp_path))
    asked = [request(prompt(length, number), max_tokens=3) for number, length in enumerate((12, 12, 12, 9, 12))]
    alone, together = Driver(model, pool, slots=1), Driver(model, pool, slots=16)
    wanted = [alone.send(one) for one in asked]
    alone.run()
    passes.clear()
    found = [together.send(one) for one in asked]
    together.run()
    assert passes == [(3, 0, 12), (1, 0, 9), (1, 0, 12)]
    assert [one.ids for one in found] == [one.ids for one in wanted]


def test_rows_that_end_with_the_same_pass_move_no_others(separate: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A move is a copy of all keys and values."""
    moves: list[tuple[int, int]] = []
    monkeypatch.setattr(KeyValues, "leave", lambda _, row, last, length: moves.append((row, last)))
    for number in range(8):
        separate.send(request(prompt(5, number), max_tokens=6))
    separate.run()
    assert len(moves) == 8
    assert all(row == last for row, last in moves)


# --- prompts and rows that decode take turns ---


def steps(driver: Driver, count: int) -> str:
    """What each step does: p reads prompts, d reads a pass of rows that decode."""
    made = ""
    for _ in range(count):
        waiting, tokens = len(driver.lane.waiting) + len(driver.lane.prefilling), tokens_of(driver)
        driver.step()
        pushed = len(driver.lane.waiting) + len(driver.lane.prefilling) < waiting
        made += "p" if pushed else "d" if tokens_of(driver) > tokens else "-"
    return made


def tokens_of(driver: Driver) -> int:
    return sum(len(sent.tokens) for sent in driver.sent.values())


def test_a_stream_has_a_token_between_two_chunks_of_others_prompts(
    separate: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many first tokens there are to report."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    stream = separate.send(request(prompt(4), max_tokens=60))
    while len(stream.tokens) < 3:
        separate.step()
    for number in range(4):
        separate.send(request(prompt(130, number), max_tokens=20))
    assert steps(separate, 8) == "pdpdpdpd"


def test_the_rows_of_a_burst_wait_for_two_chunks_of_the_others_and_no_longer(
    separate: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing decodes yet, so that nobody's stream is held up."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    for again in range(2):
        for number in range(6):
            separate.send(request(prompt(200, 6 * again + number), max_tokens=20))
        assert steps(separate, 4) == "pppd"
        separate.run()
    assert [len(sent.tokens) for sent in separate.sent.values()] == [20] * 12


def test_a_burst_that_comes_while_its_first_prompt_is_read_is_read_before_that_row_decodes(
    separate: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client sends its jobs one by one: the first is alone when it comes."""
    monkeypatch.setattr(PrefillPacer, "note", lambda *_: None)
    separate.send(request(prompt(200, 0), max_tokens=20))
    assert steps(separate, 1) == "p"
    for number in (1, 2, 3):
        separate.send(request(prompt(200, number), max_tokens=20))
    assert steps(separate, 3) == "ppd"
    separate.run()
    assert [len(sent.tokens) for sent in separate.sent.values()] == [20] * 4

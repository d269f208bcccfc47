"""The memory of keys and values by itself: what counts, and who makes way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.generation.batch import Batch
from engine.generation.kv_budget import KvBudget
from engine.generation.prefill import Prefill
from engine.generation.prompt import TokenizedPrompt
from engine.generation.row import Generation, Row
from engine.generation.step import Step
from engine.models.key_values import SMALLEST_KV_LENGTH, KeyValues
from engine.models.kv_sizes import bytes_per_token
from engine.prefixes.memory import PrefixCache
from engine.ticket import Ticket
from stoker.contract import GenerateRequest
from tests.engine import bridged
from tests.engine.test_generate_lane import Driver, apart, request

PREFIX = 60


class Machine:
    """A batch, kept prefixes, and memory for `tokens` of a row."""

    def __init__(self, model: LoadedModel, folder: Path, tokens: int, prefixes: int = 0) -> None:
        self.model, self.token = model, bytes_per_token(model.decoder)
        pool = AdapterPool(model, AdapterStore(folder))
        self.batch = Batch(model.decoder, pool, Step(model.decoder, "none"))
        self.prefixes = PrefixCache(1 << 30)
        for index in range(prefixes):
            self.prefixes.put("base", [index] * PREFIX, KeyValues(model.decoder, 1, PREFIX))
        self.budget = KvBudget(model.decoder, tokens * self.token, self.batch, self.prefixes)

    def row(self, length: int) -> Row:
        request = GenerateRequest(model="tiny", prompt_ids=(3,) * length)
        prompt = TokenizedPrompt([3] * length)
        return Generation(Ticket("job", "generate"), request, prompt, self.model.tokenizer, 1024).rows[0]

    def ready(self, length: int) -> Row:
        """A row that has been prefilled."""
        row = self.row(length)
        row.cached = length
        return row

    def seat(self, length: int) -> Row:
        row = self.ready(length)
        self.batch.join(row, KeyValues(self.model.decoder, 1, length), 0)
        return row


def test_batch_prefixes_and_prompts_on_their_way_count_together(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, 10_000, prefixes=2)
    machine.seat(10)
    machine.budget.prefilling = 1000 * machine.token
    assert machine.budget.used == (SMALLEST_KV_LENGTH + 2 * PREFIX + 1000) * machine.token


def test_what_stays_decides_whether_a_row_could_come_in(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, 6 * SMALLEST_KV_LENGTH)
    staying = [machine.seat(SMALLEST_KV_LENGTH - 2)]
    machine.seat(SMALLEST_KV_LENGTH - 2)
    long = machine.row(3 * SMALLEST_KV_LENGTH)
    assert machine.budget.could_admit([machine.row(8)], staying)
    assert not machine.budget.could_admit([long], staying), "not even were the other gone"
    assert machine.budget.could_admit([long], []), "one that is alone may take more"


def test_a_row_that_is_alone_need_not_leave(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, SMALLEST_KV_LENGTH)
    machine.seat(SMALLEST_KV_LENGTH - 1).cached += 1
    assert not machine.budget.must_shrink(), "nobody could make way for it"
    machine = Machine(model, tmp_path, 2 * SMALLEST_KV_LENGTH)
    rows = [machine.seat(SMALLEST_KV_LENGTH - 1) for _ in range(2)]
    assert not machine.budget.must_shrink()
    rows[1].cached += 1
    assert machine.budget.must_shrink()


def test_a_prompt_counts_three_times_at_its_end(model: LoadedModel, tmp_path: Path) -> None:
    """Where it was prefilled, in the batch, and once more while the batch grows."""
    assert Machine(model, tmp_path, 300).budget.most_tokens == 100


@pytest.mark.parametrize("prefixes", [1, 3])
def test_kept_prefixes_make_way_before_a_row_leaves(model: LoadedModel, tmp_path: Path, prefixes: int) -> None:
    machine = Machine(model, tmp_path, 2 * SMALLEST_KV_LENGTH, prefixes=prefixes)
    for _ in range(2):
        machine.seat(10)
    assert not machine.budget.must_shrink()
    assert len(machine.prefixes) == 0


def test_a_row_that_joins_one_is_not_alone(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, SMALLEST_KV_LENGTH)
    machine.seat(SMALLEST_KV_LENGTH - 1)
    assert machine.budget.must_shrink([machine.ready(SMALLEST_KV_LENGTH - 1)])


def test_prompts_that_memory_does_not_hold_together_do_not_come_together_where_nobody_is(
    model: LoadedModel, tmp_path: Path
) -> None:
    machine = Machine(model, tmp_path, 2 * SMALLEST_KV_LENGTH)
    rows = [machine.row(SMALLEST_KV_LENGTH - 1) for _ in range(2)]
    assert machine.budget.admits(rows[:1])
    assert not machine.budget.admits(rows)


def test_no_more_prefixes_make_way_than_have_to(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, SMALLEST_KV_LENGTH + 2 * PREFIX, prefixes=3)
    machine.seat(10)
    assert not machine.budget.must_shrink()
    assert len(machine.prefixes) == 2


def test_no_prefix_makes_way_for_a_row_that_waits_all_the_same(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, 2 * SMALLEST_KV_LENGTH + PREFIX + 11, prefixes=1)
    _, row = machine.seat(10), machine.seat(10)
    assert not machine.budget.admits([machine.row(10)])
    row.cached = SMALLEST_KV_LENGTH
    assert machine.budget.must_shrink(), "a row leaves: there may be room enough then"
    row.cached = 10
    assert len(machine.prefixes) == 1
    machine.batch.leave(machine.batch.rows[0])
    assert machine.budget.admits([machine.row(10)]), "what the row that left took is room enough, next to the prefix"
    assert len(machine.prefixes) == 1


def test_a_row_that_the_batch_has_room_for_costs_nothing(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, 3 * SMALLEST_KV_LENGTH)
    for _ in range(3):
        machine.seat(10)
    machine.batch.leave(machine.batch.rows[0])
    assert not machine.budget.must_shrink([machine.ready(19)])


def test_what_the_batch_has_is_no_growth_of_it(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, 3 * SMALLEST_KV_LENGTH)
    for _ in range(2):
        machine.seat(10)
    assert not machine.budget.must_shrink([machine.ready(19)]), "a third row takes what each of them has, and no more"


@pytest.mark.parametrize("length", [SMALLEST_KV_LENGTH - 1, SMALLEST_KV_LENGTH])
def test_a_prompt_is_admitted_with_a_place_for_its_next_token(model: LoadedModel, tmp_path: Path, length: int) -> None:
    """Its prefill takes a column for each of its tokens and the next; the batch then a second place of whole size."""
    machine = Machine(model, tmp_path, 3 * SMALLEST_KV_LENGTH)
    machine.seat(10)
    assert machine.budget.admits([machine.row(length)]) == (length < SMALLEST_KV_LENGTH)


def test_a_prompt_that_nobody_could_make_way_for_is_admitted(model: LoadedModel, tmp_path: Path) -> None:
    machine = Machine(model, tmp_path, SMALLEST_KV_LENGTH, prefixes=1)
    assert machine.budget.admits([machine.row(SMALLEST_KV_LENGTH - 1)])
    assert len(machine.prefixes) == 0


def test_what_recurrent_layers_keep_of_a_row_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else rows come in as if they were free, have to leave at once, and are prefilled again in each step."""
    model = bridged.bridged("mamba2")
    limit = 9 * model.decoder.kv_sizes.state_bytes
    pool = AdapterPool(model, AdapterStore(tmp_path))
    driver = Driver(model, pool, slots=16, kv_bytes=limit, prefix_share=0.0)
    begun, most = Counter[int](), [0]
    plain = Prefill.__init__

    def counted(prefill: Prefill, *given: Any, **named: Any) -> None:
        plain(prefill, *given, **named)
        begun.update(id(row) for row in prefill.rows)
        most.append(driver.lane.batch.nbytes + prefill.kv.nbytes)

    monkeypatch.setattr(Prefill, "__init__", counted)
    sent = [driver.send(request([10 + n, 9, 11] * 10, max_tokens=20, ignore_eos=True)) for n in range(12)]
    driver.run()
    assert [len(one.tokens) for one in sent] == [20] * 12
    assert set(begun.values()) == {1}
    assert max(most) <= limit


def test_no_more_rows_make_way_than_have_to(model: LoadedModel, tmp_path: Path) -> None:
    """Three rows grow beyond 256 positions, and memory holds two of 384."""
    pool = AdapterPool(model, AdapterStore(tmp_path))
    driver = apart(Driver(model, pool, slots=3, kv_bytes=280_000, prefix_share=0.0))
    for number in range(3):
        driver.send(request([3 + number, 4] * 115, max_tokens=50, ignore_eos=True))
        driver.step()
        driver.step()
    while not driver.lane.preempted:
        driver.step()
    assert len(driver.lane.batch.rows) == 2


def test_a_long_row_that_joins_counts_with_its_length_when_others_have_made_way(
    model: LoadedModel, tmp_path: Path
) -> None:
    limit = 1_000_000
    pool = AdapterPool(model, AdapterStore(tmp_path))
    driver = Driver(model, pool, slots=12, kv_bytes=limit, prefix_share=0.0)

    def short(priority: int) -> None:
        for number in range(3):
            driver.send(request([3 + number, 4], max_tokens=150, priority=priority, ignore_eos=True))

    short(9)
    for _ in range(5):
        driver.step()
    driver.send(request([9, 8, 7] * 200, max_tokens=50, priority=5, ignore_eos=True))
    driver.step()
    assert driver.lane.prefilling
    short(0)
    while driver.lane.busy:
        driver.step()
        assert driver.lane.kv_bytes <= limit

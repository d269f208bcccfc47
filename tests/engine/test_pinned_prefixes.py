"""Pinned prefixes: prefilled for nobody, kept in memory and on disk while other things come, and found by every job."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.checkpoints.loading import LoadedModel
from engine.engine import Engine
from engine.generation import prompt
from engine.generation.limits import LaneLimits
from engine.generation.pinning import Pinning
from engine.models.key_values import SMALLEST_KV_LENGTH, KeyValues
from engine.models.kv_sizes import bytes_per_token
from engine.models.llama import Llama
from engine.prefixes import folder, shelf
from engine.prefixes.disk import DiskLimits
from engine.prefixes.folder import SHORTEST, PrefixFolder
from engine.prefixes.memory import PrefixCache
from engine.prefixes.pins import Beginning, bytes_together
from engine.ticket import Ticket
from stoker.contract import ChatMessage, GenerateRequest, GenerateResult
from stoker.contract.requests import LOWEST_PRIORITY, MAX_PROMPT_IDS
from stoker.errors import InvalidRequest, StokerError, UnknownAdapter
from tests import endless
from tests.engine import bridged, tiny
from tests.engine.test_generate_lane import request
from tests.engine.test_prefix_disk import ASKED, FORM, LIMIT, SYSTEM, Machine, Worker, at_once, cached, entry, size_of

OWNER, OTHER = "a" * 64, "b" * 64


class Pinned(Pinning):
    """Of a worker whose lane runs where it is asked to."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        super().__init__(worker.lane, at_once, self._begin)

    def _begin(self, request: GenerateRequest) -> Ticket[GenerateResult]:
        ticket: Ticket[GenerateResult] = Ticket("pinned", "generate", priority=request.priority, quiet=True)
        self.worker.lane.admit(self.worker.lane.prepare(ticket, request, None))
        self.worker.run()
        return ticket

    def ready(self, ids: Sequence[int], adapter: str | None = None) -> Beginning:
        """Pinned, prefilled and saved."""
        made = self.beginning(GenerateRequest(model="tiny", prompt_ids=tuple(ids), adapter=adapter))
        self.pin([made])
        self.prefill(made).result(0)
        self.save(made)
        return made


@pytest.fixture
def model(tiny_llama: Llama) -> LoadedModel:
    return tiny.loaded(tiny_llama, eos_ids=[])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# --- what is common to all prompts behind it ---


def test_a_text_shares_with_what_follows_all_except_what_may_be_joined(machine: Machine, model: LoadedModel) -> None:
    pinned = Pinned(machine.worker(model))
    made = pinned.beginning(request(SYSTEM))
    assert list(made.ids) == SYSTEM[:-1], "a letter more makes its last word another token"
    assert made.nbytes == len(made.ids) * model.decoder.kv_sizes.token_bytes


def test_the_first_messages_share_what_their_template_writes_before_the_next(
    machine: Machine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt, "FOLLOWING", ("t3", "t4"))
    model.tokenizer.templates["default"] = (
        "{% for m in messages %}t9 t{{ m['role'] | length }} {{ m['content'] }} t8 {% endfor %}t7"
    )
    pinned = Pinned(machine.worker(model))
    system = ChatMessage(role="system", content=tiny.text(SYSTEM))
    made = pinned.beginning(GenerateRequest(model="tiny", messages=(system,)))
    # A role is the token of its length.
    assert list(made.ids) == [9, 6, *SYSTEM, 8, 9, 4]
    asked = ChatMessage(role="user", content="t5")
    example = pinned.beginning(GenerateRequest(model="tiny", messages=(system, asked)))
    assert list(example.ids) == [9, 6, *SYSTEM, 8, 9, 4, 5, 8, 9, 9], "an answer may follow"


def test_what_can_be_no_prompt_is_refused(machine: Machine, model: LoadedModel) -> None:
    pinned = Pinned(machine.worker(model))
    with pytest.raises(InvalidRequest, match="prompt_ids: token 4000 given"):
        pinned.beginning(GenerateRequest(model="tiny", prompt_ids=(4000,)))
    with pytest.raises(UnknownAdapter, match="'none' given"):
        pinned.beginning(request(SYSTEM, adapter="none"))
    with pytest.raises(InvalidRequest, match="no chat template"):
        pinned.beginning(GenerateRequest(model="tiny", messages=(ChatMessage(role="system", content="x"),)))


class Panic(BaseException):
    """As a library in Rust raises."""


def test_a_panic_of_a_library_is_an_error_of_this_prefix(
    machine: Machine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(text: str) -> list[int]:
        raise Panic("index out of range")

    monkeypatch.setattr(model.tokenizer, "encode", panic)
    with pytest.raises(StokerError, match="index out of range"):
        Pinned(machine.worker(model)).beginning(request(SYSTEM))


# --- room ---


def test_pins_take_half_of_what_memory_has_for_prefixes(machine: Machine, model: LoadedModel) -> None:
    token = model.decoder.kv_sizes.token_bytes
    pinned = Pinned(Worker(model, AdapterPool(model, machine.store), kv_bytes=8 * 100 * token))
    made = pinned.beginning(GenerateRequest(model="tiny", prompt_ids=tuple(SYSTEM)))
    pinned.check(made, [])
    with pytest.raises(InvalidRequest, match=r"of memory .*may take .* and have .*unpin another"):
        pinned.check(made, [Beginning(None, (1,), 1)])
    with pytest.raises(InvalidRequest, match=r"3 tokens given .* at least"):
        pinned.check(Beginning(None, (1, 2, 3), 1), [])


def test_what_pins_begin_alike_with_takes_its_room_once(machine: Machine, model: LoadedModel) -> None:
    room = 120 * model.decoder.kv_sizes.token_bytes
    pinned = Pinned(Worker(model, AdapterPool(model, machine.store), kv_bytes=8 * room))
    first, second, third, other = (
        pinned.beginning(GenerateRequest(model="tiny", prompt_ids=ids))
        for ids in ((*SYSTEM, 7), (*SYSTEM, *[8] * 10), (*SYSTEM, *[9] * 10), tuple(SYSTEM[1:]))
    )
    pinned.check(second, [first])
    pinned.check(first, [first, second])
    for one in (third, other, replace(first, adapter=("style", 1))):
        with pytest.raises(InvalidRequest, match="of memory"):
            pinned.check(one, [first, second])
    for one in (first, second):
        pinned.ready(one.ids)
    assert pinned.worker.lane.prefixes.nbytes == pinned.worker.lane.bytes_of([first, second])


def test_what_is_pinned_under_two_names_takes_its_room_once_with_its_states() -> None:
    pin = Beginning(None, tuple(SYSTEM), 7 * len(SYSTEM) + 1000)
    longer = Beginning(None, (*SYSTEM, 7), pin.nbytes + 7)
    assert bytes_together([pin, replace(pin)], 7, 4) == pin.nbytes
    assert bytes_together([pin, longer], 7, 4) == pin.nbytes + 7 + 1000, "the states behind each of them"


@pytest.mark.parametrize("seed", range(5))
def test_pins_take_what_memory_keeps_of_them(tiny_llama: Llama, seed: int) -> None:
    random, shortest = np.random.default_rng(seed), 4
    cache = PrefixCache(1 << 30, shortest=shortest)
    beginnings: list[Beginning] = []
    for _ in range(12):
        # Some begin as one before does, for more or fewer tokens than are kept once, some are it, or a part of it.
        known = beginnings[random.integers(len(beginnings))].ids if beginnings else ()
        own = () if random.random() < 0.2 else tuple(random.integers(3, 5, size=9).tolist())
        ids = (*known[: random.integers(20)], *own) or (3,)
        adapter = (None, ("style", 1), ("style", 2))[random.integers(3)]
        beginnings.append(Beginning(adapter, (*ids, 3, 3, 3), 0))
    token = tiny_llama.kv_sizes.token_bytes
    beginnings = [replace(each, nbytes=len(each.ids) * token) for each in beginnings]
    cache.pin((each.adapter, each.ids) for each in beginnings)
    for each in beginnings:
        cache.put(each.adapter, each.ids, KeyValues(tiny_llama, 1, len(each.ids)))
    assert all(cache.has(each.adapter, each.ids) for each in beginnings)
    assert bytes_together(beginnings, token, shortest) == cache.nbytes < sum(each.nbytes for each in beginnings)


def test_pins_take_half_of_the_disk_with_those_of_other_models(machine: Machine, model: LoadedModel) -> None:
    made = Beginning(None, tuple(SYSTEM), 0)
    taken = machine.shelf(model).size(made)
    machine.limit = 4 * taken
    pinned = Pinned(machine.worker(model))
    pinned.check(made, [made])
    with pytest.raises(InvalidRequest, match="of the disk"):
        pinned.check(made, [made, made])
    other = Pinned(machine.worker(model, "other weights"))
    other.pin([made])
    pinned.check(made, [])
    with pytest.raises(InvalidRequest, match="of the disk"):
        pinned.check(made, [made])
    other.pin([])
    pinned.check(made, [made])


def test_one_that_is_longer_than_an_entry_may_be_is_refused(
    machine: Machine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "LARGEST", 1 << 10)
    with pytest.raises(InvalidRequest, match="100 tokens given, whose keys and values take"):
        machine.shelf(model).size(Beginning(None, tuple(SYSTEM), 0))


# --- memory ---


def test_pinned_entries_make_way_last_and_for_no_other_prefix(tiny_llama: Llama) -> None:
    def kv() -> KeyValues:
        return KeyValues(tiny_llama, 1, 60)

    cache = PrefixCache(3 * kv().nbytes)
    cache.pin([("base", [1] * 60)])
    for number in range(1, 8):
        cache.put("base", [number] * 60, kv())
    assert [cache.has("base", [number] * 60) for number in (1, 5, 6, 7)] == [True, False, True, True]
    assert cache.nbytes <= cache.limit
    cache.evict()
    cache.evict()
    assert [len(cache), cache.has("base", [1] * 60)] == [1, True]
    assert cache.evict(), "a running row needs the room"
    cache.pin([("base", [number] * 60) for number in (1, 2, 3)])
    for number in range(1, 5):
        cache.put("base", [number] * 60, kv())
    assert [len(cache), cache.has("base", [4] * 60)] == [3, False]


def test_no_entry_makes_way_for_one_that_pins_leave_no_room_for(tiny_llama: Llama) -> None:
    kept = KeyValues(tiny_llama, 1, SHORTEST)
    prefixes = PrefixCache(4 * kept.nbytes)
    pinned, other, long = ([token] * SHORTEST for token in (3, 4, 5))
    prefixes.pin([(None, pinned)])
    for tokens in (pinned, other):
        prefixes.put(None, tokens, kept)
    prefixes.put(None, 4 * long, KeyValues(tiny_llama, 1, 4 * SHORTEST))
    assert [prefixes.has(None, tokens) for tokens in (pinned, other, 4 * long)] == [True, True, False]
    prefixes.put(None, 3 * long, KeyValues(tiny_llama, 1, 3 * SHORTEST))
    assert [prefixes.has(None, tokens) for tokens in (pinned, other, 3 * long)] == [True, False, True]


def test_an_owner_with_other_tokens_is_not_pinned(tiny_llama: Llama) -> None:
    kv = KeyValues(tiny_llama, 1, 60)
    cache = PrefixCache(kv.nbytes)
    cache.pin([("other", [1] * 60), ("base", [2] * 60)])
    cache.put("base", [1] * 60, kv)
    cache.put("base", [2] * 60, KeyValues(tiny_llama, 1, 60))
    assert cache.has("base", [2] * 60)


# --- from the pin to the job ---


@pytest.mark.parametrize("adapter", [None, "one@1"])
def test_the_first_job_finds_what_was_prefilled_for_nobody(
    machine: Machine, model: LoadedModel, adapter: str | None
) -> None:
    AdapterPool(model, machine.store).save("one", tiny.adapter(model, 2, 1), {})
    worker = machine.worker(model)
    made = Pinned(worker).ready(SYSTEM, adapter)
    assert [made.adapter, len(machine.files), len(worker.sent)] == [("one", 1) if adapter else None, 1, 0]
    worker.assert_empty()
    how: dict[str, Any] = {"adapter": adapter, "temperature": 0.8, "seed": 3}
    (found,) = worker.answers(ASKED[:1], **how)
    (wanted,) = Worker(model, AdapterPool(model, machine.store)).answers(ASKED[:1], **how)
    assert [cached(found), found.ids] == [len(SYSTEM), wanted.ids]


def test_it_stays_while_more_rows_wait_than_memory_has_room_for(machine: Machine, model: LoadedModel) -> None:
    room = 3 * SMALLEST_KV_LENGTH + len(SYSTEM) + 40
    worker = machine.worker(model, slots=8, kv_bytes=room * bytes_per_token(model.decoder))
    made = Pinned(worker).ready(SYSTEM)
    running = [worker.send(request([number, 3], max_tokens=200)) for number in range(4, 9)]
    while not worker.lane.batch.rows:
        worker.step()
    worker.step()
    assert worker.lane.waiting, "memory is short"
    assert worker.lane.prefixes.has(None, made.ids)
    worker.run()
    assert {sent.result.finish_reason for sent in running} == {"length"}


def test_it_is_prefilled_behind_all_that_clients_asked_for(machine: Machine, model: LoadedModel) -> None:
    pinned = Pinned(machine.worker(model))
    made = pinned.beginning(GenerateRequest(model="tiny", prompt_ids=tuple(SYSTEM)))
    assert pinned.prefill(made).priority == LOWEST_PRIORITY


def test_one_of_more_tokens_than_a_request_may_name_is_prefilled(machine: Machine, model: LoadedModel) -> None:
    asked: list[GenerateRequest] = []

    def submit(request: GenerateRequest) -> Ticket[GenerateResult]:
        asked.append(request)
        return Ticket("pinned", "generate")

    ids = (3, 4, 5) * (MAX_PROMPT_IDS // 3 + 1)
    Pinning(machine.worker(model).lane, at_once, submit).prefill(Beginning(None, ids, 0))
    assert [request.prompt_ids for request in asked] == [ids]


def test_a_worker_that_starts_again_has_it_from_the_disk_at_once(machine: Machine, model: LoadedModel) -> None:
    made = Pinned(machine.worker(model)).ready(SYSTEM)
    again = machine.worker(model)
    pinned = Pinned(again)
    assert [pinned.in_memory(made), pinned.on_disk(made)] == [False, True]
    (found,) = again.answers(ASKED[:1])
    assert [cached(found), again.hits] == [len(SYSTEM), 1]
    third = Pinned(machine.worker(model))
    ticket = third.prefill(made)
    assert ticket.result(0).usage.cached_tokens == len(SYSTEM) - 1, "a token's pass alone"
    assert third.in_memory(made)


def test_a_recurrent_model_serves_a_pin_to_all_prompts_behind_it(machine: Machine) -> None:
    model = bridged.bridged("lfm2")
    worker = machine.worker(model)
    Pinned(worker).ready(SYSTEM)
    (found,) = worker.answers([[*SYSTEM, 7, 8, 9]])
    (wanted,) = Worker(model, AdapterPool(model, machine.store)).answers([[*SYSTEM, 7, 8, 9]])
    assert [cached(found), found.ids] == [len(SYSTEM), wanted.ids]


def test_a_pin_outlives_a_step_that_failed(machine: Machine, model: LoadedModel) -> None:
    worker = machine.worker(model, kv_bytes=8 * 100 * model.decoder.kv_sizes.token_bytes)
    pinned = Pinned(worker)
    made = pinned.ready(SYSTEM)
    worker.lane.fail_all(RuntimeError("a device that failed"))
    assert not pinned.in_memory(made)
    pinned.prefill(made)
    other = np.random.default_rng(9).integers(3, 60, (3, 100)).tolist()
    worker.answers(other)
    assert pinned.in_memory(made), "what comes later takes no pinned place"


def test_a_short_one_is_in_memory_alone(machine: Machine, model: LoadedModel) -> None:
    pinned = Pinned(machine.worker(model))
    made = pinned.ready(SYSTEM[: SHORTEST - 1])
    assert [pinned.in_memory(made), pinned.on_disk(made), machine.files] == [True, False, []]


def test_without_a_disk_memory_keeps_it(machine: Machine, model: LoadedModel) -> None:
    pinned = Pinned(Worker(model, AdapterPool(model, machine.store)))
    made = pinned.ready(SYSTEM)
    assert [pinned.in_memory(made), pinned.on_disk(made)] == [True, False]


def test_one_is_written_next_to_a_longer_entry_that_begins_so(machine: Machine, model: LoadedModel) -> None:
    """The longer one may go at any time."""
    worker = machine.worker(model)
    worker.answers([[*SYSTEM, 5, 6], [*SYSTEM, 5, 6, 7]])
    assert len(machine.files) == 1
    pinned = Pinned(worker)
    made = pinned.ready(SYSTEM)
    assert [pinned.on_disk(made), len(machine.files)] == [True, 2]
    pinned.save(made)
    assert len(machine.files) == 2


def test_a_disk_without_room_says_so_and_memory_has_it(machine: Machine, model: LoadedModel) -> None:
    worker = machine.worker(model)
    made = Pinned(worker).beginning(GenerateRequest(model="tiny", prompt_ids=tuple(SYSTEM)))
    machine.limit = machine.shelf(model).size(made) - 1
    small = Pinned(machine.worker(model))
    small.prefill(made)
    with pytest.raises(OSError, match="nearly full"):
        small.save(made)
    assert small.in_memory(made)


# --- the folder ---


def tokens(number: int) -> np.ndarray:
    return np.full(SHORTEST, number, dtype=np.int32)


def place(root: Path, entries: int) -> PrefixFolder:
    return PrefixFolder(root, size_of(entries), reserve=0)


def pin(at: PrefixFolder, *numbers: int, owner: str = OWNER) -> None:
    at.pin(owner, [("owner", tokens(number), 1000) for number in numbers])


def here(at: PrefixFolder, *numbers: int) -> list[bool]:
    return [at.holds("owner", tokens(number)) for number in numbers]


def aged(root: Path, *numbers: int) -> None:
    """Let these have served last an hour ago, the first one first."""
    at = place(root, 9)
    assert FORM is not None
    for number in numbers:
        found = at.find("owner", tokens(number), FORM)
        assert found is not None
        os.utime(found.path, (number, number))


def test_pinned_files_stay_where_others_make_room_also_for_other_processes(tmp_path: Path) -> None:
    at = place(tmp_path, 3)
    pin(at, 1)
    for number in (1, 2, 3):
        assert entry(at, number)
    aged(tmp_path, 1, 2, 3)
    assert entry(place(tmp_path, 3), 4)
    assert here(at, 1, 2, 3, 4) == [True, False, True, True]
    pin(at)
    assert entry(place(tmp_path, 3), 5)
    assert here(at, 1) == [False], "it is pinned no more"
    assert not list(tmp_path.glob("*.pins"))


def test_what_pins_leave_no_room_for_is_not_written(tmp_path: Path) -> None:
    at = place(tmp_path, 2)
    pin(at, 1, 2)
    assert [entry(at, number) for number in (1, 2, 3)] == [True, True, False]
    assert here(at, 1, 2, 3) == [True, True, False]


def test_one_model_s_pins_are_not_another_s(tmp_path: Path) -> None:
    at = place(tmp_path, 2)
    pin(at, 1)
    pin(at, 2, 3, owner=OTHER)
    assert [at.pinned_bytes(without=owner) for owner in (OWNER, OTHER, "")] == [2000, 1000, 3000]
    pin(at)
    assert at.pinned_bytes(without="") == 2000


def test_pins_whose_model_is_long_gone_keep_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = place(tmp_path, 1)
    pin(at, 1)
    assert entry(at, 1)
    assert not entry(at, 2)
    monkeypatch.setattr(folder, "PINS_LAST", -1.0)
    assert entry(at, 2)
    assert not list(tmp_path.glob("*.pins"))


@pytest.mark.parametrize("content", [b"\xff", b"no bytes", b"x y z\n1", b"../../etc/passwd 5"])
def test_a_list_of_pins_that_another_program_wrote_keeps_nothing(tmp_path: Path, content: bytes) -> None:
    at = place(tmp_path, 1)
    (tmp_path / f"{OWNER}.pins").write_bytes(content)
    assert entry(at, 1)
    assert entry(at, 2)
    assert here(at, 1, 2) == [False, True]


# --- the engine ---


def test_an_engine_prefills_for_nobody_and_publishes_nothing(tmp_path: Path) -> None:
    system = [token % 20 + 3 for token in SYSTEM]
    published: list[Any] = []
    engine = Engine(
        {endless.MODEL: (str(endless.write(tmp_path)),)}, adapters=tmp_path / "adapters", publish=published.extend,
        limits=LaneLimits(compiled="none"), prefixes=DiskLimits(tmp_path / "prefixes", LIMIT),
    )  # fmt: skip
    engine.start()
    try:
        pinning = engine.pinning(endless.MODEL)
        assert pinning is not None
        assert engine.pinning("other") is None
        made = pinning.beginning(GenerateRequest(model=endless.MODEL, prompt_ids=tuple(system)))
        pinning.pin([made])
        assert pinning.prefill(made).result(60).usage.completion_tokens == 1
        pinning.save(made)
        assert [pinning.in_memory(made), pinning.on_disk(made), published] == [True, True, []]
        asked = GenerateRequest(model=endless.MODEL, prompt_ids=(*system, 5), max_tokens=2)
        assert engine.submit("job", asked).result(60).usage.cached_tokens == len(system)
        assert len(published) == 2
    finally:
        engine.stop()
    assert engine.idle

"""Adapters: on disk whole or not at all, in memory by version, in one batch as each alone."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters import peft
from engine.adapters import pool as pool_module
from engine.adapters.lane import AdapterLane
from engine.adapters.lora import LoraConfig, LoraWeights, adapted_norms, dropout_keys, initialise, square_norms
from engine.adapters.peft import CONFIG_FILE, WEIGHTS_FILE
from engine.adapters.pool import BASE, AdapterPool
from engine.adapters.store import NOTES_FILE, AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.ticket import Ticket
from engine.weights import safetensors
from stoker.contract import AdapterRequest
from stoker.contract.bundle import AdapterInput
from stoker.errors import ModelError, UnknownAdapter, WorkerUnavailable
from stoker.files import durable
from tests import powercut
from tests.engine import tiny
from tests.engine.test_peft import write_mlx_lm

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture
def pool(model: LoadedModel, store: AdapterStore) -> AdapterPool:
    return AdapterPool(model, store)


def logits(model: LoadedModel, adapters: Any, rows: int = 1) -> np.ndarray:
    found = model.decoder.logits(model.decoder(mx.array(TOKENS * rows), adapters=adapters))
    return np.array(found)


def alone(model: LoadedModel, weights: LoraWeights) -> np.ndarray:
    first: np.ndarray = logits(model, tiny.trainable(model, weights))[0]
    return first


def folder_of(store: AdapterStore, name: str, version: int) -> Path:
    return store.folder("tiny", name, version)


def test_an_adapter_is_read_as_it_was_written(model: LoadedModel, store: AdapterStore) -> None:
    weights = tiny.adapter(model, rank=3, seed=1)
    assert store.write("tiny", "style", weights, {"job": "j"}) == 1
    found = store.read("tiny", "style", 1, model.linear_shapes)
    assert found.config == LoraConfig(3, 6.0, tuple(sorted(tiny.LAYERS)))
    assert found.matrices.keys() == weights.matrices.keys()
    for name, pair in weights.matrices.items():
        for side in "ab":
            assert np.array_equal(np.array(found.matrices[name][side]), np.array(pair[side])), name


def test_the_files_are_those_of_peft(model: LoadedModel, store: AdapterStore) -> None:
    store.write("tiny", "style", tiny.adapter(model, rank=3, seed=1, targets=("q_proj",)), {"job": "j"})
    folder = folder_of(store, "style", 1)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "stoker.json"]
    shapes = {name: array.shape for name, array in safetensors.read(folder / WEIGHTS_FILE).items()}
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    assert shapes[f"{layer}.lora_A.weight"] == (3, 32)
    assert shapes[f"{layer}.lora_B.weight"] == (32, 3)
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    assert config["target_modules"] == ["q_proj"]
    assert json.loads((folder / "stoker.json").read_text()) == {"job": "j"}


def test_each_write_is_a_new_version(model: LoadedModel, store: AdapterStore) -> None:
    versions = [store.write("tiny", "style", tiny.adapter(model, 2, seed), {}) for seed in range(3)]
    assert versions == [1, 2, 3]
    assert store.resolve("tiny", "style") == ("style", 3)
    assert store.resolve("tiny", "style@2") == ("style", 2)
    with pytest.raises(UnknownAdapter, match="of style there are 1, 2, 3"):
        store.resolve("tiny", "style@4")
    assert store.names("tiny") == ["style"]
    assert store.names("other") == []


def test_writers_at_the_same_time_never_share_a_version(store: AdapterStore) -> None:
    found: list[int] = []

    # Files only: MLX's arrays belong to the thread that made them.
    def write(number: int) -> None:
        found.append(store.install("tiny", "style", lambda draft: (draft / "file").write_text(str(number))))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(1, 9))


@pytest.mark.parametrize("part", ["safetensors", "text", "rename"])
def test_a_write_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, model: LoadedModel, store: AdapterStore, part: str
) -> None:
    store.write("tiny", "style", tiny.adapter(model, 2, 0), {})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    targets = {
        "safetensors": (safetensors, "write"),
        "text": (peft, "write_json"),
        "rename": (os, "rename"),
    }
    monkeypatch.setattr(*targets[part], full)
    with pytest.raises(OSError, match="No space"):
        store.write("tiny", "style", tiny.adapter(model, 2, 1), {})
    monkeypatch.undo()
    assert [path.name for path in store.folder("tiny", "style", 1).parent.iterdir()] == ["1"]
    assert store.resolve("tiny", "style") == ("style", 1)


def test_a_version_is_there_whole_or_not_whenever_the_power_fails(model: LoadedModel, tmp_path: Path) -> None:
    """Written by training, and installed from the artifact store."""
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    mx.eval(weights.matrices)
    disk_folder = tmp_path / "disk"
    disk_folder.mkdir()

    trained = AdapterStore(disk_folder / "adapters")

    def copy(draft: Path) -> None:
        for path in folder_of(trained, "style", 1).iterdir():
            (draft / path.name).write_bytes(path.read_bytes())

    with powercut.recorded(disk_folder) as disk:
        store = AdapterStore(disk_folder / "adapters")
        for version in (1, 2):
            store.write("tiny", "style", weights, {"job": "j"}, version)
            disk.mark(str(version))
        store.install("tiny", "other", copy, 1)
        disk.mark("3")
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            found = AdapterStore(after / "adapters")
            there = [(name, n) for name, n in (("style", 1), ("style", 2), ("other", 1)) if found.has("tiny", name, n)]
            assert len(there) >= (int(cut.marks[-1]) if cut.marks else 0), cut
            for name, n in there:
                read = found.read("tiny", name, n, model.linear_shapes).matrices
                for layer, sides in weights.matrices.items():
                    assert all(mx.array_equal(read[layer][side], sides[side]) for side in "ab"), cut


def test_drafts_of_writers_that_died_are_swept_when_a_worker_starts(store: AdapterStore) -> None:
    home = store.folder("tiny", "style", 1).parent
    (home / f"{durable.DRAFT}x").mkdir(parents=True)
    (home / f"{durable.DRAFT}x" / "half").write_text("half")
    store.install("tiny", "other", lambda draft: (draft / "file").write_text("x"))
    assert list(home.iterdir())
    store.sweep()
    assert not list(home.iterdir())
    assert store.names("tiny") == ["other"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more_leaves_the_versions_there_are(
    model: LoadedModel, store: AdapterStore, error: int
) -> None:
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    mx.eval(weights.matrices)
    store.write("tiny", "style", weights, {})
    calls = 0
    for raised in powercut.each_refusal(error, lambda: store.write("tiny", "style", weights, {}, 2)):
        calls += 1
        assert raised is None or (isinstance(raised, OSError) and raised.errno == error), raised
        for version in range(1, store.newest("tiny", "style") + 1):
            store.read("tiny", "style", version, model.linear_shapes)
    store.sweep()
    assert calls > 8
    assert sorted(path.name for path in folder_of(store, "style", 1).parent.iterdir()) == ["1", "2"]


def test_an_unknown_adapter_is_refused_with_those_there_are(model: LoadedModel, store: AdapterStore) -> None:
    with pytest.raises(UnknownAdapter, match="'style' given; tiny has: none"):
        store.resolve("tiny", "style")
    store.write("tiny", "other", tiny.adapter(model, 2, 0), {})
    with pytest.raises(UnknownAdapter, match=r"tiny has: other.*stoker train style"):
        store.resolve("tiny", "style")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def retensor(path: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    tensors = dict(safetensors.read(path))
    mx.eval(tensors)
    change(tensors)
    safetensors.write(path, tensors)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _first(tensors: dict[str, mx.array], side: str) -> str:
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def _misshape(tensors: dict[str, mx.array]) -> None:
    tensors[_first(tensors, "A")] = mx.zeros((3, 33))


def _drop(tensors: dict[str, mx.array]) -> None:
    del tensors[_first(tensors, "B")]


def _add(tensors: dict[str, mx.array]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = mx.zeros((3, 32))


def _empty(path: Path) -> None:
    rewrite(path, lambda fields: fields.update(target_modules=[]))
    retensor(path.with_name(WEIGHTS_FILE), dict.clear)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut off": (WEIGHTS_FILE, _cut, "cut off"),
    "empty": (WEIGHTS_FILE, lambda path: path.write_bytes(b""), "too few"),
    "missing weights": (WEIGHTS_FILE, lambda path: path.unlink(), "No such file"),
    "another shape": (WEIGHTS_FILE, lambda path: retensor(path, _misshape), r"is \(33, 3\); this model and rank need"),
    "a matrix too few": (WEIGHTS_FILE, lambda path: retensor(path, _drop), "lacks lora_B"),
    "a layer too many": (WEIGHTS_FILE, lambda path: retensor(path, _add), "belongs to no layer"),
    "no configuration": (CONFIG_FILE, lambda path: path.unlink(), "no adapter_config.json in it"),
    "damaged configuration": (CONFIG_FILE, _cut, "not readable as JSON"),
    "no rank": (CONFIG_FILE, lambda path: rewrite(path, lambda f: f.pop("r")), "rank null; allowed: 1 to 256"),
    "a rank of 0": (CONFIG_FILE, lambda path: rewrite(path, lambda f: f.update(r=0)), "rank 0; allowed: 1 to 256"),
    "a rank that is no number": (
        CONFIG_FILE,
        lambda path: rewrite(path, lambda f: f.update(r=True)),
        "rank true; allo",
    ),
    "an alpha that is no number": (
        CONFIG_FILE,
        lambda path: rewrite(path, lambda f: f.update(lora_alpha=True)),
        "lora_alpha true; expected a numb",
    ),
    "no layers": (
        CONFIG_FILE,
        _empty,
        "no adapter in it",
    ),
    "another rank": (CONFIG_FILE, lambda path: rewrite(path, lambda f: f.update(r=4)), "this model and rank need .*4"),
}


@pytest.mark.parametrize(("file", "damage", "why"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_adapter_is_refused_by_file_and_defect(
    model: LoadedModel, store: AdapterStore, file: str, damage: Callable[[Path], None], why: str
) -> None:
    store.write("tiny", "style", tiny.adapter(model, 3, 0), {})
    damage(folder_of(store, "style", 1) / file)
    with pytest.raises(ModelError, match=why) as error:
        store.read("tiny", "style", 1, model.linear_shapes)
    assert str(folder_of(store, "style", 1)) in str(error.value)


@pytest.mark.parametrize("fields", [{"peft_type": "IA3"}, {"lora_bias": True}, {"alpha_pattern": {"q_proj": 99}}])
def test_a_peft_adapter_of_another_kind_is_refused(
    model: LoadedModel, store: AdapterStore, fields: dict[str, Any]
) -> None:
    """Read as plain LoRA it would run with a wrong scale, silently."""
    store.write("tiny", "style", tiny.adapter(model, 3, 0), {})
    rewrite(folder_of(store, "style", 1) / CONFIG_FILE, lambda found: found.update(fields))
    with pytest.raises(ModelError, match=next(iter(fields))):
        store.read("tiny", "style", 1, model.linear_shapes)


@pytest.mark.parametrize(
    "fields", [{"layers_to_transform": [0]}, {"exclude_modules": ["layers.1.self_attn.q_proj"]}, {}], ids=str
)
def test_an_adapter_of_some_of_the_layers_says_so_or_is_refused(
    model: LoadedModel, tmp_path: Path, fields: dict[str, Any]
) -> None:
    whole = tiny.adapter(model, 3, 0, targets=("q_proj",))
    (first, _) = sorted(whole.matrices)
    peft.write(tmp_path, "tiny", LoraWeights(whole.config, {first: whole.matrices[first]}))
    rewrite(tmp_path / CONFIG_FILE, lambda found: found.update(fields))
    if fields:
        assert list(peft.read(tmp_path, model.linear_shapes).matrices) == [first]
        return
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj lacks lora_A"):
        peft.read(tmp_path, model.linear_shapes)


def test_a_fresh_adapter_changes_nothing_and_the_same_seed_makes_the_same(model: LoadedModel) -> None:
    config = LoraConfig(4, 8.0, ("q_proj", "down_proj"))
    first, second, other = (initialise(config, model.linear_shapes, seed) for seed in (1, 1, 2))
    assert {name.rpartition(".")[2] for name in first.matrices} == {"q_proj", "down_proj"}
    for name, sides in first.matrices.items():
        bound = model.linear_shapes[name][0] ** -0.5
        assert 0.9 * bound < mx.abs(sides["a"]).max().item() <= bound, "as PEFT draws it"
    name = next(iter(first.matrices))
    assert np.array_equal(np.array(first.matrices[name]["a"]), np.array(second.matrices[name]["a"]))
    assert not np.array_equal(np.array(first.matrices[name]["a"]), np.array(other.matrices[name]["a"]))
    assert np.array_equal(alone(model, first), logits(model, None)[0])


def test_each_layer_drops_other_inputs_and_the_same_whichever_is_named_first() -> None:
    names = sorted(tiny.LAYERS)
    keys = dropout_keys(names, mx.random.key(1))
    assert len({tuple(np.array(key).tolist()) for key in keys.values()}) == len(names)
    again = dropout_keys(reversed(names), mx.random.key(1))
    assert all(mx.array_equal(keys[name], again[name]) for name in names)


def test_adapters_of_any_rank_share_a_batch_and_equal_each_alone(model: LoadedModel, pool: AdapterPool) -> None:
    adapters = {
        "small": tiny.adapter(model, 2, 1),
        "large": tiny.adapter(model, 7, 2),
        "partial": tiny.adapter(model, 3, 3, targets=("v_proj",)),
    }
    for name, weights in adapters.items():
        pool.save(name, weights, {})
    order = ["large", None, "small", "partial", "large", None]
    rows = [pool.acquire(name) for name in order]
    found = logits(model, pool.rows(rows), len(order))
    base = logits(model, None)[0]
    for asked, row in zip(order, found, strict=True):
        wanted = base if asked is None else alone(model, adapters[asked])
        assert np.abs(row - wanted).max() < 1e-4, asked
        assert asked is None or np.abs(row - base).max() > 0.1, asked


def test_a_batch_of_the_bare_base_needs_no_adapters(pool: AdapterPool) -> None:
    assert pool.acquire(None) == BASE
    assert pool.rows([BASE, BASE]) is None


def test_the_newest_version_serves_while_an_old_one_is_held(model: LoadedModel, pool: AdapterPool) -> None:
    old, new = tiny.adapter(model, 2, 1), tiny.adapter(model, 4, 2)
    pool.save("style", old, {})
    held = pool.acquire("style")
    pool.save("style", new, {})
    fresh = pool.acquire("style")
    assert held != fresh
    assert set(pool.loaded) == {"style@1", "style@2"}
    found = logits(model, pool.rows([held, fresh]), 2)
    assert np.abs(found[0] - alone(model, old)).max() < 1e-4
    assert np.abs(found[1] - alone(model, new)).max() < 1e-4


def test_the_least_recently_used_goes_when_the_budget_is_full(model: LoadedModel, store: AdapterStore) -> None:
    pool = AdapterPool(model, store, budget=1)
    for seed in range(3):
        pool.save(f"a{seed}", tiny.adapter(model, 2, seed), {})
    pool.release(pool.acquire("a0"))
    held = pool.acquire("a2")
    pool.save("new", tiny.adapter(model, 2, 7), {})
    assert pool.loaded == ("a0@1", "new@1", "a2@1"), "a1 was used longest ago"
    pool.release(held)
    found = logits(model, pool.rows([pool.acquire("a1"), pool.acquire("a2")]), 2)
    for row, seed in zip(found, (1, 2), strict=True):
        assert np.abs(row - alone(model, tiny.adapter(model, 2, seed))).max() < 1e-4


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_that_takes_anothers_place_keeps_nothing_of_it(
    model: LoadedModel, store: AdapterStore, dora: bool
) -> None:
    """The first changes layers, ranks and gains that the second does not have."""
    pool, narrow = AdapterPool(model, store, budget=1), tiny.adapter(model, 2, 2, targets=("v_proj",))
    pool.save("wide", tiny.adapter(model, 7, 1, dora=dora), {})
    pool.save("other", tiny.adapter(model, 2, 3), {})
    pool.save("third", tiny.adapter(model, 2, 4), {})
    pool.save("narrow", narrow, {})
    assert pool.loaded == ("narrow@1", "other@1", "third@1")
    found = logits(model, pool.rows([pool.acquire("narrow")]))
    assert np.abs(found[0] - alone(model, narrow)).max() < 1e-4


def test_an_adapter_whose_place_was_half_taken_is_read_anew(
    model: LoadedModel, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of a DoRA adapter need the layer's weights as they are multiplied: memory for them may be short."""
    pool, first = AdapterPool(model, store, budget=1), tiny.adapter(model, 2, 0)
    pool.save("first", first, {})
    for seed in (1, 2):
        pool.save(f"a{seed}", tiny.adapter(model, 2, seed), {})
    store.write("tiny", "large", tiny.adapter(model, 2, 7, dora=True), {})
    left = iter(range(3))

    def short(*given: Any) -> mx.array:
        if next(left, None) is None:
            raise MemoryError("no memory for the norms")
        return square_norms(*given)

    with monkeypatch.context() as patch:
        patch.setattr(pool_module, "square_norms", short)
        with pytest.raises(MemoryError):
            pool.acquire("large")
    found = logits(model, pool.rows([pool.acquire("first")]))
    assert np.abs(found[0] - alone(model, first)).max() < 1e-4
    found = logits(model, pool.rows([pool.acquire("large")]))
    assert np.abs(found[0] - alone(model, store.read("tiny", "large", 1, model.linear_shapes))).max() < 1e-4


def test_one_that_is_given_back_by_one_request_is_held_for_the_others(model: LoadedModel, store: AdapterStore) -> None:
    pool = AdapterPool(model, store, budget=1)
    for seed in range(3):
        pool.save(f"a{seed}", tiny.adapter(model, 2, seed), {})
    rows = [pool.acquire("a0"), pool.acquire("a0")]
    pool.release(rows[0])
    for name in ("a1", "a2"):
        pool.release(pool.acquire(name))
    pool.save("new", tiny.adapter(model, 2, 7), {})
    assert pool.loaded == ("a0@1", "new@1", "a2@1"), "a0 was asked for longest ago, and is in use still"


def test_adapters_that_are_all_in_use_are_held_over_the_budget(model: LoadedModel, store: AdapterStore) -> None:
    pool = AdapterPool(model, store, budget=1)
    for seed in range(9):
        store.write("tiny", f"a{seed}", tiny.adapter(model, 2, seed), {})
    rows = [pool.acquire(f"a{seed}") for seed in range(9)]
    assert len(set(rows)) == 9
    found = logits(model, pool.rows(rows), 9)
    for row, seed in zip(found, range(9), strict=True):
        assert np.abs(row - alone(model, tiny.adapter(model, 2, seed))).max() < 1e-4


def test_stacks_are_doubled_only_within_the_budget_and_ranks_by_doubling(model: LoadedModel, tmp_path: Path) -> None:
    """So that the budget holds after the growth, and that adapters of many ranks compile few shapes."""
    one = AdapterPool(model, AdapterStore(tmp_path / "a"))
    for number in range(3):
        one.save(f"a{number}", tiny.adapter(model, 2, number), {})
    for budget, held in ((2 * one.bytes - 1, 3), (2 * one.bytes, 4)):
        pool = AdapterPool(model, AdapterStore(tmp_path / str(budget)), budget=budget)
        for number in range(4):
            pool.save(f"a{number}", tiny.adapter(model, 2, number), {})
        assert len(pool.loaded) == held
        assert pool.bytes <= budget
    one.save("large", tiny.adapter(model, 9, 9), {})
    rows = one.rows([one.acquire("large")])
    assert rows is not None
    assert rows.stacks["layers.0.self_attn.q_proj"]["a"].shape[-1] == 16


@pytest.mark.parametrize(
    ("small", "targets", "large"), [(2, tiny.LAYERS, 64), (8, ("q_proj",), 8)], ids=["a larger rank", "new layers"]
)
def test_places_that_nobody_uses_go_before_the_stacks_pass_the_budget(
    model: LoadedModel, tmp_path: Path, small: int, targets: tuple[str, ...], large: int
) -> None:
    alone = AdapterPool(model, AdapterStore(tmp_path / "alone"))
    alone.save("large", tiny.adapter(model, large, 9), {})
    pool = AdapterPool(model, AdapterStore(tmp_path / "many"), budget=alone.bytes)
    for number in range(15):
        pool.save(f"a{number}", tiny.adapter(model, small, number, targets), {})
    assert len(pool.loaded) == 15
    kept = pool.acquire("a0")
    before = logits(model, pool.rows([kept]))
    pool.save("large", tiny.adapter(model, large, 9), {})
    assert pool.bytes <= alone.bytes
    assert {"a0@1", "large@1"} <= set(pool.loaded)
    assert np.array_equal(logits(model, pool.rows([kept])), before)


def test_a_place_in_use_stays_though_the_stacks_pass_the_budget(model: LoadedModel, tmp_path: Path) -> None:
    pool = AdapterPool(model, AdapterStore(tmp_path), budget=1 << 20)
    for number in range(16):
        pool.save(f"a{number}", tiny.adapter(model, 2, number), {})
    last = pool.acquire("a15")
    assert last >= 16
    pool.save("large", tiny.adapter(model, 64, 9), {})
    assert pool.identity(last) == ("a15", 1)
    assert pool.bytes > 1 << 20


def test_loading_another_leaves_the_shapes_of_a_running_step(model: LoadedModel, store: AdapterStore) -> None:
    """So that nothing is compiled anew, and what runs stays the same bit for bit."""
    pool = AdapterPool(model, store)
    pool.save("one", tiny.adapter(model, 2, 1), {})
    row = pool.acquire("one")
    before = pool.rows([row])
    assert before is not None
    shapes = {(name, side): array.shape for name, stack in before.stacks.items() for side, array in stack.items()}
    text = logits(model, before)
    pool.save("two", tiny.adapter(model, 7, 2), {})
    after = pool.rows([row])
    assert after is not None
    assert {
        (name, side): array.shape for name, stack in after.stacks.items() for side, array in stack.items()
    } == shapes
    assert np.array_equal(logits(model, after), text)


@pytest.mark.parametrize("rank", [2, 40])
def test_an_adapter_for_which_the_stacks_cannot_grow_leaves_the_others_as_they_are(
    model: LoadedModel, pool: AdapterPool, store: AdapterStore, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """One that needs another place, and one that needs more rank too: no stream of another pays for the attempt."""
    for seed in range(4):
        store.write("tiny", f"style-{seed}", tiny.adapter(model, 2 if seed < 3 else rank, seed), {}, 1)
    rows = [pool.acquire(f"style-{seed}") for seed in range(3)]
    before, held = logits(model, pool.rows(rows), 3), pool.loaded
    plain, asked = mx.eval, pool.bytes

    def without_memory(*arrays: Any) -> None:
        if pool.bytes > asked:
            raise RuntimeError("no memory for larger stacks")
        plain(*arrays)

    monkeypatch.setattr(mx, "eval", without_memory)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            pool.acquire("style-3")
        assert (pool.bytes, pool.loaded) == (asked, held)
    assert np.array_equal(logits(model, pool.rows(rows), 3), before)
    monkeypatch.undo()
    last = pool.acquire("style-3")
    found = logits(model, pool.rows([*rows, last]), 4)
    assert np.abs(found[3] - alone(model, tiny.adapter(model, rank, 3))).max() < 1e-4


def test_a_version_that_is_dropped_serves_those_that_use_it_and_nobody_else(
    model: LoadedModel, pool: AdapterPool, store: AdapterStore
) -> None:
    store.write("tiny", "style", tiny.adapter(model, 2, 1), {}, 1)
    row = pool.acquire("style@1")
    before = logits(model, pool.rows([row]))
    store.set_aside("tiny", "style", 1)
    store.write("tiny", "style", tiny.adapter(model, 2, 5), {}, 1)
    pool.drop("style", 1)
    assert not pool.loaded
    now = pool.acquire("style@1")
    assert now != row
    assert pool.identity(now) == ("style", 1) != pool.identity(row)
    assert np.array_equal(logits(model, pool.rows([row])), before)
    assert not np.array_equal(logits(model, pool.rows([now])), before)
    pool.release(row)
    assert pool.identity(row) is None, "its place is free"
    assert list(pool.loaded) == ["style@1"]


def test_a_version_is_dropped_from_memory(model: LoadedModel, pool: AdapterPool) -> None:
    pool.save("style", tiny.adapter(model, 2, 1), {})
    for _ in range(2):
        pool.drop("style", 1)
    assert pool.loaded == ()
    found = logits(model, pool.rows([pool.acquire("style")]))
    assert np.abs(found[0] - alone(model, tiny.adapter(model, 2, 1))).max() < 1e-4


def test_the_norms_of_a_version_go_with_it(
    model: LoadedModel, pool: AdapterPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, found = tiny.adapter(model, 2, 1, dora=True), list[Any]()

    def norms(*given: Any) -> Any:
        found.append(given)
        return adapted_norms(*given)

    pool.save("style", weights, {})
    monkeypatch.setattr(pool_module, "adapted_norms", norms)
    pool.drop("style", 1)
    pool.measure("style", 1, weights)
    each = len(found)
    pool.release(pool.acquire("style"))
    assert len(found) == each > 0
    pool.drop("style", 1)
    pool.release(pool.acquire("style"))
    assert len(found) == 2 * each


def taken(model: LoadedModel, pool: AdapterPool, folder: Path) -> Ticket[Any]:
    """The ticket of a job that loads `folder`, which its client calls /clients/mine."""
    lane = AdapterLane(model, pool)
    ticket: Ticket[Any] = Ticket("j", "adapters")
    request = AdapterRequest(model="tiny", name="mine", upload="blob")
    lane.admit(lane.prepare(ticket, request, AdapterInput(folder, "/clients/mine", 3)))
    for ended, value in lane.run().ended:
        ended.resolve(value)
    return ticket


def test_an_adapter_that_was_made_elsewhere_becomes_the_version_it_is_given(
    model: LoadedModel, pool: AdapterPool, tmp_path: Path
) -> None:
    weights = tiny.adapter(model, 3, 1)
    peft.write(tmp_path, "tiny", weights)
    assert taken(model, pool, tmp_path).result(0).version == 3
    found = logits(model, pool.rows([pool.acquire("mine@3")]))
    assert np.abs(found[0] - alone(model, weights)).max() < 1e-4


@pytest.mark.parametrize(
    ("file", "damage", "why"),
    [
        (CONFIG_FILE, lambda path: path.unlink(), "^/clients/mine: no adapter_config.json in it"),
        (WEIGHTS_FILE, _cut, "^/clients/mine/adapter_model.safetensors: .*cut off"),
        (WEIGHTS_FILE, lambda path: path.unlink(), "^/clients/mine/adapter_model.safetensors: No such file"),
        (NOTES_FILE, lambda path: path.write_text('{"base": "x"}'), "^/clients/mine: an adapter of another base"),
        (NOTES_FILE, lambda path: path.write_text('{"made_of": {"base": "x"}}'), "of another base .digest x"),
        (NOTES_FILE, lambda path: path.write_text("{"), "^/clients/mine/stoker.json: not readable as JSON"),
    ],
)
def test_what_cannot_be_loaded_is_named_as_its_client_calls_it(
    model: LoadedModel, pool: AdapterPool, tmp_path: Path, file: str, damage: Callable[[Path], None], why: str
) -> None:
    peft.write(tmp_path, "tiny", tiny.adapter(model, 3, 1))
    damage(tmp_path / file)
    with pytest.raises(ModelError, match=why):
        taken(model, pool, tmp_path).result(0)
    assert pool.loaded == ()


def test_an_adapter_of_mlx_lms_layout_serves_as_one_of_pefts(
    model: LoadedModel, pool: AdapterPool, tmp_path: Path
) -> None:
    weights = tiny.adapter(model, 3, 1)
    write_mlx_lm(tmp_path, weights)
    assert taken(model, pool, tmp_path).result(0).rank == 3
    found = logits(model, pool.rows([pool.acquire("mine@3")]))
    assert np.abs(found[0] - alone(model, weights)).max() < 1e-4


def test_adapters_that_wait_while_the_device_fails_end_with_its_error(model: LoadedModel, pool: AdapterPool) -> None:
    lane, request = AdapterLane(model, pool), AdapterRequest(model="tiny", name="mine", upload="blob")
    tickets: list[Ticket[Any]] = [Ticket(name, "adapters") for name in ("a", "b")]
    for ticket in tickets:
        lane.admit(lane.prepare(ticket, request, AdapterInput(Path("nowhere"), "/clients/mine", 3)))
    lane.fail_all(WorkerUnavailable("the engine has stopped."))
    assert (lane.busy, lane.held) == (False, [])
    for ticket in tickets:
        with pytest.raises(WorkerUnavailable, match="the engine has stopped"):
            ticket.result(0)


def mixed(model: LoadedModel, pool: AdapterPool, bound: float) -> None:
    """One batch of LoRA, DoRA, rsLoRA and none equals each alone."""
    kinds = {
        "lora": tiny.adapter(model, 3, 1),
        "dora": tiny.adapter(model, 4, 2, dora=True),
        "part": tiny.adapter(model, 2, 3, targets=("k_proj", "down_proj"), dora=True),
        "rs": tiny.adapter(model, 4, 4, rslora=True),
    }
    for name, weights in kinds.items():
        pool.save(name, weights, {})
    order = ["dora", None, "lora", "part", "rs", None, "dora"]
    found = logits(model, pool.rows([pool.acquire(name) for name in order]), len(order))
    base = logits(model, None)[0]
    for asked, row in zip(order, found, strict=True):
        wanted = base if asked is None else alone(model, kinds[asked])
        assert np.abs(row - wanted).max() < bound, asked
        assert asked is None or np.abs(row - base).max() > 0.1, asked


def test_lora_dora_and_none_share_a_batch(model: LoadedModel, pool: AdapterPool) -> None:
    mixed(model, pool, 1e-4)


@pytest.mark.parametrize("name", ["qwen2-untied", "llama-llama3"])
@pytest.mark.parametrize("quantize", ["none", "4bit", "8bit"])
def test_they_do_on_bases_of_few_bits_and_with_biases(store: AdapterStore, name: str, quantize: str) -> None:
    base = load("tiny", [str(GOLDENS / "architectures" / name)], quantize=quantize, group_size=32)
    mixed(base, AdapterPool(base, store), 2e-4)


def test_an_adapter_that_another_process_wrote_is_found(
    model: LoadedModel, pool: AdapterPool, store: AdapterStore
) -> None:
    with pytest.raises(UnknownAdapter):
        pool.check("style")
    weights = tiny.adapter(model, 2, 1)
    store.write("tiny", "style", weights, {})
    pool.check("style")
    found = logits(model, pool.rows([pool.acquire("style")]))
    assert np.abs(found[0] - alone(model, weights)).max() < 1e-4

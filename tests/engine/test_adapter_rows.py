"""Adapters side by side: what one brings changes no other, and each is read as those who wrote it meant it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters import mlx_lm, peft, stacked
from engine.adapters.lora import LoraWeights, TrainableLora, adapted_norms, same, square_norms
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.adapters.targets import target_layers
from engine.checkpoints.loading import LoadedModel
from engine.models.layers import Linear
from engine.weights import safetensors
from stoker.errors import ModelError
from tests.engine import tiny

NAME = "layers.0.self_attn.q_proj"


@pytest.fixture
def pool(model: LoadedModel, tmp_path: Path) -> AdapterPool:
    return AdapterPool(model, AdapterStore(tmp_path))


def outputs(pool: AdapterPool, indices: list[int], model: LoadedModel, name: str = NAME) -> np.ndarray:
    """What the layer gives a row of each adapter, for the same input."""
    wide, _ = model.linear_shapes[name]
    x = mx.broadcast_to(mx.random.normal((1, 2, wide), key=mx.random.key(4)), (len(indices), 2, wide))
    rows, y = pool.rows(indices), model.decoder.linears[name](x)
    assert rows is not None
    return np.array(rows.apply(name, x, y))


@pytest.mark.parametrize("second", ["DoRA", "of a larger rank", "of other layers", "many more"])
def test_an_adapter_that_comes_changes_nothing_of_those_that_are_there(
    pool: AdapterPool, model: LoadedModel, second: str
) -> None:
    pool.save("first", tiny.adapter(model, 3, 1, ("q_proj",)), {})
    first = pool.acquire("first")
    before = outputs(pool, [0, first], model)
    more: list[LoraWeights] = {
        "DoRA": [tiny.adapter(model, 3, 2, ("q_proj",), dora=True)],
        "of a larger rank": [tiny.adapter(model, 20, 2, ("q_proj",))],
        "of other layers": [tiny.adapter(model, 3, 2, ("v_proj", "down_proj"), dora=True)],
        "many more": [tiny.adapter(model, 2, seed, ("q_proj",)) for seed in range(2, 9)],
    }[second]
    for number, weights in enumerate(more):
        pool.save(f"more{number}", weights, {})
    np.testing.assert_allclose(outputs(pool, [0, first], model), before, atol=1e-6)
    other = pool.acquire("more0")
    assert np.abs(outputs(pool, [other], model) - before[:1]).max() > 1e-3 or second == "of other layers"
    assert np.abs(outputs(pool, [other, 0], model)[1] - before[0]).max() < 1e-6, "a row without, next to one with"


def test_a_version_that_is_held_is_held_once_however_often_it_is_written(pool: AdapterPool, model: LoadedModel) -> None:
    weights = tiny.adapter(model, 2, 1)
    for _ in range(3):
        assert pool.save("style", weights, {}, version=4) == 4
    assert pool.loaded == ("style@4",)


def test_the_adapter_that_was_used_longest_ago_makes_room(model: LoadedModel, tmp_path: Path) -> None:
    pool = AdapterPool(model, AdapterStore(tmp_path), budget=1)
    for name in ("one", "two", "three"):
        pool.save(name, tiny.adapter(model, 2, len(name)), {})
    for name in ("two", "one", "three"):
        pool.release(pool.acquire(name))
    pool.save("four", tiny.adapter(model, 2, 9), {})
    assert set(pool.loaded) == {"one@1", "three@1", "four@1"}


def without_memory(patch: pytest.MonkeyPatch, pool: AdapterPool, what: str) -> None:
    """For the matrices of an adapter, or for what comes into the stacks."""
    evaluate, held = mx.eval, pool.rows([1])

    def evaluated(*given: Any) -> None:
        stacks = held is not None and given[0] is held.stacks
        # Those that were read come in two arrays.
        matrices = isinstance(given[0], dict) or (len(given) == 2 and given[0].ndim == 1)
        if (stacks and what == "the stacks") or (matrices and not stacks and what == "the matrices"):
            raise RuntimeError("[malloc] Unable to allocate 16777216 bytes.")
        evaluate(*given)

    patch.setattr(mx, "eval", evaluated)


@pytest.mark.parametrize("what", ["the matrices", "the stacks"])
def test_an_adapter_that_cannot_be_held_leaves_nothing_under_the_name_of_the_one_that_made_way(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store = AdapterStore(tmp_path)
    pool = AdapterPool(model, store, budget=1)
    for name in ("one", "two", "three"):
        pool.save(name, tiny.adapter(model, 2, len(name)), {})
    index = pool.acquire("one")
    before = outputs(pool, [index], model)
    pool.release(index)
    for name in ("two", "three"):
        pool.release(pool.acquire(name))
    store.write("tiny", "new", tiny.adapter(model, 2, 9), {})
    with monkeypatch.context() as patch:
        without_memory(patch, pool, what)
        with pytest.raises(RuntimeError, match="Unable to allocate"):
            pool.acquire("new")
    assert "new@1" not in pool.loaded
    np.testing.assert_array_equal(outputs(pool, [pool.acquire("one")], model), before)


def test_a_version_that_is_written_is_there_though_it_cannot_be_held_now(
    pool: AdapterPool, model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that took a night does not fail because its adapter, at its end, found no memory to serve from."""
    weights = tiny.adapter(model, 2, 1)
    with monkeypatch.context() as patch:
        without_memory(patch, pool, "the matrices")
        assert pool.save("style", weights, {}) == 1
    assert pool.loaded == ()
    assert "style@1 is written, and not held in memory" in caplog.text
    index = pool.acquire("style")
    assert np.abs(outputs(pool, [index, 0], model)[0] - outputs(pool, [index, 0], model)[1]).max() > 1e-3


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_read_with_the_scale_that_it_was_written_with(
    model: LoadedModel, tmp_path: Path, dora: bool, rslora: bool
) -> None:
    weights = tiny.adapter(model, 9, 1, dora=dora, rslora=rslora)
    peft.write(tmp_path, "tiny", weights)
    found = peft.read(tmp_path, model.linear_shapes)
    assert (found.config.rslora, found.config.dora) == (rslora, dora)
    assert found.config.scale == pytest.approx(weights.config.scale) == pytest.approx(2.0)


def test_norms_and_gains_are_those_of_the_weights_without_the_bias() -> None:
    """As torch has DoRA: g · (x W + s · x A B) + bias."""
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape).astype(np.float32))

    weight, bias, a, b, m, x = matrix(6, 5), matrix(5), matrix(6, 2), matrix(2, 5), matrix(5), matrix(1, 3, 6)
    linear = Linear("l", weight, bias)
    sides = {"a": a, "b": b, "m": m}
    norms = np.linalg.norm(np.array(weight + 0.5 * a @ b), axis=0)
    squares = square_norms(linear)
    np.testing.assert_allclose(np.array(adapted_norms(linear, squares, sides, 0.5, mx.float32)), norms, rtol=1e-5)
    lora = TrainableLora({"l": sides}, 0.5, linears={"l": linear}, squares={"l": squares})
    wanted = np.array(m) / norms * np.array(x @ weight + 0.5 * (x @ a) @ b) + np.array(bias)
    np.testing.assert_allclose(np.array(lora.apply("l", x, linear(x))), wanted, rtol=2e-4, atol=1e-4)


# Which layers an adapter changes


def mlx_folder(folder: Path, model: LoadedModel, layers: list[str], count: Any, keys: Any) -> Path:
    weights = tiny.adapter(model, 2, 1)
    arrays = {f"model.{name}.lora_{side}": weights.matrices[name][side] for name in layers for side in ("a", "b")}
    safetensors.write(folder / mlx_lm.WEIGHTS_FILE, arrays)
    fields = {"num_layers": count, "lora_parameters": {"rank": 2, "scale": 3.0, "keys": keys}}
    (folder / peft.CONFIG_FILE).write_text(json.dumps(fields))
    return folder


FIRST, LAST = "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("layers", "count", "keys", "taken"),
    [
        ([FIRST, LAST], 0, ["self_attn.q_proj"], True),
        ([FIRST, LAST], -1, ["self_attn.q_proj"], True),
        ([FIRST, LAST], None, None, True),
        ([FIRST, LAST], 2, None, True),
        ([LAST], 1, ["self_attn.q_proj"], True),
        ([FIRST], 1, ["self_attn.q_proj"], False),
        # A whole name is taken wherever the layer is.
        ([FIRST], 1, [f"model.{FIRST}"], True),
        ([LAST], 1, [f"model.{FIRST}"], False),
        ([LAST], 1, ["self_attn.k_proj"], False),
    ],
)
def test_mlx_lm_changes_the_last_layers_and_what_is_named_whole(
    model: LoadedModel, tmp_path: Path, layers: list[str], count: Any, keys: Any, taken: bool
) -> None:
    folder = mlx_folder(tmp_path, model, layers, count, keys)
    if taken:
        found = mlx_lm.read(folder, model.linear_shapes)
        assert (set(found.matrices), found.config.scale) == (set(layers), 3.0)
    else:
        with pytest.raises(ModelError, match=r"belongs to a layer that adapter_config\.json leaves out"):
            mlx_lm.read(folder, model.linear_shapes)


@pytest.mark.parametrize(
    ("patterns", "number", "changed"),
    [
        (["layers", "blocks"], 0, True),
        (["layers", "blocks"], 1, False),
        (["blocks", "layers"], 0, False),
        (["blocks", "layers"], 1, True),
        ("blocks", 1, True),
    ],
)
def test_of_several_patterns_the_first_that_matches_says_a_layers_number(
    patterns: Any, number: int, changed: bool
) -> None:
    fields = {"target_modules": ["q_proj"], "layers_pattern": patterns, "layers_to_transform": number}
    layer = "layers.0.blocks.1.q_proj"
    assert target_layers("it", fields, {f"model.{layer}": layer}) == ({layer} if changed else set())


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 300, "(?P<x", "[", "(" * 5000 + ")" * 5000])
def test_a_pattern_that_is_none_is_one_error_and_the_next_is_matched(pattern: str) -> None:
    with pytest.raises(ModelError, match="is no regular expression"):
        target_layers("it", {"target_modules": pattern}, {f"model.{NAME}": NAME})
    assert target_layers("it", {"target_modules": r".*q_proj"}, {f"model.{NAME}": NAME}) == {NAME}


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["LoRA", "rsLoRA", "DoRA"])
def test_an_adapter_that_was_read_computes_as_one_that_was_trained_here(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    """One that was read goes into the stacks as one array, unless each layer of it has norms to be found."""
    store, folded, layers = AdapterStore(tmp_path), stacked.folded, []

    def counted(weights: LoraWeights, layer: str, *others: Any) -> dict[str, mx.array]:
        layers.append(layer)
        return folded(weights, layer, *others)

    monkeypatch.setattr("engine.adapters.pool.folded", counted)
    trained, later = AdapterPool(model, store), AdapterPool(model, store)
    trained.save("style", tiny.adapter(model, 3, 1, ("q_proj", "down_proj"), **kind), {})
    assert layers, "each layer of what was trained"
    layers.clear()
    for name in (NAME, "layers.1.mlp.down_proj"):
        ours, theirs = (outputs(pool, [pool.acquire("style")], model, name) for pool in (trained, later))
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
    assert bool(layers) is bool(kind.get("dora"))


def test_what_an_adapter_has_is_known_before_its_matrices_are_made(model: LoadedModel, tmp_path: Path) -> None:
    store, whole = AdapterStore(tmp_path), tiny.adapter(model, 2, 1, dora=True)
    store.write("tiny", "style", whole, {})
    read = store.read("tiny", "style", 1, model.linear_shapes)
    assert read.sides == whole.sides == {layer: {"a", "b", "m"} for layer in whole.matrices}
    assert same(read.matrices, whole.matrices)

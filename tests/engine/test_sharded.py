"""A model that ranks share: each part is as small as it can be, and together they make what the whole makes."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.lora import LoraWeights
from engine.adapters.pool import AdapterPool
from engine.adapters.sharding import part_of
from engine.adapters.stacked import StackedLora
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.generation.forward_input import ForwardInput
from engine.generation.step import Compiled, Step
from engine.models.key_values import KeyValues
from engine.models.llama import Llama, LlamaArgs
from engine.models.shard import Shard
from engine.models.sharded import shared
from engine.weights.quantized import Form, QuantizedTensor, dequantize, quantize
from engine.weights.tensors import Quantization, Stored
from stoker.errors import ModelError
from tests.engine import shared_model, tiny
from tests.engine.shared_model import ARGS, ODD, changed, on_ranks

TOKENS = mx.array([[7, 9, 11, 13, 66, 0, 33, 34], [1, 2, 3, 4, 5, 6, 7, 8]])
TABLE = "model.embed_tokens.weight"


def logits(model: Llama, adapters: StackedLora | None = None) -> np.ndarray:
    return np.array(model.logits(model(TOKENS, adapters=adapters)))


@pytest.mark.parametrize("ranks", [2, 3, 6])
@pytest.mark.parametrize(
    "args",
    [ARGS, changed(tied=True), changed(qkv_bias=True), changed(qk_norm=True), changed(window=3, kv_heads=12)],
    ids=["llama", "tied", "biases", "norms", "window"],
)
def test_the_ranks_make_together_what_the_whole_model_makes(args: LlamaArgs, ranks: int) -> None:
    check_together(args, ranks)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(
    "args",
    [ODD, replace(ODD, tied=True), replace(ODD, qkv_bias=True, qk_norm=True), replace(ODD, window=3)],
    ids=["llama", "tied", "biases-norms", "window"],
)
def test_ranks_with_layers_each_make_together_what_the_whole_model_makes(args: LlamaArgs, ranks: int) -> None:
    check_together(args, ranks)


def check_together(args: LlamaArgs, ranks: int) -> None:
    wanted = logits(shared_model.whole(args))
    found = on_ranks(ranks, lambda shard: logits(shared_model.part(shard, args)))
    for one in found:
        assert one.tobytes() == found[0].tobytes()
        np.testing.assert_allclose(one, wanted, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_quantized_model_is_cut_into_the_codes_that_the_whole_has(ranks: int) -> None:
    eight = Quantization(8, 32)
    wanted = logits(shared_model.whole(ARGS, eight))
    assert np.abs(wanted - logits(shared_model.whole())).max() > 1e-3
    for found in on_ranks(ranks, lambda shard: logits(shared_model.part(shard, ARGS, eight))):
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_row_has_its_adapter_and_the_parts_of_a_and_b_are_those_of_their_layer(ranks: int) -> None:
    model = tiny.loaded(shared_model.whole())
    weights = [tiny.adapter(model, 4, seed) for seed in (1, 2)]

    def stacked(shard: Shard | None) -> StackedLora:
        parts = weights if shard is None else [part_of(each, shard, model.linear_shapes) for each in weights]
        stacks = {}
        for name in weights[0].matrices:
            sides = [part.matrices[name] for part in parts]
            scaled = [{"a": side["a"], "b": side["b"] * weights[0].config.scale} for side in sides]
            none = {key: mx.zeros_like(array) for key, array in scaled[0].items()}
            stacks[name] = {key: mx.stack([none[key], *(each[key] for each in scaled)]) for key in none}
        return StackedLora(stacks, mx.array([2, 0], mx.uint32))

    wanted = logits(shared_model.whole(), stacked(None))
    assert np.abs(wanted - logits(shared_model.whole()))[0].max() > 0.1
    for found in on_ranks(ranks, lambda shard: logits(shared_model.part(shard), stacked(shard))):
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_a_part_says_the_shapes_of_whole_layers_for_adapters() -> None:
    shapes = on_ranks(2, lambda shard: shared_model.part(shard).linear_shapes)
    assert shapes == [shared_model.whole().linear_shapes] * 2


@pytest.mark.parametrize("kind", ["dense", "quantized"])
@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_the_rows_of_the_vocabulary_are_shared_out_and_what_lacks_is_zeros(ranks: int, kind: str) -> None:
    rows = mx.random.normal((67, 64), key=mx.random.key(0))
    table = rows if kind == "dense" else quantize(rows, Form(32, 8))
    parts = [Shard(rank, ranks).cut(TABLE, table) for rank in range(ranks)]
    dense = [part if isinstance(part, mx.array) else dequantize(part) for part in parts]
    joined = np.concatenate([np.array(part) for part in dense])
    wanted = np.array(rows if not isinstance(table, QuantizedTensor) else dequantize(table))
    assert {part.shape for part in dense} == {(-(-67 // ranks), 64)}
    assert np.array_equal(joined[:67], wanted)
    assert not joined[67:].any()


@pytest.mark.parametrize("kind", ["dense", "quantized"])
def test_columns_are_cut_by_inputs_and_rows_by_outputs(kind: str) -> None:
    rows = mx.random.normal((12, 128), key=mx.random.key(0))
    stored = rows if kind == "dense" else quantize(rows, Form(32, 4))
    wanted = np.array(rows if not isinstance(stored, QuantizedTensor) else dequantize(stored))
    for name, axis in (("model.layers.0.mlp.down_proj.weight", 1), ("model.layers.0.self_attn.k_proj.weight", 0)):
        parts = [Shard(rank, 2).cut(name, stored) for rank in range(2)]
        dense = [np.array(part if isinstance(part, mx.array) else dequantize(part)) for part in parts]
        assert np.array_equal(np.concatenate(dense, axis=axis), wanted)
    bias = Shard(1, 2).cut("model.layers.0.self_attn.q_proj.bias", mx.arange(8))
    assert isinstance(bias, mx.array)
    assert bias.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("kind", ["dense", "quantized"])
@pytest.mark.parametrize("name", [TABLE, "model.layers.0.mlp.down_proj.weight"])
def test_what_other_ranks_have_leaves_the_memory(name: str, kind: str) -> None:
    rows = mx.random.normal((2048, 1024), key=mx.random.key(0))
    stored: Stored = rows if kind == "dense" else quantize(rows, Form(32, 8))
    mx.eval(stored if isinstance(stored, mx.array) else stored.arrays)
    del rows
    gc.collect()
    before, size = mx.get_active_memory(), stored.nbytes
    stored = Shard(1, 4).cut(name, stored)
    mx.eval(stored if isinstance(stored, mx.array) else stored.arrays)
    gc.collect()
    assert before - mx.get_active_memory() >= 0.7 * size


def test_a_group_of_weights_that_would_be_cut_is_refused() -> None:
    stored = quantize(mx.zeros((4, 96)), Form(32, 8))
    with pytest.raises(ModelError, match=r"o_proj\.weight: 96 inputs in groups of 32 given; over 2 ranks"):
        Shard(0, 2).cut("model.layers.0.self_attn.o_proj.weight", stored)


@pytest.mark.parametrize(
    ("args", "ranks", "said"),
    [
        (ARGS, 4, "6 key/value heads over 4 ranks and 2 layers given; .* Up to 2, 3, 6 ranks can share this model"),
        (ARGS, 5, "12 heads over 5 ranks and 2 layers given"),
        (changed(hidden=190), 3, "190 hidden units of the MLP over 3 ranks and 2 layers given; .* Up to 2 ranks can"),
    ],
)
def test_a_model_with_neither_heads_nor_layers_for_each_rank_is_refused_with_the_ranks_that_can_share_it(
    args: LlamaArgs, ranks: int, said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        shared_model.part(Shard(0, ranks), args)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_dora_adapter_has_the_norms_of_whole_layers_found_once_and_kept_when_it_makes_room(
    ranks: int, tmp_path: Path
) -> None:
    args = changed(qkv_bias=True)
    model = tiny.loaded(shared_model.whole(args))
    weights = tiny.adapter(model, 4, 1, dora=True)
    mx.eval(weights.matrices)
    others = ("a", "b", "c")

    def found(model: LoadedModel, home: Path) -> np.ndarray:
        pool = AdapterPool(model, AdapterStore(home), budget=1)
        for name in ("normed", *others):
            pool.save(name, weights if name == "normed" else tiny.adapter(model, 4, 2), {})
        if model.shard is not None:
            pool.measure("normed", 1, weights)
        if model.shard is None or model.shard.rank == 0:
            # It makes room here alone: a rank that loads it again asks no other one.
            for name in ("normed", *others):
                pool.release(pool.acquire(name))
            assert "normed@1" not in pool.loaded
        return logits(model.llama, pool.rows([pool.acquire("normed"), 0]))

    wanted = found(model, tmp_path / "whole")
    assert np.abs(wanted - logits(shared_model.whole(args)))[0].max() > 0.1
    for one in on_ranks(
        ranks,
        lambda shard: found(
            replace(tiny.loaded(shared_model.part(shard, args)), shard=shard), tmp_path / str(shard.rank)
        ),
    ):
        np.testing.assert_allclose(one, wanted, atol=1e-3)


def test_a_part_of_a_file_is_loaded_alone_and_takes_its_share_of_the_memory(tmp_path: Path) -> None:
    folder = shared_model.write(tmp_path / "model")
    model = load("whole", [str(folder)])
    for rank in range(3):
        part = load("part", [str(folder)], shard=Shard(rank, 3))
        assert part.bytes <= 1.1 / 3 * model.bytes
        assert (part.parameters, part.digest) == (model.parameters, model.digest)


def test_an_adapter_of_other_ranks_layers_alone_adds_nothing_to_the_passes_here(tmp_path: Path) -> None:
    whole = tiny.adapter(tiny.loaded(shared_model.whole(ODD)), 4, 1)
    own = {name: sides for name, sides in whole.matrices.items() if name.startswith("layers.4.")}
    for rank, has in ((0, False), (1, True)):
        part = shared_model.part(Shard(rank, 2), ODD)
        pool = AdapterPool(replace(tiny.loaded(part), shard=part.shard), AdapterStore(tmp_path / str(rank)))
        pool.save("last", LoraWeights(replace(whole.config, targets=tuple(own)), own), {})
        assert (pool.rows([pool.acquire("last")]) is not None) is has


@pytest.mark.parametrize("ranks", [2, 3])
def test_layers_are_shared_out_and_a_rank_reads_and_keeps_its_own_alone(tmp_path: Path, ranks: int) -> None:
    args = replace(ODD, layers=6)
    folder = shared_model.write(tmp_path / "model", args)
    model = load("whole", [str(folder)])
    for rank in range(ranks):
        part = load("part", [str(folder)], shard=Shard(rank, ranks))
        own = range(rank * 6 // ranks, (rank + 1) * 6 // ranks)
        assert {name.split(".")[1] for name in part.llama.linears} == set(map(str, own))
        assert part.bytes <= 1.1 / ranks * model.bytes
        assert len(part.llama.kv_sizes.keys) == len(own)
        assert (part.parameters, part.digest) == (model.parameters, model.digest)
        assert part.linear_shapes == model.linear_shapes
        assert f"{ranks} ranks share its layers" in part.summary


def test_ranks_with_layers_each_count_keys_and_values_alike() -> None:
    counted = {shared_model.part(Shard(rank, 2), ODD).kv_sizes.token_bytes for rank in range(2)}
    assert counted == {3 * shared_model.whole(ODD).kv_sizes.token_bytes // 5}


class MarkedShard(Shard):
    """Whose exchanges show in a graph."""

    __slots__ = ()

    def sum(self, x: mx.array) -> mx.array:
        return mx.sinh(x)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("compiled", "tokens"), [("none", 4), ("decode", 1)])
def test_a_pass_that_only_stores_makes_the_exchanges_of_all_ranks(
    rank: int, compiled: Compiled, tokens: int, tmp_path: Path
) -> None:
    part = shared_model.part(MarkedShard(rank, 3), ODD)
    kv = KeyValues(part, 2, 256)
    given = ForwardInput(mx.zeros((2, tokens), mx.int32), mx.zeros((2,), mx.int32), 256)
    Step(part, compiled)(kv, given)
    for array in (*kv.keys, *kv.values):
        mx.export_to_dot(str(tmp_path / "graph.dot"), array)
        # One for the vocabulary, one behind each rank's layers.
        assert (tmp_path / "graph.dot").read_text().count('label ="Sinh"') == 4


@pytest.mark.parametrize(
    ("quantization", "groups", "split"),
    [
        (Quantization(8, 64), {}, "layers"),
        (Quantization(8, 32), {}, "heads"),
        (Quantization(8, 128), {}, "heads"),
        (None, {"model.layers.1.mlp.down_proj.weight": 64}, "layers"),
        (Quantization(), {"model.layers.1.self_attn.o_proj.weight": 32}, "heads"),
    ],
    ids=["asked for", "smaller", "too large for any", "in the file", "whole in the file"],
)
def test_a_model_whose_groups_would_be_cut_is_shared_by_layers(
    quantization: Quantization | None, groups: dict[str, int], split: str
) -> None:
    tensors = shared_model.tensors(ARGS, quantization, groups)
    assert shared(ARGS, tensors, Shard(0, 2)).shard.split == split


def test_a_rank_with_layers_takes_what_an_adapter_changes_in_them_whole_also_of_dora() -> None:
    weights = tiny.adapter(tiny.loaded(shared_model.whole(ODD)), 4, 1, dora=True)
    part = shared_model.part(Shard(1, 2), ODD)
    own = part_of(weights, part.shard, part.linears)
    assert own.matrices == {name: sides for name, sides in weights.matrices.items() if name[7] in "234"}

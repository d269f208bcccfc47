"""Models that run mlx-lm's files, of which ranks have layers each: together they make what the whole makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.models.key_values import KeyValues
from engine.models.shard import Shard
from engine.training.data import TokenizedExample
from engine.training.trainer import Trainer
from engine.weights.gguf import GGUF
from stoker.errors import ModelError
from tests.engine import bridged, cached, gguf_files, tiny
from tests.engine.shared_model import on_ranks
from tests.thorough import quick

PROMPTS = bridged.prompts(2)


class Made(NamedTuple):
    """What a rank has made: logits of whole sequences, of a prompt and of the tokens behind it; and of what."""

    whole: np.ndarray
    stepped: np.ndarray
    model: LoadedModel


def made(model: LoadedModel) -> Made:
    decoder, kv = model.decoder, KeyValues(model.decoder, 1, 64)
    row = PROMPTS[0]
    parts = [cached.through(decoder, kv, [row[:9]], [0], exact=True, kv_length=9)]
    parts += [cached.through(decoder, kv, [[token]], [9 + at], kv_length=48) for at, token in enumerate(row[9:14])]
    logits = np.array(decoder.logits(decoder(mx.array(PROMPTS))))
    return Made(logits, np.concatenate([part[0] for part in parts]), model)


def on(path: Path) -> Callable[[Shard], Made]:
    return lambda shard: made(load("tiny", [str(path)], shard=shard))


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("gemma2", 2), ("gpt_oss", 3), ("deepseek_v3", 2), ("lfm2", 2), ("mamba2", 3), ("nemotron_h", 4)],
)
def test_ranks_with_layers_of_a_file_of_mlx_lm_make_what_the_whole_makes(name: str, ranks: int, tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", name)
    wanted = made(load("tiny", [str(tmp_path / "model")]))
    found = on_ranks(ranks, on(tmp_path / "model"))
    for one in found:
        bridged.assert_close(one.whole, wanted.whole)
        bridged.assert_close(one.stepped, wanted.stepped)
        assert one.whole.tobytes() == found[0].whole.tobytes()
    models = [one.model for one in found]
    sizes = [model.decoder.kv_sizes for model in models]
    assert len({(size.token_bytes, size.state_bytes) for size in sizes}) == 1, "all decide alike who makes way"
    assert sizes[0].token_bytes == max(size._replace(counted=None).token_bytes for size in sizes)
    assert {bool(model.decoder.kv_sizes.states) for model in models} == {bool(wanted.model.decoder.kv_sizes.states)}
    assert all(model.decoder.kv_sizes.keys for model in models)
    names = [linear for model in models for linear in model.decoder.linears]
    assert sorted(names) == sorted(wanted.model.decoder.linears)
    assert all(model.linear_shapes == wanted.model.linear_shapes for model in models)
    assert all(model.parameters == wanted.model.parameters for model in models)
    assert sum(model.bytes for model in models) < 1.1 * wanted.model.bytes
    assert max(model.bytes for model in models) < 1.5 / ranks * wanted.model.bytes


@pytest.mark.parametrize("dora", [False, True])
def test_rows_have_adapters_of_their_own_on_the_layers_of_every_rank(tmp_path: Path, dora: bool) -> None:
    bridged.write_folder(tmp_path / "model", "lfm2")
    whole = load("tiny", [str(tmp_path / "model")])
    weights = tiny.adapter(whole, 4, 1, bridged.targets_of(whole), size=0.25, dora=dora)
    AdapterStore(tmp_path / "adapters").write("tiny", "one", weights, {})

    def adapted(model: LoadedModel) -> np.ndarray:
        pool = AdapterPool(model, AdapterStore(tmp_path / "adapters"))
        given = pool.rows([pool.acquire("one"), 0])
        return np.array(model.decoder.logits(model.decoder(mx.array(PROMPTS), adapters=given)))

    wanted = adapted(whole)
    assert np.abs(wanted[0] - made(whole).whole[0]).max() > 0.01
    for found in on_ranks(2, lambda shard: adapted(load("tiny", [str(tmp_path / "model")], shard=shard))):
        bridged.assert_close(found, wanted)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"dora": True}], ids=["", "again", "dora"])
@pytest.mark.parametrize("name", quick("gemma2", "lfm2", of=["gemma2", "lfm2", "deepseek_v3", "mamba2", "gpt_oss"]))
def test_two_steps_on_the_layers_of_all_ranks_are_those_on_the_whole(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name)
    whole = load("tiny", [str(tmp_path / "model")])
    request = tiny.asking(
        steps=2, accumulation=2, learning_rate=1e-2, dropout=0.1, targets=bridged.targets_of(whole), **options
    )
    examples = [TokenizedExample.of([(list(prompt), True)]) for prompt in bridged.prompts(5)]

    def steps(model: LoadedModel) -> list[list[float]]:
        reports = filter(None, Trainer(model.decoder, request, examples[:4], examples[4:]).run())
        return [[report.loss, report.gradient_norm, report.held_out_loss or 0.0] for report in reports]

    wanted = steps(whole)
    assert len(wanted) == 2
    for found in on_ranks(2, lambda shard: steps(load("tiny", [str(tmp_path / "model")], shard=shard))):
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_gguf_file_of_such_a_model_is_shared_too(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    gguf_files.write(path, "gemma3_text", kind)
    wanted = made(load("tiny", [str(path)], quantize="keep"))
    for one in on_ranks(2, lambda shard: made(load("tiny", [str(path)], shard=shard, quantize="keep"))):
        bridged.assert_close(one.whole, wanted.whole)
        assert one.model.bytes < 0.6 * wanted.model.bytes


def test_a_rank_reads_nothing_of_the_layers_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, plain = tmp_path / "tiny.gguf", list[str](), GGUF.dequantize
    gguf_files.write(path, "gemma3_text", "F32")

    def noting(self: GGUF, name: str) -> np.ndarray:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(GGUF, "dequantize", noting)
    load("tiny", [str(path)], shard=Alone(1, 2))
    assert {name.split(".")[1] for name in read if name.startswith("blk.")} == {"2", "3"}


class Alone(Shard):
    """A rank that goes on with what it has itself."""

    __slots__ = ()

    def sum(self, x: mx.array) -> mx.array:
        return x

    def joined(self, x: mx.array) -> mx.array:
        return mx.concatenate([x] * self.size, axis=-1)


def test_a_rank_never_has_more_than_its_part_in_memory(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "qwen3_moe")
    whole = load("tiny", [str(tmp_path / "model")]).bytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    part = load("tiny", [str(tmp_path / "model")], shard=Alone(0, 4))
    assert part.bytes < 0.3 * whole
    assert mx.get_peak_memory() - before < 0.6 * whole


@pytest.mark.parametrize(
    ("name", "ranks", "said"),
    [
        ("gemma3n", 2, "some of its layers read the keys and values of others, so ranks cannot share them"),
        ("rwkv7", 2, "its layers hand on more than hidden states, so ranks cannot share them"),
        ("iquestloopcoder", 2, "mlx-lm's file runs parts of its layers by themselves"),
        ("gemma2", 5, "4 layers over 5 ranks given; each rank needs one. Up to 4 ranks can share this model"),
    ],
)
def test_a_file_of_mlx_lm_whose_layers_ranks_cannot_share_is_refused_with_the_reason(
    name: str, ranks: int, said: str, tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name)
    with pytest.raises(ModelError, match=said):
        load("tiny", [str(tmp_path / "model")], shard=Alone(0, ranks))

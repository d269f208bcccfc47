"""A tiny random Llama as the engine holds one, with a tokenizer whose text is its ids: "t3 t14 t15"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from engine.adapters.lora import LoraConfig, LoraWeights, TrainableLora, square_norms, target_shapes
from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.kv_sizes import HoldsKeyValues
from engine.models.llama import Llama
from engine.text.tokenizer import Tokenizer
from stoker.contract import TrainRequest

EOS = 2
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def text(ids: Sequence[int]) -> str:
    return " ".join(f"t{index}" for index in ids)


def inner_tokenizer(vocabulary: int) -> tokenizers.Tokenizer:
    words = models.WordLevel({f"t{index}": index for index in range(vocabulary)}, unk_token="t0")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


def tokenizer(vocabulary: int, eos_ids: Sequence[int] = (EOS,)) -> Tokenizer:
    return Tokenizer(inner_tokenizer(vocabulary), eos_ids=eos_ids, pad_id=0)


def adapters(model: LoadedModel) -> dict[str, LoraWeights]:
    """Two of different rank."""
    return {"one": adapter(model, 2, 1), "two": adapter(model, 5, 2)}


def pool(model: LoadedModel, folder: Path) -> AdapterPool:
    """With these two."""
    made = AdapterPool(model, AdapterStore(folder))
    for name, weights in adapters(model).items():
        made.save(name, weights, {})
    return made


def loaded(llama: Llama, eos_ids: Sequence[int] = (EOS,)) -> LoadedModel:
    return LoadedModel(
        name="tiny",
        path=Path("tiny"),
        kind="generate",
        architecture="llama",
        model=llama,
        tokenizer=tokenizer(llama.args.vocab, eos_ids),
        context=llama.args.context,
        parameters=0,
        bytes=0,
        load_seconds=0.0,
        linear_shapes=llama.linear_shapes,
    )


def asking(**options: Any) -> TrainRequest:
    """A short run on it."""
    fields = {"model": "tiny", "name": "style", "dataset": "dataset:x", "steps": 3, "batch_size": 2, "max_length": 64}
    return TrainRequest(**{**fields, **options})


def adapter(
    model: LoadedModel,
    rank: int,
    seed: int,
    targets: tuple[str, ...] = LAYERS,
    *,
    dora: bool = False,
    rslora: bool = False,
    size: float = 1.0,
) -> LoraWeights:
    """One that changes the model plainly: `size` 1 adds twice as much as a weight has."""
    random = np.random.default_rng(seed)

    def matrix(*shape: int) -> mx.array:
        return mx.array(random.normal(0, shape[0] ** -0.5, shape).astype(np.float32))

    layers = target_shapes(model.linear_shapes, targets)
    matrices = {name: {"a": matrix(wide, rank), "b": size * matrix(rank, out)} for name, (wide, out) in layers.items()}
    if dora:
        for name, sides in matrices.items():
            norms = mx.sqrt(square_norms(model.decoder.linears[name]))
            sides["m"] = norms * mx.array(random.uniform(0.5, 2.0, norms.shape).astype(np.float32))
    return LoraWeights(LoraConfig(rank, 2.0 * rank**0.5 if rslora else 2.0 * rank, targets, rslora, dora), matrices)


def joint(model: HoldsKeyValues, rows: int, length: int) -> JointKeyValues:
    """Storage for rows of this length."""
    made = JointKeyValues(model)
    made.fit([length] * rows)
    return made


def sides(kv: KeyValues | JointKeyValues, rows: int, length: int) -> list[mx.array]:
    """Keys and values by layer, (rows, heads, length, width) each."""
    if isinstance(kv, KeyValues):
        return [array[:rows, :, :length] for pair in zip(kv.keys, kv.values, strict=True) for array in pair]
    held = [mx.stack([array[:, where(kv, row, length)] for row in range(rows)]) for array in kv.arrays]
    return [side for array in held for side in mx.split(array, array.shape[1] // kv.heads, axis=1)]


def where(kv: JointKeyValues, row: int, length: int) -> mx.array:
    """At which positions of an array the first `length` of a row lie."""
    one, positions = kv.segment(row), np.arange(length)
    run = 0 if one.run is None else one.run.start
    lies = np.where(positions < one.shared, run + positions, one.start + positions - one.shared)
    return mx.array(np.minimum(lies, kv.positions - 1).astype(np.uint32))


def largest(values: mx.array) -> float:
    """The largest size of any number."""
    return float(np.abs(np.array(values.astype(mx.float32))).max())


def trainable(model: LoadedModel, weights: LoraWeights) -> TrainableLora:
    """The adapter in the forward pass of training, for all rows."""
    linears = model.decoder.linears
    squares = {name: square_norms(linears[name]) for name in weights.matrices}
    return TrainableLora(weights.matrices, weights.config.scale, linears=linears, squares=squares)

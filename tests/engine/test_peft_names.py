"""What PEFT calls the layers of each architecture: by their paths in transformers' networks."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters import peft
from engine.adapters.lora import LoraConfig, LoraWeights
from engine.weights import safetensors

#: Architecture, our name of a layer of its first block, what transformers calls it.
NAMES = [
    ("llama", "layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ("gpt2", "h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    ("gptj", "h.0.attn.q_proj", "transformer.h.0.attn.q_proj"),
    ("gpt_neox", "h.0.attention.query_key_value", "gpt_neox.layers.0.attention.query_key_value"),
    ("gpt_neox, feed-forward", "h.0.mlp.dense_h_to_4h", "gpt_neox.layers.0.mlp.dense_h_to_4h"),
    ("gpt_bigcode", "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_attn"),
    ("exaone", "transformer.h.0.attn.attention.q_proj", "transformer.h.0.attn.attention.q_proj"),
    ("dbrx", "transformer.blocks.0.norm_attn_norm.attn.Wqkv", "transformer.blocks.0.norm_attn_norm.attn.Wqkv"),
    ("olmo", "transformer.blocks.0.att_proj", "model.transformer.blocks.0.att_proj"),
    ("mamba", "backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.in_proj"),
]
WIDTHS = (4, 6)


def adapter(layer: str, targets: tuple[str, ...]) -> LoraWeights:
    numbers = np.random.default_rng(3)
    a, b = (mx.array(numbers.standard_normal(shape, dtype=np.float32)) for shape in ((4, 2), (2, 6)))
    return LoraWeights(LoraConfig(2, 4.0, targets), {layer: {"a": a, "b": b}})


def rewrite(folder: Path, before: str, after: str, **fields: object) -> None:
    """Call the layers of the adapter in `folder` otherwise."""
    tensors = safetensors.read(folder / peft.WEIGHTS_FILE)
    safetensors.write(folder / peft.WEIGHTS_FILE, {name.replace(before, after): it for name, it in tensors.items()})
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(("architecture", "ours", "theirs"), NAMES)
def test_an_adapter_is_written_under_the_names_that_transformers_has(
    tmp_path: Path, architecture: str, ours: str, theirs: str
) -> None:
    shapes = {ours: WIDTHS, ours.replace(".0.", ".1."): WIDTHS}
    # One layer alone: the config names it by its whole path, which PEFT has to find too.
    peft.write(tmp_path, architecture, adapter(ours, (ours,)))
    config = json.loads((tmp_path / peft.CONFIG_FILE).read_text())
    assert config["target_modules"] == [theirs]
    assert config["fan_in_fan_out"] == (architecture == "gpt2")
    assert sorted(safetensors.read(tmp_path / peft.WEIGHTS_FILE)) == [
        f"base_model.model.{theirs}.lora_{side}.weight" for side in "AB"
    ]
    assert list(peft.read(tmp_path, shapes).matrices) == [ours]


@pytest.mark.parametrize(("architecture", "ours", "theirs"), NAMES)
def test_an_adapter_that_was_written_under_our_own_names_is_read(
    tmp_path: Path, architecture: str, ours: str, theirs: str
) -> None:
    peft.write(tmp_path, architecture, adapter(ours, (ours.rpartition(".")[2],)))
    rewrite(tmp_path, theirs, f"model.{ours}", fan_in_fan_out=False)
    assert list(peft.read(tmp_path, {ours: WIDTHS}).matrices) == [ours]


@pytest.mark.parametrize("body", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_model_with_sight_is_read(tmp_path: Path, body: str) -> None:
    ours = "layers.0.self_attn.q_proj"
    peft.write(tmp_path, "gemma3", adapter(ours, ("q_proj",)))
    rewrite(tmp_path, "base_model.model.model.", f"base_model.model.{body}", target_modules=r".*language_model.*q_proj")
    assert list(peft.read(tmp_path, {ours: WIDTHS}).matrices) == [ours]


def test_a_pattern_of_targets_meets_the_names_that_transformers_has(tmp_path: Path) -> None:
    first, second = "h.0.attn.c_attn", "h.1.attn.c_attn"
    peft.write(tmp_path, "gpt2", adapter(second, ("c_attn",)))
    rewrite(tmp_path, "", "", target_modules=r"transformer\.h\.1\.attn\.c_attn")
    assert list(peft.read(tmp_path, {first: WIDTHS, second: WIDTHS}).matrices) == [second]

"""Every architecture against transformers, on small random checkpoints with all their odd features on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel, load
from engine.embedding.pooling import pool
from engine.models import fastmath, rope
from engine.models.key_values import KeyValues
from engine.models.llama import LlamaArgs
from engine.models.mistral import MistralArgs
from engine.models.mpnet import MPNetArgs
from engine.models.qwen2 import Qwen2Args
from engine.models.qwen3 import Qwen3Args
from engine.weights import safetensors
from stoker.errors import ModelError
from tests.engine import cached
from tests.engine.tiny import largest
from tests.thorough import in_turn

GOLDENS = Path(__file__).parents[1] / "goldens"
CHECKPOINTS = GOLDENS / "architectures"
DECODERS = ("qwen2-tied", "qwen2-untied", "qwen3", "llama-llama3", "llama-linear", "mistral")
ENCODERS = ("bert", "mpnet")
#: What every position's logits and hidden states agree within.
CLOSE = 2e-4


@pytest.fixture(params=["fused", "plain"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute: the polynomials, and the plain operations (a GPU's, or without g++)."""
    if request.param == "plain":
        monkeypatch.setattr(fastmath, "fuses_on_cpu", lambda: False)


def golden(name: str) -> tuple[list[list[int]], list[np.ndarray]]:
    """(rows of tokens, what transformers computes of each by itself)."""
    content = np.load(GOLDENS / "architectures.npz")
    return [content[f"{name}.tokens.{row}"].tolist() for row in range(3)], [
        content[f"{name}.output.{row}"] for row in range(3)
    ]


def opened(name: str) -> LoadedModel:
    return load(name, [str(CHECKPOINTS / name)])


def config_of(name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((CHECKPOINTS / name / "config.json").read_text())
    return content


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("name", DECODERS)
def test_logits_agree_at_every_position(name: str) -> None:
    model = opened(name).llama
    rows, wanted = golden(name)
    for row, logits in zip(rows, wanted, strict=True):
        assert np.abs(np.array(model.logits(model(mx.array([row])))[0]) - logits).max() < CLOSE
    longest = max(map(len, rows))
    padded = mx.array([row + [1] * (longest - len(row)) for row in rows])
    batch = np.array(model.logits(model(padded)))
    for row, logits, got in zip(rows, wanted, batch, strict=True):
        assert np.abs(got[: len(row)] - logits).max() < CLOSE


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(
    ("name", "pieces"), in_turn(DECODERS, [(True, 5), (False, 5), (True, 1), (False, 1), (True, 64), (False, 64)])
)
def test_prefill_in_chunks_and_ragged_decoding_agree(name: str, pieces: tuple[bool, int]) -> None:
    """A prompt by exact chunks or by padded ones, joined to a batch, decoded over and beyond Mistral's window of 8."""
    exact, chunk = pieces
    model = opened(name).llama
    rows, wanted = golden(name)
    starts, batch = [20, 3, 9], KeyValues(model, 3, 96)
    for index, (row, start, logits) in enumerate(zip(rows, starts, wanted, strict=True)):
        kv = KeyValues(model, 1, 96)
        for begin in range(0, start, chunk):
            piece = row[begin : min(begin + chunk, start)]
            end = begin + len(piece)
            padded = piece if exact else piece + [1] * (chunk - len(piece))
            how = {"exact": True, "kv_length": end} if exact else {}
            got = cached.through(model, kv, [padded], [begin], **how)[0, : len(piece)]
            assert np.abs(got - logits[begin:end]).max() < CLOSE
        batch.put(index, kv, 0, start)
    for step in range(min(len(row) - start for row, start in zip(rows, starts, strict=True))):
        positions = [start + step for start in starts]
        got = cached.through(
            model, batch, [[row[at]] for row, at in zip(rows, positions, strict=True)], positions, kv_length=64
        )
        for index, at in enumerate(positions):
            assert np.abs(got[index, 0] - wanted[index][at]).max() < CLOSE


@pytest.mark.usefixtures("arithmetic")
def test_a_window_holds_far_beyond_what_decoding_reads_at_once() -> None:
    """The views leave out positions before the window: over several hundred positions, against the plain forward."""
    model = opened("mistral").llama
    tokens = np.random.default_rng(2).integers(4, 64, (3, 400)).tolist()
    wanted = np.array(model.logits(model(mx.array(tokens))))
    starts, batch = [390, 120, 64], KeyValues(model, 3, 400)
    for slot, start in enumerate(starts):
        kv = KeyValues(model, 1, 400)
        for begin in range(0, start, 100):
            piece = tokens[slot][begin : min(begin + 100, start)]
            got = cached.through(model, kv, [piece], [begin], exact=True, kv_length=begin + len(piece))
        assert np.abs(got[0, -1] - wanted[slot, start - 1]).max() < CLOSE
        batch.put(slot, kv, 0, start)
    got = cached.through(model, batch, [[row[start]] for row, start in zip(tokens, starts, strict=True)], starts)
    for slot, start in enumerate(starts):
        assert np.abs(got[slot, 0] - wanted[slot, start]).max() < CLOSE


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_agree_alone_and_padded(name: str) -> None:
    model = opened(name).encoder
    rows, wanted = golden(name)
    for row, hidden in zip(rows, wanted, strict=True):
        assert np.abs(np.array(model(mx.array([row]))[0]) - hidden).max() < CLOSE
    longest = max(map(len, rows))
    tokens = mx.array([row + [1] * (longest - len(row)) for row in rows])
    mask = mx.array([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    batch = model(tokens, mask)
    for row, hidden, got in zip(rows, wanted, np.array(batch), strict=True):
        assert np.abs(got[: len(row)] - hidden).max() < CLOSE
    for pooling, at in (("cls", 0), ("lasttoken", -1)):
        vectors = np.array(pool(batch, mask, pooling))
        assert np.abs(vectors - np.stack([hidden[at] for hidden in wanted])).max() < CLOSE
    means = np.stack([hidden.mean(axis=0) for hidden in wanted])
    assert np.abs(np.array(pool(batch, mask, "mean")) - means).max() < CLOSE
    assert np.abs(np.array(pool(batch[:1], None, "lasttoken"))[0] - wanted[0][-1]).max() < CLOSE


def test_what_was_loaded_is_said() -> None:
    for name in (*DECODERS, *ENCODERS):
        loaded = opened(name)
        assert loaded.architecture == name.partition("-")[0]
        assert loaded.kind == ("embed" if name in ENCODERS else "generate")
    assert opened("mpnet").context == 160, "two rows of the table of positions are for padding"
    assert opened("qwen3").linear_shapes["layers.0.self_attn.q_proj"] == (32, 64)
    assert opened("qwen2-untied").llama.args.qkv_bias


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_encoders_load_with_the_prefix_and_the_heads_of_pre_training(name: str, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / name, tmp_path, dirs_exist_ok=True)
    weights = safetensors.read_folder(tmp_path)
    mx.eval(weights)
    prefixed = {f"{name}.{tensor}": array for tensor, array in weights.items()}
    extra = {"bert": "cls.predictions.bias", "mpnet": "lm_head.bias"}[name]
    safetensors.write(tmp_path / "model.safetensors", {**prefixed, extra: mx.zeros(64)})
    tokens = mx.array([golden(name)[0][2]])
    assert mx.array_equal(load(name, [str(tmp_path)]).encoder(tokens), opened(name).encoder(tokens))


def test_the_configs_of_older_transformers_say_the_same() -> None:
    new = config_of("llama-llama3")
    scaling = dict(new.pop("rope_parameters"))  # type: ignore[call-overload]
    theta = scaling.pop("rope_theta")
    old = {**new, "rope_theta": theta, "rope_scaling": scaling}
    assert LlamaArgs.from_config(old) == LlamaArgs.from_config(config_of("llama-llama3"))
    linear = config_of("llama-linear")
    linear.pop("rope_parameters")
    args = LlamaArgs.from_config({**linear, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}})
    assert args == LlamaArgs.from_config(config_of("llama-linear"))
    assert args.rope_scaling == rope.LinearScaling(3.0)


def test_a_stated_window_that_is_switched_off_means_nothing() -> None:
    config = {**config_of("qwen2-tied"), "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 1}
    config.pop("layer_types")
    assert Qwen2Args.from_config(config).window is None
    config |= {"use_sliding_window": True, "max_window_layers": 0}
    assert Qwen2Args.from_config(config).window == 32768
    assert MistralArgs.from_config({**config_of("mistral"), "sliding_window": None}).window is None


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [("qwen2-tied", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1},
      "use_sliding_window with 1 sliding layers of 2"),
     ("qwen2-tied", {"layer_types": ["full_attention", "sliding_attention"]}, "1 sliding layers of 2"),
     ("qwen2-tied", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
     ("qwen2-tied", {"layer_types": "full"}, "layer_types"),
     ("qwen2-tied", {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": "1"},
      "max_window_layers"),
     ("qwen2-tied", {"dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention_config"),
     ("qwen2-tied", {"rope_scaling": {"type": "longrope", "factor": 4.0}}, '"longrope"'),
     ("qwen2-tied", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
     ("qwen3", {"attention_bias": True}, "attention_bias"),
     ("qwen3", {"num_experts": 128}, "num_experts"),
     ("qwen3", {"head_dim": 15}, "even"),
     ("mistral", {"sliding_window": 0}, "sliding_window"),
     ("llama-llama3", {"rope_parameters": {"rope_type": "dynamic"}}, "factor"),
     ("llama-llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
     ("llama-llama3", {"rope_parameters": [1]}, "rope_parameters"),
     ("llama-llama3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary"),
     ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets"),
     ("mpnet", {"max_position_embeddings": 2}, "max_position_embeddings"),
     ("mpnet", {"hidden_act": "relu"}, "hidden_act"),
     ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
     ("bert", {"num_attention_heads": 5}, "hidden_size is 32, which is no multiple of num_attention_heads, 5"),
     ("qwen3", {"head_dim": 7}, "num_attention_heads is 4, num_key_value_heads 2, and a head has 7 numbers"),
     ("mistral", {"num_key_value_heads": 3}, "num_attention_heads is 4, num_key_value_heads 3, and a head has 8")],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(
    tmp_path: Path, name: str, change: dict[str, object], cause: str
) -> None:
    shutil.copytree(CHECKPOINTS / name, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(name), **change}))
    with pytest.raises(ModelError, match=cause):
        load(name, [str(tmp_path)])


def test_gguf_metadata_give_the_same_sizes() -> None:
    for args, name in ((LlamaArgs, "llama-linear"), (Qwen2Args, "qwen2-untied"), (Qwen3Args, "qwen3")):
        wanted = args.from_config(config_of(name))
        prefix = args.architecture
        metadata: dict[str, Any] = {
            f"{prefix}.block_count": wanted.layers,
            f"{prefix}.embedding_length": wanted.dim,
            f"{prefix}.feed_forward_length": wanted.hidden,
            f"{prefix}.attention.head_count": wanted.heads,
            f"{prefix}.attention.head_count_kv": wanted.kv_heads,
            f"{prefix}.attention.key_length": wanted.head_dim,
            f"{prefix}.attention.value_length": wanted.head_dim,
            f"{prefix}.context_length": wanted.context,
            f"{prefix}.rope.freq_base": wanted.rope_base,
            f"{prefix}.attention.layer_norm_rms_epsilon": wanted.norm_eps,
        }
        if wanted.rope_scaling is not None:
            metadata[f"{prefix}.rope.scaling.type"] = "linear"
            metadata[f"{prefix}.rope.scaling.factor"] = 3.0
        assert args.from_gguf(metadata, vocab=64, tied=wanted.tied) == wanted
        for change in ({"expert_count": 8}, {"rope.scaling.type": "yarn"}, {"rope.dimension_count": 4}):
            key, value = next(iter(change.items()))
            with pytest.raises(ModelError, match=key):
                args.from_gguf({**metadata, f"{prefix}.{key}": value}, vocab=64, tied=True)


def test_the_factors_of_a_gguf_stretch_like_llama3() -> None:
    args = LlamaArgs.from_config(config_of("llama-llama3"))
    assert isinstance(args.rope_scaling, rope.Llama3)
    plain = args.rope_base ** (np.arange(0, args.head_dim, 2) / args.head_dim)
    factors = rope.periods(args.head_dim, args.rope_base, args.rope_scaling) / plain
    assert factors.min() == 1.0
    assert factors.max() == pytest.approx(8.0)
    assert 1.1 < np.median(factors) < 8.0, "one of the frequencies is blended"
    x = mx.random.normal((1, 2, 9, args.head_dim))
    wanted = rope.Rope(args.head_dim, args.rope_base, args.rope_scaling)(x, 40)
    got = rope.Rope(args.head_dim, args.rope_base, None, mx.array(factors.astype(np.float32)))(x, 40)
    assert largest(wanted - got) < 1e-5


@pytest.mark.parametrize(
    "scaling", [None, rope.LinearScaling(4.0), rope.Llama3(8.0, 1.0, 4.0, 64), rope.Yarn(4.0, 0.0, 2.5, 1.2)], ids=str
)
def test_each_pair_turns_by_its_position_over_its_period(scaling: rope.Scaling) -> None:
    """What the kernel of one new token a row gets is what everything else computes."""
    turn = rope.Rope(8, 100.0, scaling)
    x = mx.random.normal((1, 1, 6, 8), key=mx.random.key(1))
    angles = mx.arange(40, 46)[:, None] / turn.periods
    first, second = x[..., :4], x[..., 4:]
    cos, sin = mx.cos(angles), mx.sin(angles)
    wanted = mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    assert largest(turn(x, 40) - wanted) < 1e-4


def test_what_the_older_field_says_of_rope_takes_the_newer_ones_place() -> None:
    newer = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert rope.from_config({"rope_parameters": newer}, 64, 8) == (5e5, rope.LinearScaling(2.0))
    both = {"rope_parameters": newer, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert rope.from_config(both, 64, 8) == (1e4, rope.LinearScaling(4.0))


def test_gguf_says_how_positions_are_stretched_in_either_way() -> None:
    plain = {"llama.rope.freq_base": 5e5}
    assert rope.from_gguf(plain, "llama") == (5e5, None)
    assert rope.from_gguf({**plain, "llama.rope.scale_linear": 2.0}, "llama") == (5e5, rope.LinearScaling(2.0))
    newer = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope.from_gguf({**plain, **newer}, "llama") == (5e5, rope.LinearScaling(4.0))


def test_mpnet_needs_no_more_positions_than_it_has() -> None:
    assert MPNetArgs.from_config(config_of("mpnet")).context == 160

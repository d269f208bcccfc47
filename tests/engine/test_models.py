"""Architectures: caches against the plain forward pass, gradients, and the oracles' numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.generation import step as step_module
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling_batch import SamplingBatch
from engine.generation.step import Step
from engine.models import fastmath
from engine.models.attention import attention
from engine.models.bert import BertArgs
from engine.models.key_values import KeyValues
from engine.models.kv_sizes import bytes_per_token
from engine.models.layers import FusedLinear, Linear
from engine.models.llama import Llama, LlamaArgs
from engine.models.sentence import EmbeddingSpec
from stoker.errors import ModelError
from tests.engine import cached
from tests.engine.conftest import TINY, RandomTensors
from tests.engine.tiny import largest

GOLDENS = Path(__file__).parents[1] / "goldens"
Close = Callable[[mx.array, mx.array], float]


@pytest.fixture(params=["fused", "plain"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute: the polynomials, and the plain operations (a GPU's, or without g++)."""
    if request.param == "plain":
        monkeypatch.setattr(fastmath, "fuses_on_cpu", lambda: False)
    elif not fastmath.fast(mx.zeros(1)):
        pytest.skip("nothing fuses here")
    return str(request.param)


@pytest.mark.usefixtures("arithmetic")
def test_exp_swiglu_and_gelu_are_right_to_a_millionth(close: Close) -> None:
    x = np.concatenate([np.linspace(-30, 30, 40_001), [-1e4, 1e4, 0.0, -0.0]])
    got = fastmath.gelu(mx.array(x.astype(np.float32)))
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x])
    assert np.abs(np.array(got) - exact).max() < 1e-6
    got = fastmath.swiglu(mx.array(x.astype(np.float32)), mx.array(2.0 * np.ones_like(x, np.float32)))
    np.testing.assert_allclose(np.array(got), 2 * x / (1 + np.exp(-np.clip(x, -700, 700))), rtol=2e-6, atol=1e-6)
    below = -np.abs(x[:-4])
    got = fastmath.exp_nonpositive(mx.array(below.astype(np.float32)))
    np.testing.assert_allclose(np.array(got), np.exp(below), rtol=4e-6)
    assert largest(fastmath.exp_nonpositive(mx.array([-1e30]))) < 1e-37


def test_gradients_of_a_form_for_gpus_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmath, "on_cpu", lambda: False)
    x, up, cotangent = (mx.random.normal((2, 5, 16), key=mx.random.key(seed)) for seed in (1, 2, 3))
    weight = 1.0 + 0.2 * mx.random.normal((16,), key=mx.random.key(4))
    for own, formula in (
        (fastmath.swiglu, lambda x, up: x * mx.sigmoid(x) * up),
        (
            lambda x, up: fastmath.frozen_rms_norm(x, weight, 1e-5) * up,
            lambda x, up: x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-5) * weight * up,
        ),
    ):
        got, wanted = (
            mx.value_and_grad(lambda x, up, run=run: mx.sum(run(x, up) * cotangent), argnums=(0, 1))(x, up)
            for run in (own, formula)
        )
        assert abs(got[0].item() - wanted[0].item()) < 1e-4
        assert max(largest(left - right) for left, right in zip(got[1], wanted[1], strict=True)) < 1e-5


def test_parts_of_a_joint_product_are_one_piece_of_memory_each() -> None:
    weights = [mx.random.normal((8, width), key=mx.random.key(width)) for width in (6, 2, 4)]
    linears = [Linear(f"l{index}", weight) for index, weight in enumerate(weights)]
    tensors = RandomTensors()
    fused = FusedLinear.of(tensors, "model.", *linears)
    assert fused is not None
    x = mx.random.normal((3, 8), key=mx.random.key(9))
    for part, linear, weight in zip(fused(x), linears, weights, strict=True):
        assert largest(part - x @ weight) < 1e-5
        assert largest(linear.weight - weight) == 0.0
        assert np.asarray(linear.weight).T.flags.c_contiguous
    assert np.asarray(fused.columns).flags.c_contiguous


@pytest.mark.parametrize(("length", "past"), [(1, 0), (7, 0), (5, 3), (300, 0), (300, 41), (1, 64)])
def test_attention_is_that_of_mlx(close: Close, length: int, past: int) -> None:
    queries = mx.random.normal((2, 6, length, 8), key=mx.random.key(1))
    keys, values = (mx.random.normal((2, 2, past + length, 8), key=mx.random.key(seed)) for seed in (2, 3))
    some = mx.random.uniform(shape=(2, 1, 1, past + length), key=mx.random.key(4)) < 0.7
    some[..., 0] = True
    bias = mx.random.normal((1, 6, length, past + length), key=mx.random.key(5))
    for mask in (None, "causal", some, bias):
        wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=mask)
        assert close(attention(queries, keys, values, scale=0.3, mask=mask), wanted) < 5e-6


@pytest.mark.parametrize(("length", "past"), [(1, 20), (7, 3), (150, 0), (150, 41)])
@pytest.mark.parametrize("window", [1, 5, 70])
def test_a_window_is_the_mask_that_says_it(close: Close, window: int, length: int, past: int) -> None:
    """In each block of queries, whose first key is the first that its first query sees."""
    queries, keys, values = (
        mx.random.normal((1, 2, tokens, 8), key=mx.random.key(seed))
        for seed, tokens in ((1, length), (2, past + length), (3, past + length))
    )
    back = (past + mx.arange(length)[:, None]) - mx.arange(past + length)
    seen = ((back >= 0) & (back < window))[None, None]
    wanted = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.3, mask=seen)
    assert close(attention(queries, keys, values, scale=0.3, mask="causal", window=window), wanted) < 5e-6


def test_a_query_that_sees_nothing_gives_no_nan() -> None:
    x = mx.random.normal((1, 2, 3, 4))
    assert mx.isfinite(attention(x, x, x, scale=1.0, mask=mx.zeros((1, 1, 1, 3), mx.bool_))).all()


def test_gradients_agree_with_the_plain_operations(monkeypatch: pytest.MonkeyPatch, tiny_llama: Llama) -> None:
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

    class Scales:
        """An adapter that scales every linear layer's output by a learned number."""

        apart = False
        anchor: mx.array | None = None

        def __init__(self, scales: dict[str, mx.array]):
            self.scales = scales

        def apply(self, name: str, x: mx.array, y: mx.array) -> mx.array:
            return y * self.scales[name]

    def loss(scales: dict[str, mx.array]) -> mx.array:
        logits = tiny_llama.logits(tiny_llama(tokens, adapters=Scales(scales)))
        return (mx.logsumexp(logits, axis=-1) - logits[..., 7]).mean()

    scales = {name: mx.array(1.0) for name in tiny_llama.linear_shapes}
    fused_loss, fused = mx.value_and_grad(loss)(scales)
    mx.eval(fused_loss, fused)
    monkeypatch.setattr(fastmath, "fuses_on_cpu", lambda: False)
    plain_loss, plain = mx.value_and_grad(loss)(scales)
    assert abs(fused_loss.item() - plain_loss.item()) < 1e-5
    for name in scales:
        assert abs(fused[name].item() - plain[name].item()) < 1e-5, name
    assert any(abs(gradient.item()) > 1e-3 for gradient in plain.values())


def test_decoding_leaves_other_rows_alone(tiny_llama: Llama) -> None:
    kv = KeyValues(tiny_llama, 3, 256)
    cached.through(tiny_llama, kv, [[1, 2, 3]] * 3, [0, 0, 0])
    before = [np.array(array[2]) for array in (*kv.keys, *kv.values)]
    cached.through(tiny_llama, kv, [[4], [5]], [3, 7])
    assert all(np.array_equal(old, np.array(new[2])) for old, new in zip(before, (*kv.keys, *kv.values), strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_decoding_writes_in_place(tiny_llama: Llama, rows: int) -> None:
    """20 MB an array: a copy of each would show at once."""
    kv = KeyValues(tiny_llama, rows, 300_000)
    step = Step(tiny_llama, "none")

    def decode(position: int) -> None:
        tokens, offset = mx.array([[4]] * rows), mx.array([position] * rows)
        mx.eval(step(kv, ForwardInput(tokens, offset, 64), SamplingBatch()), kv.keys, kv.values)

    decode(0)
    mx.reset_peak_memory()
    resting = mx.get_active_memory()
    decode(1)
    assert mx.get_peak_memory() - resting < kv.keys[0].nbytes // 2


def test_only_so_many_traces_are_kept(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "TRACES", dict.fromkeys(("all", "decode"), 3))
    kv, step = KeyValues(tiny_llama, 1, 256), Step(tiny_llama, "decode")
    # The layers of the last one were given up for those of 192; the head is the same for all.
    for kv_length in (64, 64, 128, 64, 192, 64, 128):
        mx.eval(step(kv, ForwardInput(mx.array([[4]]), mx.array([5]), kv_length), SamplingBatch()))
    assert (step.traces, step.traced) == (4, 5)
    mx.eval(step(kv, ForwardInput(mx.array([[4, 5]]), mx.array([5]), 64), SamplingBatch()))
    assert (step.traces, step.traced) == (5, 5), "a prompt is not compiled here, and counts as no trace"
    assert len(step.kept) == 3


def test_keys_and_values_stay_when_rows_and_columns_change(tiny_llama: Llama) -> None:
    kv = KeyValues(tiny_llama, 2, 256)
    cached.through(tiny_llama, kv, [[1, 2, 3], [4, 5, 6]], [0, 0])
    first, before = (np.array(kv.keys[1][row, :, :3]) for row in (0, 1))
    for rows, capacity in ((4, 512), (2, 512), (2, 256)):
        kv.resize(rows, capacity)
        assert (kv.rows, kv.capacity) == (rows, capacity)
        assert np.array_equal(np.array(kv.keys[1][1, :, :3]), before)
    kv.resize(1, 256)
    kv.resize(2, 256)
    assert np.array_equal(np.array(kv.keys[1][0, :, :3]), first), "of fewer rows the first stay"
    assert kv.nbytes == 2 * 256 * bytes_per_token(tiny_llama) == sum(array.nbytes for array in (*kv.keys, *kv.values))


CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48,
    "vocab_size": 61, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_scaling": None,
}  # fmt: skip


def test_llama_sizes_come_from_the_config() -> None:
    args = LlamaArgs.from_config({**CONFIG, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}})
    assert (args.kv_heads, args.head_dim, args.rope_base, args.tied) == (4, 8, 5e5, False)
    assert LlamaArgs.from_config({**CONFIG, "head_dim": 16}).head_dim == 16
    assert (args.norm_eps, args.context) == (1e-5, 2048)
    unsaid = {name: value for name, value in CONFIG.items() if name != "rms_norm_eps"}
    assert LlamaArgs.from_config(unsaid).norm_eps == 1e-6, "as transformers takes it"


def test_every_norm_has_the_epsilon_of_the_config() -> None:
    mx.random.seed(7)
    model = Llama(replace(TINY, norm_eps=0.25, qk_norm=True), RandomTensors())
    layer = model.layers[1]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn.q_norm, layer.self_attn.k_norm]
    assert [norm and norm.eps for norm in (*norms, model.norm)] == [0.25] * 5
    x = mx.array([[3.0, 4.0] * 16])
    root = np.sqrt((9 + 16) / 2 + 0.25)
    wanted = np.array(x) / root * np.array(layer.input_layernorm.weight)
    np.testing.assert_allclose(np.array(layer.input_layernorm(x)), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [{"rope_scaling": {"type": "linear"}}, {"hidden_act": "gelu"}, {"attention_bias": True}, {"mlp_bias": True},
     {"sliding_window": 4096}, {"hidden_size": None}, {"num_hidden_layers": -1}, {"vocab_size": "61"},
     {"rms_norm_eps": 0}, {"quantization_config": {}}, {"num_key_value_heads": 3},
     {"rope_parameters": {"rope_type": "llama3"}}],
)  # fmt: skip
def test_what_llama_does_not_support_is_refused_by_name(change: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        LlamaArgs.from_config({**CONFIG, **change})
    assert next(iter(change)) in str(caught.value) or "heads" in str(caught.value)


def test_smollm2_agrees_with_transformers(smollm2: LoadedModel) -> None:
    model, golden = smollm2.decoder, np.load(GOLDENS / "smollm2.npz")
    for index, prompt in enumerate(json.loads((GOLDENS / "smollm2.json").read_text())["prompts"]):
        logits = np.array(model.logits(model(mx.array([prompt["prompt_ids"]])))[0])
        for row, position in enumerate(golden[f"positions_{index}"]):
            wanted = golden[f"top_logits_{index}"][row]
            np.testing.assert_allclose(logits[position, golden[f"top_ids_{index}"][row]], wanted, atol=2e-3)


def test_minilm_agrees_with_sentence_transformers(minilm: LoadedModel) -> None:
    texts, golden = json.loads((GOLDENS / "minilm.json").read_text())["texts"], np.load(GOLDENS / "minilm.npz")["alone"]
    assert minilm.embedding == EmbeddingSpec(max_tokens=256, pooling="mean", normalize=True, dim=384)
    rows = [text["token_ids"] for text in texts]
    short = [row for row, ids in enumerate(rows) if len(ids) <= 40]
    longest = max(len(rows[row]) for row in short)
    tokens = mx.array([rows[row] + [0] * (longest - len(rows[row])) for row in short])
    mask = mx.array([[True] * len(rows[row]) + [False] * (longest - len(rows[row])) for row in short])
    hidden = minilm.encoder(tokens, mask)
    vectors = np.array((hidden * mask[..., None]).sum(axis=1))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    assert np.abs(vectors - golden[short]).max() < 5e-6
    for row in (3, len(rows) - 1):
        alone = np.array(minilm.encoder(mx.array([rows[row]])).mean(axis=1)[0])
        assert np.abs(alone / np.linalg.norm(alone) - golden[row]).max() < 5e-6


def test_pooling_follows_sentence_transformers_files(tmp_path: Path) -> None:
    args = BertArgs(layers=1, dim=8, hidden=8, heads=2, vocab=9, positions=64, types=2, norm_eps=1e-12)
    assert EmbeddingSpec.from_folder(tmp_path, args) == EmbeddingSpec(64, "mean", False, 8)
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert EmbeddingSpec.from_folder(tmp_path, args).pooling == "cls"
    pooling.write_text(json.dumps({"pooling_mode": "median"}))
    with pytest.raises(ModelError, match='pooling "median" is not supported'):
        EmbeddingSpec.from_folder(tmp_path, args)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense", "path": ""}]))
    with pytest.raises(ModelError, match="Dense"):
        EmbeddingSpec.from_folder(tmp_path, args)

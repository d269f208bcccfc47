"""The engine with its kernels against the engine without: a decode step, a sampler, an encoder, on the emulator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import load
from engine.embedding.forward import pooled
from engine.generation.draws import Draw
from engine.generation.forward_input import ForwardInput
from engine.generation.sampling import choose, picks
from engine.generation.sampling_batch import sampling_batch
from engine.generation.step import Step
from engine.models.decoder import Decoder
from engine.models.joint import JointKeyValues
from engine.models.key_values import KeyValues
from engine.models.llama import Llama
from engine.platform.probe import choose_kernels, describe_kernels
from kernels import backend
from kernels.emulator import build
from kernels.emulator.observe import observing
from kernels.emulator.trace import Launch
from kernels.registry import KERNELS
from stoker.contract import GenerateRequest
from stoker.errors import ConfigError
from tests.engine import bridged, tiny

GOLDENS = Path(__file__).parents[1] / "goldens"
#: The newest tokens of three rows of different lengths.
TOKENS, LENGTHS = [[5], [9], [11]], [4, 1, 7]

pytestmark = pytest.mark.skipif(not build.available(), reason="the emulator needs g++")


def _ran(launches: list[Launch]) -> set[str]:
    """The kernels that ran."""
    return {name for name in KERNELS for launch in launches if launch.name.startswith(f"custom_kernel_{name}_")}


def _decoded(
    llama: Decoder, pool: AdapterPool | None = None, steps: int = 1
) -> tuple[list[list[float]], list[mx.array]]:
    """Decode steps over a cache of fixed content: the last one's (chosen, raw, logprob, probability), and each row's
    keys and values after them."""
    rows = len(TOKENS)
    source = KeyValues(llama, rows, 16)
    random = np.random.default_rng(3)
    sizes = llama.kv_sizes
    for arrays, sides in ((source.keys, sizes.keys), (source.values, sizes.values)):
        for layer, side in enumerate(sides):
            numbers = random.normal(0, 1, (rows, side.heads, 16, side.size)).astype(np.float32)
            arrays[layer] = side.pack(mx.array(numbers))
    kv: KeyValues | JointKeyValues
    kv = tiny.joint(llama, rows, 16) if llama.kv_sizes.joint else KeyValues(llama, rows, 16)
    for row, length in enumerate(LENGTHS):
        kv.put(row, source, row, length)
    requests = [
        GenerateRequest(model="m", prompt="x", temperature=0.8, top_k=20, top_p=0.9, seed=row) for row in range(3)
    ]
    draws = [Draw(request, uniform) for request, uniform in zip(requests, (0.1, 0.5, 0.9), strict=True)]
    adapters = None if pool is None else pool.rows([1, 0, 2])
    step, tokens, lengths = Step(llama, "none"), mx.array(TOKENS, mx.int32), np.array(LENGTHS, np.int32)
    for _ in range(steps):
        given = ForwardInput(tokens, mx.array(lengths), 16, adapters=adapters, places=kv.pending(lengths))
        chosen = step(kv, given, sampling_batch(draws, llama.args.vocab))
        tokens, lengths = chosen[0][:, None], lengths + 1
    kv.clear_beyond(lengths.tolist())
    return [np.array(array).tolist() for array in chosen], tiny.sides(kv, rows, 16)


class Steps(NamedTuple):
    """Of a decoder with the kernels in the emulator and without: what was launched, and keys and values of both."""

    launches: list[Launch]
    kept: list[mx.array]
    plain: list[mx.array]


def same_steps(model: Decoder, pool: AdapterPool | None = None, steps: int = 3) -> Steps:
    """Steps with kernels, which choose what those without choose."""
    wanted, plain = _decoded(model, pool, steps)
    with backend.using("emulator"), observing() as launches:
        got, kept = _decoded(model, pool, steps)
    assert got[0] == wanted[0]
    np.testing.assert_allclose(got[1:], wanted[1:], rtol=2e-4, atol=2e-5)
    return Steps(launches, kept, plain)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "mistral"])
def test_a_decode_step_with_kernels_is_that_without(name: str) -> None:
    llama = load(name, [str(GOLDENS / "architectures" / name)]).llama
    launches, kept, plain = same_steps(llama)
    assert _ran(launches) == {"attend", "norm_project", "add_rms_norm", "sample"}
    for one, other in zip(kept, plain, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-5)


@pytest.mark.parametrize(("name", "bits"), [("qwen3", 8), ("mistral", 4)])
def test_a_decode_step_over_packed_keys_and_values_is_that_without_kernels(name: str, bits: int) -> None:
    """What the kernel keeps of a token are the same words, so the steps behind it see the same."""
    llama = load(name, [str(GOLDENS / "architectures" / name)], kv_bits=bits).llama
    launches, kept, plain = same_steps(llama)
    assert _ran(launches) == {"attend", "norm_project", "add_rms_norm", "sample"}
    for one, other in zip(kept, plain, strict=True):
        assert one.dtype == mx.uint32
        assert mx.array_equal(one, other)


@pytest.mark.parametrize("name", ["phi3", "gemma3", "gpt_oss"])
def test_a_model_file_of_mlx_lm_attends_through_the_kernel_by_its_windows_and_sinks(name: str) -> None:
    model = bridged.bridged(name).decoder
    launches, kept, plain = same_steps(model)
    attended = [launch for launch in launches if launch.name.startswith("custom_kernel_attend_stored_")]
    assert len(attended) == 3 * len(model.kv_sizes.keys)
    for one, other in zip(kept, plain, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=2e-5)


@pytest.mark.parametrize(("name", "bits"), [("gemma3", 8), ("gpt_oss", 4)])
def test_a_model_file_of_mlx_lm_packs_and_reads_by_kernels(name: str, bits: int) -> None:
    """Windows and sinks too. A layer packs its new token in one launch, and attends in one."""
    model = bridged.bridged(name).decoder
    model.kv_bits = bits
    launches, kept, plain = same_steps(model)
    made = [launch.name for launch in launches if re.match(r"custom_kernel_(pack_kv|attend_stored)_", launch.name)]
    assert len(made) == 2 * 3 * len(model.kv_sizes.keys)
    for one, other in zip(kept, plain, strict=True):
        assert mx.array_equal(one, other)


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("joint", [True, False], ids=["one product", "two products"])
@pytest.mark.parametrize("targets", [ALL, ("gate_proj",), ("up_proj", "down_proj")], ids="-".join)
def test_adapters_of_all_kinds_decode_in_one_batch_through_the_kernels(
    tiny_llama: Llama, tmp_path: Path, targets: tuple[str, ...], joint: bool
) -> None:
    """A row has LoRA, one none, one DoRA. Gate and up are adapted and gated by one kernel, also where one alone is."""
    if not joint:  # as where weights are of few bits
        for layer in tiny_llama.layers:
            layer.mlp.gate_up = None
    model = tiny.loaded(tiny_llama)
    pool = AdapterPool(model, AdapterStore(tmp_path))
    pool.save("plain", tiny.adapter(model, 3, 1, targets), {})
    pool.save("dora", tiny.adapter(model, 8, 2, targets, dora=True), {})
    launches = same_steps(tiny_llama, pool).launches
    names = [launch.name.split("__")[0].removeprefix("custom_kernel_") for launch in launches]
    norms = "lora_add_rms_norm" if len(targets) > 1 else "add_rms_norm"
    assert {"lora_swiglu", norms, "attend"} <= set(names)
    assert names.count("lora_swiglu") == 3 * len(tiny_llama.layers)
    assert "lora" not in names


SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
]


@pytest.mark.parametrize(("temperature", "kernel"), [(0.0, "greedy"), (0.8, "sample")])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_next_to_what_a_kernel_chooses_stand_the_alternatives_that_stand_there_without(
    temperature: float, kernel: str, dtype: mx.Dtype
) -> None:
    logits = mx.array(np.random.default_rng(8).normal(0, 2.5, (3, 100)).astype(np.float32)).astype(dtype)
    asked = [GenerateRequest(model="m", prompt="x", temperature=temperature, top_logprobs=count) for count in (3, 0, 5)]
    draws = [Draw(request, 0.4) for request in asked]
    made = sampling_batch(draws, 100)
    wanted = picks(choose(logits, made), draws)
    with backend.using("emulator"), observing() as launches:
        got = picks(choose(logits, made), draws)
    assert _ran(launches) == {kernel}
    for one, other in zip(got, wanted, strict=True):
        assert one.token_id == other.token_id
        assert [token for token, _ in one.alternatives] == [token for token, _ in other.alternatives]
        found = [one.logit, one.logprob, one.probability, *(logprob for _, logprob in one.alternatives)]
        exact = [other.logit, other.logprob, other.probability, *(logprob for _, logprob in other.alternatives)]
        assert found == pytest.approx(exact, abs=1e-4)
    assert [len(pick.alternatives) for pick in got] == [3, 0, 5]


def test_every_sampler_chooses_through_the_kernel_what_it_chooses_without() -> None:
    random = np.random.default_rng(7)
    logits = mx.array(random.normal(0, 2.5, (len(SAMPLERS) * 4, 300)).astype(np.float32))
    requests = [GenerateRequest(model="m", prompt="x", **fields) for fields in SAMPLERS * 4]
    tally = {3: 0, 17: 2, 40: 1}
    mask = np.full(-(-300 // 32), 0x7FFF7FFF, dtype=np.int32)
    draws = [
        Draw(request, float(random.random()), tally, mask if row % 3 else None, fresh=row % 2 == 0)
        for row, request in enumerate(requests)
    ]
    made = sampling_batch(draws, 300)
    last = mx.array(random.integers(0, 300, len(draws)), mx.int32)
    wanted = [np.array(array) for array in choose(logits, made, last)]
    with backend.using("emulator"), observing() as launches:
        got = [np.array(array) for array in choose(logits, made, last)]
    assert len(launches) == 2
    assert got[0].tolist() == wanted[0].tolist()
    for one, other in zip(got[1:], wanted[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


def test_an_encoder_with_kernels_gives_the_vectors_without() -> None:
    model = load("bert", [str(GOLDENS / "architectures" / "bert")]).encoder
    tokens = mx.array([[2, 5, 9, 4], [3, 7, 0, 0]], mx.int32)
    mask = mx.array([[True] * 4, [True, True, False, False]])
    wanted = model(tokens, mask)
    with backend.using("emulator"), observing() as launches:
        got = model(tokens, mask)
    assert "add_layer_norm" in _ran(launches)
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=2e-5)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"])
def test_pooling_next_to_the_kernels_gives_the_vectors_without(pooling: str, padded: bool) -> None:
    encoder = load("bert", [str(GOLDENS / "architectures" / "bert")]).encoder
    tokens = np.array([[2, 5, 9, 4], [3, 7, 0, 0]], np.int32)
    position_ids = mx.array(np.ascontiguousarray(encoder.position_ids(tokens)).reshape(-1))
    mask = [mx.array([[True] * 4, [True, True, False, False]])] if padded else []
    run = pooled(encoder, pooling, 2, 4)
    wanted = run(mx.array(tokens.reshape(-1)), position_ids, *mask)
    with backend.using("emulator"), observing() as launches:
        got = run(mx.array(tokens.reshape(-1)), position_ids, *mask)
    assert _ran(launches) == {"add_layer_norm", *(["mean_pool"] if pooling == "mean" else [])}
    np.testing.assert_allclose(np.array(got), np.array(wanted), atol=2e-5)


def test_training_goes_through_no_kernel(tiny_llama: Llama) -> None:
    with backend.using("emulator"), observing() as launches:
        tiny_llama(mx.array([[1, 2, 3]]))
    assert not launches


def test_which_kernels_are_in_use_is_reported_and_a_wrong_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_kernels() == "none in use: MLX runs on a CPU"
    monkeypatch.setattr(backend, "of_machine", lambda: "metal")
    monkeypatch.setattr("engine.platform.probe.of_machine", lambda: "metal")
    try:
        choose_kernels("lora,sample")
        assert describe_kernels().startswith("sample, lora in use on metal; off: attend,")
        with pytest.raises(ConfigError, match="there is no kernel samples"):
            choose_kernels("lora,samples")
        choose_kernels("off")
        assert describe_kernels() == "none in use: STOKER_KERNELS says so"
    finally:
        choose_kernels("auto")

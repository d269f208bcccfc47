"""What a config.json of a real folder says in other words than mlx-lm's files read, leaves out, or asks for apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.checkpoints.loading import load
from engine.models import rope
from engine.models.bridge import package, weights
from engine.models.bridge.arguments import kind_of, types_of
from engine.models.bridge.configs import _CONTEXT_FIELDS
from engine.models.bridge.decoder import BridgedDecoder
from engine.platform.jsonfiles import read_config
from stoker.errors import ModelError
from tests.engine.architectures import config
from tests.engine.bridged import assert_close, network, write_folder

#: A field that a file does not have.
ABSENT = object()
FULL, SLIDING = "full_attention", "sliding_attention"
ROW = mx.array([[*range(1, 31)]])


def described(name: str, **fields: Any) -> dict[str, Any]:
    return {field: value for field, value in {**config(name), **fields}.items() if value is not ABSENT}


def made_of(name: str, filled: nn.Module, **fields: Any) -> nn.Module:
    """The network of a config.json that is changed so, with the weights of another."""
    made, _ = weights.network_of(described(name, **fields), name)
    made.load_weights(tree_flatten(filled.parameters()))
    return made


def logits(made: nn.Module) -> np.ndarray:
    return np.array(made(ROW))


def exaone(pattern: str | None) -> nn.Module:
    """mlx-lm's own network with these letters, its weights random."""
    file = package.load("exaone4")
    filled, _ = network("exaone4")
    own = file.Model(file.ModelArgs.from_dict(described("exaone4", sliding_window_pattern=pattern)))
    own.load_weights(tree_flatten(filled.parameters()))
    return own


@pytest.mark.parametrize(
    ("letters", "fields"),
    [
        ("LLLG", {"sliding_window_pattern": "LLLG", "layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
        ("LLLG", {"sliding_window_pattern": 4}),
        ("LGGL", {"sliding_window_pattern": ABSENT, "layer_types": [SLIDING, FULL, FULL, SLIDING]}),
        ("LG", {"sliding_window_pattern": "LG"}),
        (None, {"sliding_window_pattern": "LLLG", "sliding_window": None, "layer_types": [FULL] * 4}),
        (None, {"sliding_window_pattern": None, "sliding_window": None, "layer_types": [FULL] * 4}),
    ],
    ids=["letters and a list", "a number", "a list", "letters", "no window", "no pattern"],
)
def test_an_exaone_4_has_windows_where_its_list_of_layers_says(letters: str | None, fields: dict[str, Any]) -> None:
    """LG AI's own folders have the letters and the list, which was refused."""
    own = exaone(letters)
    np.testing.assert_array_equal(logits(made_of("exaone4", own, **fields)), logits(own))


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_types": [FULL, SLIDING]},
        {"layer_types": ["chunked_attention"] * 4},
        {"layer_types": [[FULL]] * 4},
        {"sliding_window_pattern": "LX"},
        {"sliding_window_pattern": 0},
        {"sliding_window_pattern": 1 << 40},
    ],
    ids=["too few", "another kind", "lists", "letters", "zero", "huge"],
)
def test_what_is_no_pattern_of_an_exaone_4_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"layer_types|sliding_window_pattern"):
        weights.network_of(described("exaone4", **fields), "exaone4")


def test_layers_of_a_cohere_2_without_a_pattern_are_held_against_its_own() -> None:
    """Each fourth has no window, where Gemma's sixth has none."""
    without = described("cohere2", sliding_window_pattern=ABSENT, layer_types=[SLIDING, SLIDING, SLIDING, FULL])
    assert weights.network_of(without, "cohere2")[1].sliding_window_pattern == 4
    with pytest.raises(ModelError, match="layer_types"):
        weights.network_of({**without, "layer_types": [SLIDING] * 4}, "cohere2")


def test_steps_of_time_of_a_granite_4_are_bounded_only_where_its_config_says_so() -> None:
    """As in transformers; mlx-lm bounds them by 0.001, and learned ones are shorter. So short ones leave no state: what
    its layers give is then what they give of the present token alone."""
    short, _ = network("granitemoehybrid")
    for layer in short.layers:
        if layer.layer_type == "mamba":
            layer.mamba.dt_bias = mx.full(layer.mamba.dt_bias.shape, -30.0)
    unbounded = made_of("granitemoehybrid", short, time_step_limit=[0.0, 1e9])
    for absent in (ABSENT, None):
        made = made_of("granitemoehybrid", short, time_step_limit=absent)
        np.testing.assert_array_equal(logits(made), logits(unbounded))
    bounded = made_of("granitemoehybrid", short, time_step_limit=[0.001, 100.0])
    assert np.abs(logits(bounded) - logits(unbounded)).max() > 1e-4


@pytest.mark.parametrize("stated", [ABSENT, None], ids=["absent", "null"])
def test_a_granite_4_turns_heads_only_where_its_config_says_so(stated: object) -> None:
    filled, _ = network("granitemoehybrid")
    made = {
        kind: logits(made_of("granitemoehybrid", filled, position_embedding_type=kind))
        for kind in (stated, "nope", "rope")
    }
    np.testing.assert_array_equal(made[stated], made["nope"])
    assert np.abs(made["rope"] - made["nope"]).max() > 1e-3


@pytest.mark.parametrize("name", ["ernie4_5", "ernie4_5_moe"])
def test_an_ernie_that_does_not_say_so_ties_its_head(name: str) -> None:
    """transformers 4 leaves out of a config.json what is so by default."""
    _, args = weights.network_of(described(name, tie_word_embeddings=ABSENT), name)
    assert args.tie_word_embeddings is True


def test_a_gemma_3_that_does_not_say_so_takes_as_long_texts_as_in_transformers() -> None:
    """The config.json of those that also see leaves out what is so by default."""
    lengths = dict.fromkeys(_CONTEXT_FIELDS, ABSENT)
    seeing = described("gemma3", **lengths)
    inner = {name: value for name, value in seeing["text_config"].items() if name not in lengths}
    for stated in ({**seeing, "text_config": inner}, described("gemma3_text", **lengths)):
        made, args = weights.network_of(stated, stated["model_type"])
        assert BridgedDecoder(stated["model_type"], made, args, stated).args.context == 131_072


def test_numbers_that_json_has_not_are_read_as_transformers_5_spells_them(tmp_path: Path) -> None:
    own = write_folder(tmp_path / "model", "mamba2", time_step_limit=[0.0, {"__float__": "Infinity"}])
    decoder = load("model", [str(tmp_path / "model")], dtype="float32").decoder
    assert_close(np.array(decoder.logits(decoder(ROW)))[0], logits(own)[0])


def test_an_object_that_only_looks_like_a_number_stays_one(tmp_path: Path) -> None:
    others = [{"__float__": "1.5"}, {"__float__": "NaN", "more": 1}, {"__float__": None}, {"__float__": ["NaN"]}]
    (tmp_path / "config.json").write_text(json.dumps({"others": others, "least": {"__float__": "-Infinity"}}))
    assert read_config(tmp_path) == {"others": others, "least": -math.inf}


@pytest.mark.parametrize(("by_layer", "by_size"), [(True, True), (True, False), (False, False), (None, None)])
def test_a_gpt_2_divides_its_scores_as_its_config_says(by_layer: bool | None, by_size: bool | None) -> None:
    """CodeParrot's and Stanford's do so by the number of the layer; mlx-lm passes over it. Its file is the oracle with
    queries that are divided instead."""
    filled, _ = network("gpt2")
    fields = {"scale_attn_by_inverse_layer_idx": by_layer, "scale_attn_weights": by_size}
    made = made_of("gpt2", filled, **fields)
    for number, layer in enumerate(filled.layers, 1):
        width, c_attn = layer.attn.n_embd, layer.attn.c_attn
        by = (number if by_layer else 1) * (1 if by_size in (True, None) else layer.attn.head_dim**-0.5)
        rows = mx.where(mx.arange(3 * width) < width, 1 / by, 1.0)
        c_attn.weight, c_attn.bias = c_attn.weight * rows[:, None], c_attn.bias * rows
    assert_close(logits(made)[0], logits(filled)[0])


def test_a_llama_4_norms_queries_and_keys_only_where_it_turns_them() -> None:
    """As in transformers. mlx-lm's file is the oracle with a layer without its switch."""
    stated = described("llama4_text", use_qk_norm=True, no_rope_layers=[1, 0, 1, 0])
    made, args = weights.network_of(stated, "llama4_text")
    own = package.load("llama4_text").Model(args)
    own.load_weights(tree_flatten(made.parameters()))
    assert np.abs(logits(own) - logits(made)).max() > 1e-4
    for layer in (own.layers[1], own.layers[3]):
        layer.self_attn.use_qk_norm = False
    np.testing.assert_array_equal(logits(own), logits(made))


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        ({}, 63),
        ({"attn_temperature_tuning": False}, 256),
        ({"attn_temperature_tuning": 4, "floor_scale": 32}, 31),
        ({"attn_temperature_tuning": False, "no_rope_layers": [1] * 4, "layer_types": ["chunked_attention"] * 4}, 100),
        ({"no_rope_layers": [1] * 4}, 256),
        ({"attn_temperature_tuning": False, "layer_types": ABSENT}, 100),
        ({"attn_temperature_tuning": False, "layer_types": ABSENT, "attention_chunk_size": None}, 256),
    ],
    ids=["sharpened", "plain", "4", "chunks", "all turn", "chunks by default", "no chunks"],
)
def test_a_llama_4_takes_no_texts_in_which_its_scores_would_be_others(fields: dict[str, Any], longest: int) -> None:
    """mlx-lm's file passes over chunks, and over what sharpens the scores of layers that turn nothing."""
    usual = {"max_position_embeddings": 256, "floor_scale": 64, "attention_chunk_size": 100, "layer_types": [FULL] * 4}
    stated = described("llama4_text", **{**usual, **fields})
    made, args = weights.network_of(stated, "llama4_text")
    assert BridgedDecoder("llama4_text", made, args, stated).args.context == longest


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("deepseek", {"norm_topk_prob": True}),
        ("deepseek", {"scoring_func": "sigmoid"}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("falcon_h1", {"attention_in_multiplier": 2.0}),
        ("glm4_moe_lite", {"scoring_func": "softmax"}),
        ("glm4_moe_lite", {"rope_interleave": False}),
        ("youtu_llm", {"rope_interleave": False}),
        ("longcat_flash", {"zero_expert_type": "null"}),
        ("gemma3_text", {"final_logit_softcapping": 30.0}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("olmoe", {"clip_qkv": 8.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_model_file_passes_over_is_refused_by_name(name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=rf"{next(iter(fields))} = .* is not supported: mlx-lm computes"):
        weights.network_of(described(name, **fields), name)
    weights.network_of(described(name, **dict.fromkeys(fields)), name)


@pytest.mark.parametrize(
    "name", ["deepseek_v3", "exaone_moe", "glm4_moe", "glm4_moe_lite", "mimo_v2_flash", "solar_open"]
)
def test_another_way_to_choose_experts_than_that_of_the_file_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match='topk_method = "greedy" is not supported: mlx-lm computes "noaux_tc"'):
        weights.network_of(described(name, topk_method="greedy"), name)


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_a_gemma_2_without_a_soft_cap_is_refused_by_its_name(name: str) -> None:
    """transformers takes null for none; mlx-lm's file divides by it."""
    with pytest.raises(ModelError, match=f"{name} = null is not supported"):
        weights.network_of(described("gemma2", **{name: None}), "gemma2")


@pytest.mark.parametrize("name", ["mistral3", "pixtral"])
@pytest.mark.parametrize(
    ("kind", "window", "longest"),
    [("mistral", 40, 40), ("mistral", ABSENT, 4096), ("mistral", None, 8192), ("llama", 40, 8192)],
    ids=["stated", "absent", "null", "of another kind"],
)
def test_a_mistral_that_sees_takes_no_texts_longer_than_the_window_of_all_its_layers(
    name: str, kind: str, window: object, longest: int
) -> None:
    """mlx-lm's file has the window only in layers of a list, which config.json does not have."""
    changed = {"model_type": kind, "sliding_window": window, "layer_types": ABSENT, "max_position_embeddings": 8192}
    text = {field: value for field, value in {**config(name)["text_config"], **changed}.items() if value is not ABSENT}
    stated = described(name, text_config=text)
    made, args = weights.network_of(stated, name)
    assert BridgedDecoder(name, made, args, stated).args.context == longest


def test_layers_of_a_granite_4_may_have_the_names_that_newer_releases_of_transformers_write() -> None:
    filled, args = network("granitemoehybrid")
    assert args.layer_types == ["mamba", "attention"] * 2
    newer = made_of("granitemoehybrid", filled, layer_types=["linear_attention", FULL] * 2)
    np.testing.assert_array_equal(logits(newer), logits(filled))
    with pytest.raises(ModelError, match=r"layer_types = .*: a list of texts is needed"):
        made_of("granitemoehybrid", filled, layer_types=["linear_attention", [FULL], 1, None])


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["olmo2", "qwen3_moe", "pixtral"])
@pytest.mark.parametrize(("original", "first"), [(ABSENT, 256), (None, 256), (32, 32)], ids=["absent", "null", "apart"])
def test_yarn_that_does_not_say_how_long_texts_were_at_first_takes_the_context(
    name: str, where: str, original: object, first: int
) -> None:
    """As in transformers; mlx-lm takes 4096. The oracle is YaRN of Stoker's own layers."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0}
    fields = {"max_position_embeddings": 256, "rope_scaling": ABSENT, where: scaling}
    fields["original_max_position_embeddings"] = original
    stated = described(name, **fields)
    if "text_config" in stated:
        inner = {**stated["text_config"], **fields}
        stated["text_config"] = {field: value for field, value in inner.items() if value is not ABSENT}
    made, _ = weights.network_of(stated, name)
    turned = [module for module in made.modules() if type(module).__name__ == "YarnRoPE"]
    assert turned
    said = {"rope_scaling": {**scaling, "original_max_position_embeddings": first}}
    for module in turned:
        base, own = rope.from_config(said, 256, module.dims)
        np.testing.assert_allclose(np.array(module["_freqs"]), rope.periods(module.dims, base, own), rtol=1e-5)


def exact_gelu(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.erf(x / math.sqrt(2.0)))


def gelu_by_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "linears", "field", "usual"),
    [
        ("gemma", ("gate_proj", "up_proj", "down_proj"), "hidden_activation", gelu_by_tanh),
        ("gpt2", ("c_fc", "c_proj"), "activation_function", gelu_by_tanh),
        ("gpt_neox", ("dense_h_to_4h", "dense_4h_to_h"), "hidden_act", exact_gelu),
        ("phi", ("fc1", "fc2"), "hidden_act", gelu_by_tanh),
        ("starcoder2", ("c_fc", "c_proj"), "hidden_act", gelu_by_tanh),
    ],
)
def test_gelu_has_the_form_that_config_json_names_and_else_transformers_own(
    name: str, linears: tuple[str, ...], field: str, usual: Callable[[mx.array], mx.array]
) -> None:
    """mlx-lm's files compute one of them each. As for Gemma and Pythia, which name the other."""
    forms = {None: usual, "gelu": exact_gelu, "gelu_pytorch_tanh": gelu_by_tanh, "gelu_new": gelu_by_tanh}
    x = 4.0 * mx.random.normal((3, 32), key=mx.random.key(1))
    for named, activation in forms.items():
        made, _ = weights.network_of(described(name, **{field: named}), name)
        mlp = made.layers[1].mlp
        first, *gated, last = (mlp[part] for part in linears)
        inner = activation(first(x))
        for linear in gated:
            inner = inner * linear(x)
        np.testing.assert_allclose(np.array(mlp(x)), np.array(last(inner)), rtol=1e-4, atol=2e-6)


def heads(stated: dict[str, Any], ties: object, inner: object = ABSENT) -> bool:
    """Whether the network has a head of its own."""
    text = {**stated["text_config"], "tie_word_embeddings": inner}
    text = {field: value for field, value in text.items() if value is not ABSENT}
    whole = {**stated, "tie_word_embeddings": ties, "text_config": text}
    made, _ = weights.network_of(
        {field: each for field, each in whole.items() if each is not ABSENT}, stated["model_type"]
    )
    return any("lm_head" in name for name, _ in tree_flatten(made.parameters()))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"])
def test_a_model_that_sees_may_say_outside_of_its_language_model_whether_that_ties_its_head(name: str) -> None:
    """As Qwen3-VL's own folders do, which were refused. What the language model says goes before it."""
    stated = config(name)
    assert [heads(stated, ties) for ties in (True, False)] == [False, True]
    assert [heads(stated, not inner, inner) for inner in (True, False)] == [False, True]
    assert heads(stated, ABSENT) == (name != "qwen2_vl")


def test_keys_of_a_falcon_h1_have_their_multiplier() -> None:
    """As in transformers; mlx-lm's file passes over it. The oracle is that file with keys that are multiplied."""
    filled, _ = network("falcon_h1")
    made = made_of("falcon_h1", filled, key_multiplier=3.0)
    assert np.abs(logits(made) - logits(filled)).max() > 1e-4
    for layer in filled.layers:
        layer.self_attn.k_proj.weight = layer.self_attn.k_proj.weight * 3.0
    assert_close(logits(made)[0], logits(filled)[0])


@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
def test_what_a_falcon_h1_does_not_multiply_is_multiplied_by_1(value: object) -> None:
    """As in transformers; mlx-lm's defaults are the numbers of the smallest model."""
    ones: dict[str, Any] = {
        "attention_out_multiplier": 1.0, "embedding_multiplier": 1.0, "key_multiplier": 1.0, "lm_head_multiplier": 1.0,
        "mlp_multipliers": [1.0] * 2, "ssm_in_multiplier": 1.0, "ssm_multipliers": [1.0] * 5, "ssm_out_multiplier": 1.0,
    }  # fmt: skip
    _, args = weights.network_of(described("falcon_h1", **dict.fromkeys(ones, value)), "falcon_h1")
    assert {name: getattr(args, name) for name in ones} == ones


@pytest.mark.parametrize("gate_last", [False, True])
def test_a_norm_of_a_falcon_h1_is_one_of_each_group(gate_last: bool) -> None:
    fields = {"mamba_rms_norm": True, "mamba_n_groups": 2, "mamba_norm_before_gate": gate_last}
    made, args = weights.network_of(described("falcon_h1", **fields), "falcon_h1")
    norm, (x, gate) = made.layers[0].mamba.norm, mx.random.normal((2, 3, args.mamba_d_ssm), key=mx.random.key(1))
    norm.weight = mx.random.normal((args.mamba_d_ssm,), key=mx.random.key(2))
    opened = np.array(gate) / (1 + np.exp(-np.array(gate)))
    inner = np.array(x) if gate_last else np.array(x) * opened
    halves = [half / np.sqrt((half**2).mean(-1, keepdims=True) + args.rms_norm_eps) for half in np.split(inner, 2, -1)]
    wanted = np.concatenate(halves, -1) * np.array(norm.weight) * (opened if gate_last else 1)
    np.testing.assert_allclose(np.array(norm(x, gate)), wanted, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in tree_flatten(norm.parameters())} == {"weight"}
    whole, _ = weights.network_of(described("falcon_h1", **{**fields, "mamba_n_groups": 1}), "falcon_h1")
    assert type(whole.layers[0].mamba.norm) is not type(norm)


def test_experts_of_a_jamba_count_by_their_share_of_all_experts() -> None:
    """As in transformers; mlx-lm's file takes their share of the chosen ones, whose sum is 1."""
    filled, _ = network("jamba")
    mixtures = [layer.feed_forward for layer in filled.layers if hasattr(layer.feed_forward, "router")]
    assert mixtures
    plain = package.load("jamba").JambaSparseMoeBlock
    x = mx.random.normal((2, 5, 32), key=mx.random.key(3))
    for mixture in mixtures:
        gates = np.exp(np.array(mixture.router(x)))
        shares = np.sort(gates / gates.sum(-1, keepdims=True), axis=-1)[..., -mixture.num_experts_per_tok :].sum(-1)
        assert shares.max() < 0.99
        wanted = np.array(plain.__call__(mixture, x)) * shares[..., None]
        np.testing.assert_allclose(np.array(mixture(x)), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("bailing_hybrid", {"group_norm_size": 0}, "group_norm_size = 0: a whole number from 1"),
        ("bailing_moe_linear", {"group_norm_size": -1}, "group_norm_size = -1"),
        ("dots1", {"n_group": 0}, "n_group = 0"),
        ("longcat_flash", {"n_routed_experts": 0}, "n_routed_experts = 0"),
        ("bailing_moe", {"num_experts_per_tok": True}, "num_experts_per_tok = true: an integer from 0 on is needed"),
        ("llama", {"num_hidden_layers": 1 << 40}, "num_hidden_layers = 1099511627776"),
        ("nanbeige", {"num_loops": 10**9}, "num_loops = 1000000000"),
    ],
)  # fmt: skip
def test_a_number_that_mlx_would_divide_by_or_count_to_for_ever_is_refused(
    name: str, fields: dict[str, Any], said: str
) -> None:
    """MLX raises nothing there: the worker's process ended, or never did."""
    with pytest.raises(ModelError, match=said):
        weights.network_of(described(name, **fields), name)


@pytest.mark.parametrize("size", [True, "32", 1.5, [32], math.nan])
def test_a_size_of_the_part_that_writes_is_refused_by_its_name(size: object) -> None:
    text = {**config("gemma3")["text_config"], "hidden_size": size}
    with pytest.raises(
        ModelError, match=rf"config\.json: hidden_size = {re.escape(json.dumps(size))}: a positive integer is needed$"
    ):
        weights.network_of(described("gemma3", text_config=text), "gemma3")


POSITIVE, INTEGER = "a positive number is needed", "a positive integer is needed"


@pytest.mark.parametrize(
    ("name", "fields", "needed"),
    [
        ("gemma2", {"query_pre_attn_scalar": -1}, POSITIVE),
        ("gemma2", {"query_pre_attn_scalar": math.inf}, POSITIVE),
        ("gemma2", {"final_logit_softcapping": 0}, POSITIVE),
        ("gemma", {"rms_norm_eps": -1e-6}, POSITIVE),
        ("granite", {"logits_scaling": 0}, POSITIVE),
        ("granite", {"embedding_multiplier": math.inf}, "a number is needed"),
        ("granite", {"embedding_multiplier": math.nan}, "a number is needed"),
        ("granite", {"embedding_multiplier": True}, "a number is needed"),
        ("phi3", {"num_key_value_heads": 0}, INTEGER),
        ("phi3", {"rope_theta": 0}, POSITIVE),
        ("gpt2", {"n_layer": 0}, INTEGER),
        ("gpt2", {"n_embd": -1}, INTEGER),
        ("deepseek_v3", {"q_lora_rank": 1.5}, INTEGER),
        ("gemma3_text", {"max_position_embeddings": 0}, INTEGER),
        ("qwen3_moe", {"num_experts_per_tok": 0}, INTEGER),
        ("jamba", {"attn_layer_offset": -1}, "an integer from 0 on is needed"),
        ("jamba", {"attn_layer_offset": 0.5}, "an integer from 0 on is needed"),
        ("gpt_neox", {"rotary_pct": 0}, "a number above 0 and up to 1 is needed"),
        ("qwen3_moe", {"mlp_only_layers": [True]}, "a list of whole numbers is needed"),
        ("lfm2", {"layer_types": [1]}, "a list of texts is needed"),
        ("llama4_text", {"no_rope_layers": {}}, "a list is needed"),
        ("mamba2", {"time_step_limit": [-1, -1]}, "a list of two numbers from 0 on, the smaller one first, is needed"),
        ("mamba2", {"time_step_limit": [1.0]}, "a list of two numbers from 0 on, the smaller one first, is needed"),
        ("deepseek_v3", {"scoring_func": 1}, "a text is needed"),
        ("deepseek_v3", {"norm_topk_prob": "no"}, "true or false is needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_value_that_no_field_of_its_name_has_is_refused_with_what_it_has(
    name: str, fields: dict[str, Any], needed: str
) -> None:
    (field, value), *_ = fields.items()
    with pytest.raises(ModelError, match=rf"^config\.json: {field} = {re.escape(json.dumps(value))}: {needed}$"):
        weights.network_of(described(name, **fields), name)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("gemma3n", {"num_key_value_heads": 0}, f"num_key_value_heads = 0: {INTEGER}"),
        ("gemma3n", {"laurel_rank": 0}, f"laurel_rank = 0: {INTEGER}"),
        ("gemma3n", {"altup_active_idx": 0.5}, "altup_active_idx = 0.5: an integer from 0 on is needed"),
        ("gemma3n", {"intermediate_size": 0}, f"intermediate_size = 0: {INTEGER}"),
        ("qwen3_vl", {"rms_norm_eps": -1}, f"rms_norm_eps = -1: {POSITIVE}"),
        ("gemma4", {"tie_word_embeddings": "no"}, 'tie_word_embeddings = "no": true or false is needed'),
    ],
)
def test_a_value_of_the_part_that_writes_is_held_against_what_its_own_class_takes(
    name: str, fields: dict[str, Any], said: str
) -> None:
    text = {**config(name)["text_config"], **fields}
    with pytest.raises(ModelError, match=rf"^config\.json: {said}$"):
        weights.network_of(described(name, text_config=text), name)


def test_a_size_that_stands_outside_of_the_part_that_writes_is_looked_at_too() -> None:
    with pytest.raises(ModelError, match=f"vocab_size = -1: {INTEGER}"):
        weights.network_of(described("gemma4", vocab_size=-1), "gemma4")


PART = "not a number above 0 and up to 1"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"partial_rotary_factor": -0.5}, f"partial_rotary_factor is -0.5, {PART}"),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, f"rope_parameters: partial_rotary_factor is 2.0, {PART}"),
        (
            {"rope_parameters": {FULL: {"partial_rotary_factor": 0}}},
            f"rope_parameters: partial_rotary_factor is 0, {PART}",
        ),
        ({"rope_parameters": {"rope_theta": {}}}, "rope_parameters: rope_theta is {}, not a positive number"),
        ({"rope_parameters": {"rope_type": {}}}, "rope_parameters: rope_type is {}, not a text"),
        ({"rope_parameters": {"rope_type": "spiral"}}, 'rope_parameters: rope_type = "spiral" is not supported'),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not an object"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear", not an object'),
        ({"rope_scaling": {"type": 1, "factor": 2.0}}, "rope_scaling: type is 1, not a text"),
        ({"rope_scaling": {"type": "linear", "factor": {}}}, "rope_scaling: factor is {}, not a positive number"),
        ({"text_config": "gemma3"}, 'text_config is "gemma3", not an object'),
    ],
    ids=str,
)
def test_a_value_within_an_object_is_refused_with_the_object_that_the_file_has(
    fields: dict[str, Any], said: str
) -> None:
    """What `rope_parameters` said was shown as of `rope_scaling`, or changed the numbers in silence."""
    with pytest.raises(ModelError, match=rf"^config\.json: {said}"):
        weights.network_of(described("glm4_moe", **{"rope_scaling": ABSENT, **fields}), "glm4_moe")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "".join(config("nemotron_h")["hybrid_override_pattern"])}),
        ("laguna", {"moe_router_logit_softcapping": 0.0}),
        ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
        ("llama4_text", {"use_qk_norm": 1}),
        ("mamba2", {"time_step_limit": [0.0, math.inf]}),
    ],
)
def test_a_value_that_real_folders_have_is_taken(name: str, fields: dict[str, Any]) -> None:
    weights.network_of(described(name, **fields), name)


def test_what_a_file_has_by_default_is_of_the_kind_that_is_asked_of_its_field() -> None:
    for name in sorted(package.files() - package.REFUSED.keys()):
        arguments = package.load(name).ModelArgs
        types = types_of(name, arguments)
        for each in fields_of(arguments):
            kind, usual = kind_of(each.name, types), each.default
            if kind is not None and isinstance(usual, int | float | str | list):
                assert kind.holds(usual), f"{name}: {each.name}"


def test_how_much_of_a_head_is_turned_is_taken_by_the_names_that_the_file_has_for_its_sizes() -> None:
    stated = described("phixtral", rotary_dim=ABSENT, partial_rotary_factor=0.5)
    assert weights.network_of(stated, "phixtral")[1].rotary_dim == 4


@pytest.mark.parametrize("place", [-1, 3])
def test_a_place_beyond_its_list_is_refused(place: int) -> None:
    text = {**config("gemma3n")["text_config"], "altup_active_idx": place}
    with pytest.raises(ModelError, match=f"altup_active_idx = {place}: a whole number from 0 to 2 is needed"):
        weights.network_of(described("gemma3n", text_config=text), "gemma3n")


def test_a_text_model_of_no_type_is_refused() -> None:
    with pytest.raises(ModelError, match="text_config: model_type = "):
        weights.network_of(described("gemma3n", text_config={"model_type": ["gemma3n"]}), "gemma3n")


@pytest.mark.parametrize("size", [0, -32, 1.5, math.inf])
def test_a_layer_whose_codes_are_in_groups_of_none_is_refused(tmp_path: Path, size: float) -> None:
    folder = tmp_path / "phi3"
    write_folder(folder, "phi3", bits=4)
    said = read_config(folder)
    path = next(name for name, _ in package_layers(folder))
    said["quantization"] = {**said["quantization"], path: {"group_size": size, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="group_size"):
        load("m", [str(folder)])


def package_layers(folder: Path) -> list[tuple[str, Any]]:
    """Layers of a folder that have codes, by their paths."""
    arrays = mx.load(str(next(folder.glob("*.safetensors"))))
    assert isinstance(arrays, dict)
    return [(name.removesuffix(".scales"), array) for name, array in arrays.items() if name.endswith(".scales")]


def test_caches_that_a_file_cannot_make_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_folder(tmp_path / "phi3", "phi3")

    def none(self: object) -> list[Any]:
        raise IndexError("list index out of range")

    monkeypatch.setattr(package.load("phi3").Model, "make_cache", none, raising=False)
    with pytest.raises(ModelError, match="cannot make its caches of it"):
        load("m", [str(tmp_path / "phi3")])

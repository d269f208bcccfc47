"""Decoders through mlx-lm's model files: a few of each kind; `make test-models` holds all of them to the same."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.adapters.pool import AdapterPool
from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.verifying import verify
from engine.models import rope
from engine.models.bridge import blocks, linears, package, slots, weights
from engine.models.bridge.attention import scaled_dot_product_attention
from engine.models.bridge.decoder import BridgedDecoder
from engine.models.decoder import DecoderBlock
from engine.models.key_values import KeyValues
from engine.models.layers import LayerAdapters
from engine.weights import safetensors
from engine.weights.precision import Precision
from stoker.errors import InvalidRequest, ModelError
from tests.engine import bridged, cached, test_generate_lane
from tests.engine.architectures import config
from tests.engine.test_generate_lane import Driver
from tests.models import table
from tests.thorough import in_turn, quick

#: Plain, with windows and soft caps, a mixture with sinks, latent keys, and a recurrent one.
QUICK = ("phi3", "gemma2", "gpt_oss", "deepseek_v3", "lfm2")


@pytest.fixture(scope="module", params=QUICK)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return bridged.bridged(request.param)


@pytest.mark.parametrize(
    "name",
    quick(
        *QUICK,
        "gemma3",
        "qwen3_moe",
        "olmo_hybrid",
        of=[*QUICK, "gemma3", "gemma3n", "qwen3_moe", "mamba2", "olmo_hybrid"],
    ),
)
def test_logits_are_mlx_lms_at_every_position(name: str) -> None:
    bridged.check_logits(name)


@pytest.mark.parametrize(
    "how", quick({"kv_bytes": 700_000}, of=[{}, {"kv_bytes": 700_000}]), ids=["room", "little room"]
)
def test_a_request_gets_the_same_tokens_alone_and_in_any_traffic(
    model: LoadedModel, tmp_path: Path, how: dict[str, Any]
) -> None:
    bridged.check_traffic(model, tmp_path, 1, **how)


def test_a_kept_prefix_serves_a_recurrent_model_whole_or_not_at_all(tmp_path: Path) -> None:
    model = bridged.bridged("lfm2")
    shared, other = [5] * 40, list(range(10, 30))
    asked = [test_generate_lane.request([*shared, *rest]) for rest in (other, other[::-1], [*other, 31, 32])]
    driver = Driver(model, AdapterPool(model, AdapterStore(tmp_path)), slots=1)
    found = []
    for one in asked:
        alone = Driver(model, AdapterPool(model, AdapterStore(tmp_path)), slots=1)
        wanted, sent = alone.send(one), driver.send(one)
        alone.run()
        driver.run()
        assert sent.ids == wanted.ids
        found.append(sent.result.usage.cached_tokens)
    assert found == [0, 0, 60], "the second begins as the first and goes on otherwise; the third begins with all of it"


@pytest.mark.parametrize("name", ["phi3", "gpt_oss", "lfm2"])
def test_rows_of_one_pass_have_adapters_of_their_own(name: str, tmp_path: Path) -> None:
    bridged.check_adapters(name, tmp_path)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "lfm2"])
def test_a_run_learns_by_true_gradients_and_goes_on_where_it_was_killed(name: str) -> None:
    bridged.check_training(name)


@pytest.mark.parametrize("name", quick("phi3", "gemma3", "lfm2", of=[*QUICK, "gemma3", "qwen3_moe"]))
def test_a_folder_is_read_by_its_model_type(name: str, tmp_path: Path) -> None:
    network = bridged.write_folder(tmp_path / "model", name)
    model = load("model", [str(tmp_path / "model")])
    assert model.architecture == name
    assert model.kind == "generate"
    row = bridged.prompts()[0]
    bridged.assert_close(
        np.array(model.decoder.logits(model.decoder(mx.array([row])))[0]), bridged.reference(network, row)
    )


@pytest.mark.parametrize(("name", "quantize"), in_turn(["gemma3", "phi3", "qwen3_moe", "gpt_oss"], ["keep", "none"]))
def test_a_folder_in_the_hubs_layout_is_read_with_no_further_word(name: str, quantize: str, tmp_path: Path) -> None:
    network = bridged.write_hub_folder(tmp_path / "model", name)
    model = load("model", [str(tmp_path / "model")], quantize=quantize)
    row = bridged.prompts()[0]
    bridged.assert_close(
        np.array(model.decoder.logits(model.decoder(mx.array([row])))[0]), bridged.reference(network, row)
    )


@pytest.mark.parametrize(("name", "quantize"), in_turn(["phi3", "gpt_oss", "deepseek_v3"], ["keep", "none"]))
def test_a_quantized_folder_of_mlx_lm_is_held_as_it_is_or_dense(name: str, quantize: str, tmp_path: Path) -> None:
    network = bridged.write_folder(tmp_path / "model", name, bits=4)
    model = load("model", [str(tmp_path / "model")], quantize=quantize)
    row = bridged.prompts()[0]
    found = np.array(model.decoder.logits(model.decoder(mx.array([row])))[0])
    assert np.abs(found - bridged.reference(network, row)).max() < 1e-2
    dense, _ = bridged.network(name)
    assert np.abs(found - bridged.reference(dense, row)).max() > 1e-2, "its numbers are those of few bits"
    assert (model.bytes < 4 * model.parameters / 2) == (quantize == "keep")


@pytest.mark.parametrize(
    ("group_size", "bits", "mode"),
    [*((32, bits, "affine") for bits in (2, 3, 6)), (32, 4, "mxfp4"), (32, 8, "mxfp8"), (16, 4, "nvfp4")],
)
def test_each_form_of_mlx_is_read_and_layers_may_differ(group_size: int, bits: int, mode: str, tmp_path: Path) -> None:
    network = bridged.write_folder(tmp_path / "model", "phi3")
    usual, other = {"group_size": group_size, "bits": bits, "mode": mode}, {"group_size": 32, "bits": 4}
    forms: dict[str, bool | dict[str, Any]] = {
        "lm_head": {**other, "mode": "affine"},
        "model.layers.1.self_attn.o_proj": False,
    }

    def form(path: str, module: nn.Module) -> bool | dict[str, Any]:
        fits = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return forms.get(path, usual) if fits else False

    nn.quantize(network, class_predicate=form)
    safetensors.write(tmp_path / "model" / "model.safetensors", dict(tree_flatten(network.parameters())))
    described = {**config("phi3"), "quantization": {**usual, **forms, "lm_head": other}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(described))
    row, found = bridged.prompts()[0], {}
    for how in ("keep", "none"):
        model = load("model", [str(tmp_path / "model")], quantize=how)
        found[how] = model.bytes
        logits = np.array(model.decoder.logits(model.decoder(mx.array([row])))[0])
        assert np.abs(logits - bridged.reference(network, row)).max() < 1e-2
    assert found["keep"] < 0.7 * found["none"]


def test_a_cache_that_keeps_a_texts_beginning_is_refused_by_its_name() -> None:
    kept = package.load("cache").RotatingKVCache(max_size=8, keep=4)
    with pytest.raises(ModelError, match="layers that keep a RotatingKVCache are not supported"):
        slots.shapes_of([kept])


def masks() -> dict[str, Any]:
    """Three new tokens behind four: what each form of mask lets the rows see."""
    causal = mx.arange(3)[:, None] + 4 >= mx.arange(7)
    window = causal & (mx.arange(3)[:, None] + 4 < mx.arange(7) + 3)
    beginnings = mx.arange(7) >= mx.array([0, 2])[:, None, None, None]
    return {
        "none": (None, mx.ones((3, 7), mx.bool_)),
        "causal": ("causal", causal),
        "a window": (window, window),
        "a row's own": (window & beginnings, window & beginnings),
        "added": (mx.where(window, 0.0, -mx.inf), window),
    }


@pytest.mark.parametrize("sunk", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize("form", masks())
def test_what_model_files_attend_by_is_softmax_over_what_the_mask_lets_them_see_and_the_sinks(
    form: str, sunk: bool
) -> None:
    """Against 64 bits: mlx-lm's own logits come through the same function."""
    made = np.random.default_rng(3)
    queries, keys, values = (made.normal(size=(2, heads, length, 8)) for heads, length in ((4, 3), (2, 7), (2, 7)))
    sinks, (mask, seen) = made.normal(size=4), masks()[form]
    scores = queries @ np.repeat(keys, 2, axis=1).swapaxes(-1, -2) * 0.3
    powers = np.exp(scores) * np.array(seen)
    whole = powers.sum(-1, keepdims=True) + (np.exp(sinks)[:, None, None] if sunk else 0.0)
    wanted = powers / whole @ np.repeat(values, 2, axis=1)
    q, k, v, s = (mx.array(each, dtype=mx.float32) for each in (queries, keys, values, sinks))
    found = scaled_dot_product_attention(q, k, v, None, 0.3, mask, s if sunk else None)
    assert np.abs(np.array(found) - wanted).max() < 1e-5


def test_a_pass_within_another_ends_with_what_the_other_had() -> None:
    outer, inner = (cast(LayerAdapters, object()) for _ in range(2))
    under_way = linears.Pass()
    with under_way.begun(outer, 2, 3):
        with under_way.begun(inner, 1, 5):
            assert (under_way.adapters, under_way.rows, under_way.tokens) == (inner, 1, 5)
        assert (under_way.adapters, under_way.rows, under_way.tokens) == (outer, 2, 3)
    assert (under_way.adapters, under_way.rows, under_way.tokens) == (None, 0, 0)


class Passing(nn.Module):
    """A layer that takes anything."""

    def __call__(self, x: mx.array, *_: Any, **__: Any) -> mx.array:
        return x


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (None, True),
        ("causal", True),
        (mx.array([[True]]), True),
        (slots.KvSlot(slots.Whole(), 0, None), True),
        (mx.ones((2, 2)), False),
        ([mx.ones((2, 2))], False),
        (object(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_layer_is_run_again_for_its_gradient_if_nothing_else_that_it_is_given_may_need_one(
    given: object, again: bool
) -> None:
    """Kimi K3's layers hand an object of their own on, which keeps what each of them made."""
    under_way, ran = linears.Pass(), list[object]()

    def run_block(block: DecoderBlock, x: mx.array) -> mx.array:
        ran.append(block)
        return block(x, None, None)

    under_way.run_block = run_block
    blocks.Stage(Passing(), under_way)(mx.ones((1, 2, 3)), mask=given)
    assert bool(ran) == again


@pytest.mark.parametrize("name", ["gemma3_text", "cohere2"])
def test_a_model_may_have_fewer_layers_than_its_pattern_of_windows(name: str, tmp_path: Path) -> None:
    """All of them have a window, then; mlx-lm's file looks for the first that has none. One more layer behind, which
    passes on what it gets, is the oracle."""
    described = {**config(name), "sliding_window_pattern": 3}
    network, args = weights.network_of({**described, "num_hidden_layers": 2}, name)
    longer, _ = weights.network_of({**described, "num_hidden_layers": 3}, name)
    longer.load_weights(list(tree_flatten(network.parameters())), strict=False)
    longer.model.layers[2] = Passing()
    decoder = BridgedDecoder(name, network, args, {**described, "num_hidden_layers": 2})
    row = bridged.prompts()[0]
    wanted = np.array(longer(mx.array([row]))[0])
    bridged.assert_close(np.array(decoder.logits(decoder(mx.array([row])))[0]), wanted)
    kv = KeyValues(decoder, 1, 64)
    bridged.assert_close(cached.through(decoder, kv, [row[:20]], [0])[0], wanted[:20])
    bridged.assert_close(cached.through(decoder, kv, [row[20:21]], [20])[0], wanted[20:21])


def test_matrices_whose_rows_fall_into_no_groups_stay_dense(tmp_path: Path) -> None:
    """48 numbers a row are a group of 32 and a half."""
    network = bridged.write_folder(tmp_path / "model", "phi3")
    model = load("model", [str(tmp_path / "model")], quantize="8bit", group_size=32)
    row = bridged.prompts()[0]
    found = np.array(model.decoder.logits(model.decoder(mx.array([row])))[0])
    assert np.abs(found - bridged.reference(network, row)).max() < 5e-2
    assert model.bytes < 4 * model.parameters


def test_ernies_experts_are_chosen_by_corrected_gates_and_weighted_by_plain_ones(tmp_path: Path) -> None:
    """As in transformers; mlx-lm drops the corrections. Here they overrule every gate: its file is the oracle with a
    router that has those two experts alone."""
    network = bridged.write_folder(tmp_path / "model", "ernie4_5_moe")
    stored, correction = tmp_path / "model" / "model.safetensors", mx.array([[9.0, 0.0, 0.0, 9.0]])
    arrays = dict(safetensors.read(stored))
    mx.eval(arrays)
    mixtures = {path: module for path, module in network.named_modules() if hasattr(module, "switch_mlp")}
    assert mixtures
    named = {f"{path}.moe_statics.e_score_correction_bias": correction for path in mixtures}
    safetensors.write(stored, {**arrays, **named})
    for mixture in mixtures.values():
        assert mixture.k == 2
        # The weights of two experts, normalized, are those of a softmax over the two alone.
        mixture.gate_act = lambda gates: mx.softmax(mx.where(correction > 0.0, gates, -mx.inf), axis=-1)
    decoder = load("model", [str(tmp_path / "model")], dtype="float32").decoder
    for row in bridged.prompts():
        bridged.assert_close(np.array(decoder.logits(decoder(mx.array([row]))))[0], bridged.reference(network, row))
    halved, _ = weights.network_of(config("ernie4_5_moe"), "ernie4_5_moe")
    weights.read(tmp_path / "model", config("ernie4_5_moe"), halved, Precision(mx.float16, None))
    assert {path for path, dtype in dtypes(halved) if dtype == mx.float32} == named.keys()


def test_a_copy_of_an_ernie_that_has_lost_its_corrections_is_refused(tmp_path: Path) -> None:
    """As mlx-lm writes it: its experts would be others, in silence."""
    bridged.write_folder(tmp_path / "model", "ernie4_5_moe", moe_use_aux_free=True)
    with pytest.raises(ModelError, match=r"e_score_correction_bias' are missing.*mlx-lm drops them"):
        load("model", [str(tmp_path / "model")])


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4 bits"])
@pytest.mark.parametrize("name", ["minicpm", "minicpm3"])
def test_a_minicpm_scales_what_goes_into_its_head_whether_or_not_that_is_the_embedding(
    name: str, bits: int | None, tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name, bits=bits)
    stored, described = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    arrays = dict(safetensors.read(stored))
    mx.eval(arrays)
    tied = {path: array for path, array in arrays.items() if not path.startswith("lm_head.")}
    table = {path: array for path, array in tied.items() if path.startswith("model.embed_tokens.")}
    untied = {**tied, **{path.replace("model.embed_tokens", "lm_head"): array for path, array in table.items()}}
    assert untied.keys() == arrays.keys()
    rest, found = json.loads(described.read_text()), []
    for content, ties in ((untied, False), (tied, True)):
        safetensors.write(stored, content)
        described.write_text(json.dumps({**rest, "tie_word_embeddings": ties}))
        decoder = load("model", [str(tmp_path / "model")], dtype="float32").decoder
        found.append(np.array(decoder.logits(decoder(mx.array(bridged.prompts())))))
    bridged.assert_close(found[1], found[0])


@pytest.mark.parametrize("name", ["granite", "qwen3_moe", "spark2_5"])
def test_a_head_that_is_not_the_embedding_is_not_dropped_in_silence(name: str, tmp_path: Path) -> None:
    network = bridged.write_folder(tmp_path / "model", name, tie_word_embeddings=True)
    stored = tmp_path / "model" / "model.safetensors"
    arrays = dict(tree_flatten(network.parameters()))
    with pytest.raises(ModelError, match=r"lm_head\.weight' is not the embedding.*by tie_word_embeddings"):
        load("model", [str(tmp_path / "model")])
    table = next(array for path, array in arrays.items() if "embed" in path)
    safetensors.write(stored, {**arrays, "lm_head.weight": table})
    assert load("model", [str(tmp_path / "model")]).architecture == name


def test_what_a_model_file_keeps_in_32_bits_stays_so_among_16(tmp_path: Path) -> None:
    """As the addend by which DeepSeek's experts are chosen."""
    bridged.write_folder(tmp_path / "model", "deepseek_v3")
    network, _ = weights.network_of(config("deepseek_v3"), "deepseek_v3")
    weights.read(tmp_path / "model", config("deepseek_v3"), network, Precision(mx.float16, None))
    found = {path: array.dtype for path, array in tree_flatten(network.parameters())}
    kept = {path for path in found if not network.cast_predicate(path)}
    assert kept
    assert {path for path, dtype in found.items() if dtype == mx.float32} == kept


def test_logits_have_32_bits_where_a_model_computes_in_16(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3")
    decoder = load("model", [str(tmp_path / "model")], dtype="float16").decoder
    hidden = decoder(mx.array([bridged.prompts()[0]]))
    assert (hidden.dtype, decoder.logits(hidden).dtype) == (mx.float16, mx.float32)


def test_a_pass_leaves_the_weights_that_a_model_file_writes_into_as_they_were(tmp_path: Path) -> None:
    """Gemma 3n's file turns some of them into 32 bits at each pass, and would keep them so."""
    bridged.write_folder(tmp_path / "model", "gemma3n")
    network, args = weights.network_of(config("gemma3n"), "gemma3n")
    weights.read(tmp_path / "model", config("gemma3n"), network, Precision(mx.bfloat16, None))
    before = {path: array.dtype for path, array in tree_flatten(network.parameters())}
    decoder = BridgedDecoder("gemma3n", network, args, config("gemma3n"))
    mx.eval(decoder.logits(decoder(mx.array([bridged.prompts()[0]]))))
    after = {path.replace(".layer.", ".").replace(".inner.", "."): dtype for path, dtype in dtypes(network)}
    assert after == before


def dtypes(network: nn.Module) -> Iterator[tuple[str, mx.Dtype]]:
    for path, array in tree_flatten(network.parameters()):
        yield path, array.dtype


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gemma33"}, '"gemma33" is not supported; the nearest names are gemma3'),
        ({"model_type": ["phi3"]}, r'model_type is \["phi3"\], not a text'),
        ({"model_type": "../phi3"}, "is not supported"),
        ({"model_type": "cache"}, '"cache" is not supported'),
        ({"model_type": "olmo"}, '"olmo" is not supported: its file needs the package of another project'),
        ({"model_file": "evil.py"}, 'model_file = "evil.py" is code of the checkpoint\'s own, which never runs'),
        ({"hidden_act": "relu"}, 'hidden_act = "relu" is not supported: mlx-lm computes silu'),
        ({"rope_scaling": {"type": "spiral"}}, 'rope_scaling: type = "spiral" is not supported; default'),
        ({"num_hidden_layers": 5}, "Missing 6 parameters: model.layers.4"),
        ({"num_hidden_layers": "2"}, 'config.json: num_hidden_layers = "2": a positive integer is needed$'),
        ({"hidden_size": True}, "config.json: hidden_size = true: a positive integer is needed$"),
        ({"vocab_size": 64.5}, "config.json: vocab_size = 64.5: a positive integer is needed$"),
        ({"rms_norm_eps": []}, r"config.json: rms_norm_eps = \[\]: a positive number is needed$"),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps = NaN: a positive number is needed$"),
        ({"tie_word_embeddings": "no"}, 'config.json: tie_word_embeddings = "no": true or false is needed$'),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: a whole number from 1 to"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling: factor is "2", not a positive number$'),
        ({"hidden_size": None}, "phi3 cannot be made of it .* its numbers: hidden_size is null$"),
        ({"intermediate_size": 0}, "config.json: intermediate_size = 0: a positive integer is needed$"),
        ({"intermediate_size": -1}, "config.json: intermediate_size = -1: a positive integer is needed$"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq.* is not supported: MLX's own, mxfp4"),
        ({"quantization_config": "4bit"}, '"4bit" is not supported: MLX\'s own, mxfp4'),
        (
            {
                "original_max_position_embeddings": 256,
                "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 2, "short_factor": [1.0] * 3},
            },
            "short_factor = .*: not as many numbers as long",
        ),
        (
            {
                "original_max_position_embeddings": 256,
                "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 2, "short_factor": ["1"] * 2},
            },
            "short_factor = .*: not as many numbers as long",
        ),
    ],
)
def test_what_mlx_lm_has_not_or_would_compute_otherwise_is_refused_by_name(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", "phi3", **fields)
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match=words):
        load("model", [str(tmp_path / "model")])


@pytest.mark.parametrize("section", [{"bits": 4}, {"group_size": "all", "bits": 4}])
def test_codes_whose_form_is_not_said_are_refused(section: dict[str, Any], tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3", bits=4)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization": section}))
    with pytest.raises(ModelError, match="quantization: "):
        load("model", [str(tmp_path / "model")], quantize="keep")


@pytest.mark.parametrize("pattern", [0, -1, 2.0, True, "2"])
def test_a_pattern_of_windows_that_counts_no_layers_is_refused(pattern: Any, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"]
    bridged.write_folder(tmp_path / "model", "gemma3_text", layer_types=types, sliding_window_pattern=pattern)
    with pytest.raises(
        ModelError, match=f"sliding_window_pattern = {json.dumps(pattern)}: a positive integer is needed"
    ):
        load("model", [str(tmp_path / "model")])


def test_a_window_that_a_model_file_passes_over_bounds_the_context(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3", sliding_window=40)
    assert load("model", [str(tmp_path / "model")]).context == 40


def test_a_window_that_is_switched_off_bounds_nothing(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3", sliding_window=40, use_sliding_window=False)
    assert load("model", [str(tmp_path / "model")]).context == 256


def test_adapters_of_a_quantized_layer_have_the_sizes_of_its_numbers(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3", bits=4)
    kept = load("model", [str(tmp_path / "model")], quantize="keep")
    assert kept.bytes < load("dense", [str(tmp_path / "model")], quantize="none").bytes
    assert kept.linear_shapes == bridged.bridged("phi3").linear_shapes


def test_a_context_that_the_files_leave_out_is_transformers_default(tmp_path: Path) -> None:
    """As Gemma 3's do: what they say of the language model leaves most of it to the defaults."""
    text = {key: value for key, value in config("gemma3")["text_config"].items() if value != 256}
    bridged.write_folder(tmp_path / "model", "gemma3", text_config=text)
    assert load("model", [str(tmp_path / "model")]).context == 131_072


def test_dynamic_ntk_changes_nothing_within_the_context_and_rows_of_any_length_decode(tmp_path: Path) -> None:
    plain = bridged.write_folder(tmp_path / "plain", "olmo2")
    bridged.write_folder(tmp_path / "model", "olmo2", rope_scaling={"type": "dynamic", "factor": 4.0})
    model = load("model", [str(tmp_path / "model")])
    assert model.context == 256
    rows = bridged.prompts()
    kv = KeyValues(model.decoder, 3, 64)
    found = cached.through(model.decoder, kv, [row[:20] for row in rows], [0, 0, 0])
    after = cached.through(model.decoder, kv, [[rows[0][12]], [rows[1][20]], [rows[2][7]]], [12, 20, 7])
    for index, position in enumerate((12, 20, 7)):
        wanted = bridged.reference(plain, rows[index])
        bridged.assert_close(found[index], wanted[:20])
        bridged.assert_close(after[index, 0], wanted[position])


@pytest.mark.parametrize("fields", [{}, {"partial_rotary_factor": 0.25},
                                    {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0,
                                                         "partial_rotary_factor": 0.25}}], ids=str)  # fmt: skip
def test_glm_turns_the_part_of_a_head_that_its_config_says_and_half_where_it_says_nothing(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    network = bridged.write_folder(tmp_path / "model", "glm", **fields)
    for layer in network.layers:
        width = layer.self_attn.head_dim // (4 if fields else 2)
        layer.self_attn.rope = nn.RoPE(width, traditional=True, base=10_000.0)
    decoder = load("model", [str(tmp_path / "model")], dtype="float32").decoder
    for row in bridged.prompts():
        bridged.assert_close(np.array(decoder.logits(decoder(mx.array([row]))))[0], bridged.reference(network, row))


@pytest.mark.parametrize(
    ("name", "factor", "words"),
    [
        ("olmo2", 0.5, "partial_rotary_factor = 0.5 is not supported: mlx-lm rotates all of a head"),
        ("glm", 1.5, "partial_rotary_factor is 1.5, not a number above 0 and up to 1"),
    ],
)
def test_a_part_of_a_head_that_cannot_be_rotated_is_refused(
    name: str, factor: float, words: str, tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name, partial_rotary_factor=factor)
    with pytest.raises(ModelError, match=words):
        load("model", [str(tmp_path / "model")])


_LINEAR = {"rope_type": "linear", "factor": 4.0}
_QUARTER = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.25}
_ROPE_WORDS = ("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "partial_rotary_factor",
               "rotary_pct", "rotary_emb_base", "rotary_dim")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "older", "newer"),
    [
        (
            "granite",
            {"rope_theta": 77.0, "rope_scaling": _LINEAR},
            {"rope_theta": 5.0, "rope_scaling": None, "rope_parameters": {**_LINEAR, "rope_theta": 77.0}},
        ),
        (
            "gemma3_text",
            {"rope_theta": 77.0, "rope_local_base_freq": 55.0, "rope_scaling": _LINEAR},
            {
                "rope_theta": None,
                "rope_scaling": None,
                "rope_parameters": {
                    "full_attention": {**_LINEAR, "rope_theta": 77.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
                },
            },
        ),
        ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 77.0}, {"rope_parameters": _QUARTER}),
        ("minimax", {"rotary_dim": 2, "rope_theta": 77.0}, {"rope_parameters": _QUARTER}),
    ],
)
def test_rope_in_the_words_of_transformers_5_is_that_in_older_ones(
    name: str, older: dict[str, Any], newer: dict[str, Any], tmp_path: Path
) -> None:
    bridged.write_folder(tmp_path / "model", name)
    rest = {field: value for field, value in config(name).items() if field not in _ROPE_WORDS}
    found = []
    for words in (older, newer):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**rest, **words}))
        decoder = load("model", [str(tmp_path / "model")], dtype="float32").decoder
        found.append(np.array(decoder.logits(decoder(mx.array(bridged.prompts())))))
    bridged.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"truncate": False}, {"truncate": False, "attention_factor": 1.5}, {"mscale": 0.5}, {"mscale_all_dim": 0.5},
        {"mscale": 0.5, "mscale_all_dim": 0.8}, {"mscale": 0.5, "mscale_all_dim": 0},
    ],
    ids=str,
)  # fmt: skip
def test_yarn_is_that_of_transformers(fields: dict[str, Any]) -> None:
    """gpt-oss's borders are not rounded; mlx-lm would round them. The oracle is the Llama family's own."""
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, **fields}
    described = {**config("gpt_oss"), "head_dim": 32, "rope_theta": 1000.0, "rope_scaling": scaling}
    network, _ = weights.network_of(described, "gpt_oss")
    found = [module for module in network.modules() if type(module).__name__ == "YarnRoPE"]
    base, wanted = rope.from_config(described, 256, 32)
    turned = rope.Rope(32, base, wanted)
    assert len(found) == 4
    for module in found:
        assert np.allclose(np.array(module["_freqs"]), np.array(turned.periods), rtol=1e-4)
        assert module.mscale == pytest.approx(turned.gain)


def test_targets_that_a_model_has_not_are_refused_with_those_it_has() -> None:
    model = bridged.bridged("gpt_oss")
    with pytest.raises(InvalidRequest, match=r"gate_proj given; the model has no such layer.*k_proj, o_proj"):
        bridged.trainer(model, targets=("q_proj", "gate_proj"))
    assert bridged.trainer(bridged.bridged("phi3")).config.targets == ("o_proj", "qkv_proj")


def test_loading_a_model_file_leaves_the_process_as_it_was() -> None:
    """mlx-lm itself sets the limit of open files, an environment variable, and needs transformers."""
    script = """
import os, resource, sys
before = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ)
from engine.models.bridge import package
assert "mlx.core" not in sys.modules, "the list of files needs no MLX"
assert "phi3" in package.files()
package.load("phi3")
assert (resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ)) == before
print([name for name in sys.modules if name.split(".")[0] in ("mlx_lm", "transformers", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_other_names_of_model_types_are_those_of_mlx_lm() -> None:
    root = package.folder()
    assert root is not None
    tree = ast.parse((root / "utils.py").read_text(encoding="utf-8"))
    found = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and "REMAPPING" in node.targets[0].id
    }
    assert found == {
        "MODEL_REMAPPING": package.REMAPPING,
        "MODEL_ARCHITECTURE_REMAPPING": package.ARCHITECTURE_REMAPPING,
    }
    assert set(package.REFUSED) <= package.files()


@pytest.mark.parametrize("name", ["phi3", "gemma3", "mamba2", "gpt2"])
def test_a_folder_is_inspected_and_verified(name: str, tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", name)
    found = verify(tmp_path / "model").inspection
    assert (found.kind, found.architecture, found.layers, found.dim) == ("generate", name, 4, 32)
    assert found.parameters > 0


def test_a_tensor_of_another_shape_is_found_without_running_the_model(tmp_path: Path) -> None:
    bridged.write_folder(tmp_path / "model", "phi3", intermediate_size=56)
    with pytest.raises(ModelError, match=r"Expected shape \(112, 32\).*mlp\.gate_up_proj\.weight"):
        verify(tmp_path / "model")


def test_the_page_of_models_has_each_model_file_and_says_what_holds() -> None:
    rows = table.read()
    assert rows.keys() == package.files()
    assert all({"generate", "batched", "adapters", "training"} == rows[name].passed for name in QUICK)
    assert all(not rows[name].passed for name in package.REFUSED)
    assert table.totals(rows.values()) in table.PAGE.read_text(encoding="utf-8")

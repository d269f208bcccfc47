"""Encoders of further architectures, against plain numpy in float64; what their configs ask for in vain is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.prospect import prospect
from engine.checkpoints.verifying import verify
from engine.embedding.forward import PackedForward, PaddedForward
from engine.models import fastmath
from engine.models.encoder import RelativeBias
from engine.weights import safetensors
from stoker.errors import ModelError
from tests.engine import encoder_reference as reference
from tests.engine.encoder_reference import Array, Shapes
from tests.engine.test_vectors import embedded

WORDS = json.loads((Path(__file__).parents[1] / "goldens" / "text" / "folders.json").read_text())["bases"]["words"]
OLD = "sentence_transformers.models"
BERT = {
    "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
}  # fmt: skip
V3 = {
    **BERT, "model_type": "deberta-v2", "type_vocab_size": 0, "relative_attention": True, "position_buckets": 8,
    "max_relative_positions": -1, "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
}  # fmt: skip
V2 = {**V3, "share_att_key": False, "position_buckets": -1, "max_relative_positions": 9, "norm_rel_ebd": "none"}
T5 = {
    "model_type": "t5", "vocab_size": 260, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
    "layer_norm_epsilon": 1e-5, "feed_forward_proj": "relu", "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12, "is_encoder_decoder": True, "n_positions": 16,
}  # fmt: skip
DISTILBERT = {
    "model_type": "distilbert", "vocab_size": 260, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 40, "activation": "gelu", "sinusoidal_pos_embds": True, "tie_weights_": True,
}  # fmt: skip
ELECTRA = {**BERT, "model_type": "electra", "embedding_size": 16, "type_vocab_size": 2, "summary_type": "first"}
ALBERT = {
    **BERT, "model_type": "albert", "embedding_size": 16, "type_vocab_size": 2, "num_hidden_layers": 4,
    "num_hidden_groups": 2, "inner_group_num": 2, "hidden_act": "gelu_new", "gap_size": 0, "layers_to_keep": [],
}  # fmt: skip
CAMEMBERT = {**BERT, "model_type": "camembert", "type_vocab_size": 1, "pad_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "distilbert": DISTILBERT,
    "camembert": CAMEMBERT,
    "electra": ELECTRA,
    "electra as wide as BERT": {**ELECTRA, "embedding_size": 32},
    "albert": ALBERT,
    "albert, exact": {**ALBERT, "hidden_act": "gelu", "num_hidden_groups": 1, "inner_group_num": 1},
    "deberta v3": V3,
    "deberta v2": V2,
    "deberta, queries alone": {**V2, "pos_att_type": ["c2p"], "position_biased_input": True},
    "deberta, keys alone": {**V3, "share_att_key": False, "pos_att_type": ["p2c"], "type_vocab_size": 2},
    "t5": T5,
    "t5, gated": {**T5, "feed_forward_proj": "gated-gelu", "num_heads": 2},
}
#: What stands before every tensor in the files.
PREFIXES = {"camembert": "roberta.", "deberta-v2": "deberta.", "t5": ""}
TEXTS = [[2, 9, 30, 7, 200, 3], [2, 3], [2, *range(20, 44), 3], [2, 40, 41, 3]]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def saved(path: Path, weights: Mapping[str, Array]) -> None:
    safetensors.write(path, {name: mx.array(array.astype(np.float32)) for name, array in weights.items()})


def folder(tmp_path: Path, config: Mapping[str, Any], weights: Mapping[str, Array], *, embeds: bool = True) -> Path:
    """The weights with the body's name before them; a `modules.json`, for one that embeds."""
    prefix = PREFIXES.get(config["model_type"], f"{config['model_type']}.")
    write(tmp_path / "config.json", config)
    write(tmp_path / "tokenizer.json", WORDS)
    heads = ("classifier.", "pre_classifier.", "pooler.dense.", "score.")
    saved(
        tmp_path / "model.safetensors",
        {(name if name.startswith(heads) else prefix + name): array for name, array in weights.items()},
    )
    if embeds:
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        write(tmp_path / "modules.json", [{"path": path, "type": f"{OLD}.{kind}"} for path, kind in modules])
        write(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "mean"})
    return tmp_path


def hidden_of(config: Mapping[str, Any], weights: Mapping[str, Array], text: list[int]) -> Array:
    return reference.HIDDEN[config["model_type"]](config, weights, text, [0] * len(text))


def vectors_of(model: LoadedModel, texts: list[list[int]]) -> list[np.ndarray]:
    """By both ways from tokens to vectors."""
    given = [np.array(text, np.int32) for text in texts]
    return [forward(given) for forward in (PackedForward(model, 2), PaddedForward(model))]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_those_of_plain_numpy(
    name: str, plain: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts of several lengths in one batch; by the polynomials, and by the plain operations of a GPU."""
    if plain:
        monkeypatch.setattr(fastmath, "fuses_on_cpu", lambda: False)
    config = CONFIGS[name]
    weights = reference.random_weights(config, seed=len(name))
    path = folder(tmp_path, config, weights)
    model = load("it", [str(path)])
    wanted = [hidden_of(config, weights, text) for text in TEXTS]
    means = np.stack([hidden.mean(axis=0) for hidden in wanted])
    for found in vectors_of(model, TEXTS):
        assert np.abs(found - means).max() < 1e-4
    alone = np.array(model.encoder(mx.array([TEXTS[2]]))[0])
    assert np.abs(alone - wanted[2]).max() < 2e-4
    assert np.median(np.std(wanted[2], axis=0)) > 0.05, "tokens differ"


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_of_16_bits_make_about_the_same_vectors(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    weights = reference.random_weights(config, seed=3)
    model = load("it", [str(folder(tmp_path, config, weights))], dtype="float16")
    means = np.stack([hidden_of(config, weights, text).mean(axis=0) for text in TEXTS])
    for found in vectors_of(model, TEXTS):
        assert np.abs(found - means).max() < 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_inspected_and_verified_as_it_is_loaded(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    path = folder(tmp_path, config, reference.random_weights(config, seed=1))
    model, seen = load("it", [str(path)]), inspect(path)
    assert (seen.kind, seen.supported, seen.reranks) == ("embed", True, False)
    assert (seen.dim, seen.layers, seen.vocabulary) == (
        config.get("dim") or config.get("d_model") or config["hidden_size"],
        config.get("n_layers") or config.get("num_layers") or config["num_hidden_layers"],
        260,
    )
    assert seen.context == model.context == {"t5": 2048, "camembert": 38}.get(config["model_type"], 40)
    assert seen.parameters == model.parameters
    assert verify(path).tensors == seen.tensors


def test_the_weights_of_layers_that_share_them_are_there_once(tmp_path: Path) -> None:
    weights = reference.random_weights(ALBERT, seed=1)
    model = load("it", [str(folder(tmp_path, ALBERT, weights))])
    assert model.bytes == 4 * sum(array.size for array in weights.values())
    assert len(model.encoder.layers) == 8  # type: ignore[attr-defined]
    assert len({id(layer) for layer in model.encoder.layers}) == 4  # type: ignore[attr-defined]


def test_what_only_pre_training_needs_may_lie_next_to_the_weights(tmp_path: Path) -> None:
    others = {
        "distilbert": ("vocab_transform.weight", "vocab_layer_norm.bias"),
        "electra": ("discriminator_predictions.dense.weight", "generator_lm_head.bias"),
        "albert": ("predictions.bias", "sop_classifier.classifier.weight", "pooler.weight"),
        "deberta v3": ("lm_predictions.lm_head.bias", "mask_predictions.dense.weight",
                       "embeddings.position_embeddings.weight"),
        "t5": ("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight", "encoder.embed_tokens.weight"),
    }  # fmt: skip
    for index, (name, tensors) in enumerate(others.items()):
        weights = reference.random_weights(CONFIGS[name], seed=1, heads=dict.fromkeys(tensors, (3, 3)))
        path = folder(tmp_path / str(index), CONFIGS[name], weights)
        assert load("it", [str(path)]).kind == "embed"
        saved(path / "model.safetensors", {**weights, "another.weight": np.ones((2, 2))})
        with pytest.raises(ModelError, match=r"does not have: another\.weight"):
            load("it", [str(path)])


def test_t5s_embeddings_may_have_their_other_name_alone(tmp_path: Path) -> None:
    weights = reference.random_weights(T5, seed=3)
    wanted = hidden_of(T5, weights, TEXTS[0])
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    model = load("it", [str(folder(tmp_path, T5, weights))])
    assert np.abs(np.array(model.encoder(mx.array([TEXTS[0]]))[0]) - wanted).max() < 1e-4


def test_a_t5_without_modules_is_said_to_be_no_model_that_writes(tmp_path: Path) -> None:
    path = folder(tmp_path, T5, reference.random_weights(T5, seed=3), embeds=False)
    with pytest.raises(ModelError, match=r'"t5" generates no text here; .* a folder with a modules\.json'):
        load("it", [str(path)])
    seen = inspect(path)
    assert not seen.supported
    assert "modules.json" in seen.notes[0]


@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 12), (12, 40), (4, 3)])
def test_the_buckets_of_distances_are_t5s(count: int, farthest: int) -> None:
    """Two buckets of one distance each, or more; the others by logarithms, up to the last."""
    table = mx.arange(count, dtype=mx.float32)[:, None]
    found = np.array(RelativeBias(table, farthest, 300)(300))[0, 0]
    for query, key in ((0, 299), (299, 0), (100, 100), *((150, key) for key in range(0, 300, 7))):
        assert found[query, key] == reference.t5_bucket(key - query, count, farthest)


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [("distilbert", {"activation": "relu"}, 'activation = "relu" is not supported; only "gelu" or "gelu_python" is'),
     ("distilbert", {"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05"),
     ("distilbert", {"hidden_size": 64}, "dim is 32, and hidden_size, which is the same, 64"),
     ("distilbert", {"n_heads": 5}, "config.json: dim is 32, which is no multiple of n_heads, 5"),
     ("distilbert", {"n_groups": 2}, "the field n_groups = 2"),
     ("camembert", {"hidden_act": "relu"}, 'hidden_act = "relu"'),
     ("camembert", {"position_embedding_type": "relative_key"}, 'position_embedding_type = "relative_key"'),
     ("camembert", {"pad_token_id": 39}, "the first 40 of them are for padding"),
     ("electra", {"position_embedding_type": "relative_key_query"}, 'position_embedding_type = "relative_key_query"'),
     ("electra", {"hidden_act": "gelu_new"}, 'hidden_act = "gelu_new"'),
     ("electra", {"embedding_size": 8}, r"has shape \(260, 16\), not \(260, 8\)"),
     ("electra", {"type_vocab_size": 3}, "token_type_embeddings"),
     ("albert", {"hidden_act": "relu"}, 'hidden_act = "relu"'),
     ("albert", {"layers_to_keep": [0, 1]}, "layers_to_keep = "),
     ("albert", {"num_hidden_groups": 5}, "num_hidden_groups is 5, and num_hidden_layers 4"),
     ("albert", {"inner_group_num": 1}, "tensors that this architecture does not have"),
     ("albert", {"position_embedding_type": "relative_key"}, 'position_embedding_type = "relative_key"'),
     ("deberta v3", {"conv_kernel_size": 3}, "conv_kernel_size = 3 is not supported; only 0 is"),
     ("deberta v3", {"relative_attention": False}, "relative_attention is not true"),
     ("deberta v3", {"relative_attention": None}, "relative_attention is not true"),
     ("deberta v3", {"pos_att_type": "p2c|p2p"}, r'pos_att_type = "p2c\|p2p" is not supported; c2p and p2c are'),
     ("deberta v3", {"pos_att_type": None}, "pos_att_type = null"),
     ("deberta v3", {"norm_rel_ebd": "rms"}, 'norm_rel_ebd = "rms" is not supported'),
     ("deberta v3", {"norm_rel_ebd": "none"}, "tensors that this architecture does not have: encoder.LayerNorm"),
     ("deberta v3", {"share_att_key": False}, "pos_key_proj.weight' of shape .* is missing"),
     ("deberta v3", {"share_att_key": 1}, "share_att_key is 1, not true or false"),
     ("deberta v3", {"position_biased_input": None}, "position_embeddings.weight' of shape .* is missing"),
     ("deberta v3", {"embedding_size": 16}, "embedding_size = 16 is not supported; only 32 is"),
     ("deberta v3", {"attention_head_size": 16}, "attention_head_size = 16"),
     ("deberta v3", {"position_buckets": 100}, "position_buckets is 100, which are too few, or too many for the 40"),
     ("deberta v3", {"position_buckets": 10}, "rel_embeddings.weight"),
     ("deberta v3", {"type_vocab_size": 2}, "token_type_embeddings"),
     ("deberta v3", {"z_steps": 2}, "the field z_steps = 2"),
     ("deberta v3", {"hidden_act": "gelu_new"}, 'hidden_act = "gelu_new"'),
     ("deberta v2", {"max_relative_positions": -1}, "rel_embeddings.weight"),
     ("t5", {"feed_forward_proj": "gated-tanh"}, 'feed_forward_proj = "gated-tanh" is not supported; relu, gelu,'),
     ("t5", {"feed_forward_proj": "gated-gelu"}, "wi_0.weight' of shape .* is missing"),
     ("t5", {"dense_act_fn": "gelu"}, 'dense_act_fn = "gelu" is not supported; only "relu" is'),
     ("t5", {"is_gated_act": True}, "is_gated_act = true"),
     ("t5", {"relative_attention_num_buckets": 16}, "relative_attention_bias"),
     ("t5", {"relative_attention_max_distance": 2}, "relative_attention_num_buckets is 8"),
     ("t5", {"is_decoder": True}, "is_decoder = true"),
     ("t5", {"num_experts": 8}, "the field num_experts = 8"),
     ("t5", {"hidden_size": 32}, "d_model is 24, and hidden_size, which is the same, 32"),
     ("t5", {"d_kv": 16}, r"has shape \(32, 24\), not \(64, 24\)")],
)  # fmt: skip
def test_what_a_config_asks_for_in_vain_is_refused_by_name(
    name: str, change: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    path = folder(tmp_path, config, reference.random_weights(config, seed=1))
    write(path / "config.json", {**config, **change})
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)


def _heads(config: dict[str, Any]) -> tuple[str, Shapes]:
    """Of a cross-encoder: the names of the two layers of its head, and their tensors."""
    dim = config.get("dim") or config.get("hidden_size") or 0
    first, second = {
        "distilbert": ("pre_classifier", "classifier"),
        "albert": ("pooler", "classifier"),
        "deberta-v2": ("pooler.dense", "classifier"),
    }.get(config["model_type"], ("classifier.dense", "classifier.out_proj"))
    shapes = {
        f"{first}.weight": (dim, dim),
        f"{first}.bias": (dim,),
        f"{second}.weight": (1, dim),
        f"{second}.bias": (1,),
    }
    return f"{first} {second}", shapes


@pytest.mark.parametrize(
    ("name", "activation"),
    [("distilbert", "relu"), ("camembert", "tanh"), ("electra", "gelu"), ("albert", "tanh"), ("deberta v3", "gelu"),
     ("deberta, keys alone", "tanh")],
)  # fmt: skip
def test_scores_are_those_of_plain_numpy(name: str, activation: str, tmp_path: Path) -> None:
    """The second text of a pair has a token type of its own where the model knows two."""
    config = {**CONFIGS[name], "architectures": ["ItsForSequenceClassification"], "id2label": {"0": "score"}}
    if name == "deberta, keys alone":
        config["pooler_hidden_act"] = "tanh"
    names, shapes = _heads(config)
    first, second = names.split()
    weights = reference.random_weights(config, seed=5, heads=shapes)
    model = load("it", [str(folder(tmp_path, config, weights, embeds=False))])
    assert model.card(("embed",)).reranks
    typed = config.get("type_vocab_size") == 2
    pairs = [(text, [0] * 3 + [int(typed)] * (len(text) - 3)) for text in TEXTS if len(text) > 3]
    wanted = []
    for text, types in pairs:
        state = reference.HIDDEN[config["model_type"]](config, weights, text, types)[0]
        inner = reference.linear(weights, first, state)
        state = np.tanh(inner) if activation == "tanh" else reference.ACTIVATIONS[activation](inner)
        wanted.append(reference.linear(weights, second, state))
    given = [[index + 260 * kind for index, kind in zip(*pair, strict=True)] for pair in pairs]
    for found in vectors_of(model, given):
        assert np.abs(found - np.stack(wanted)).max() < 1e-4


def test_only_a_model_with_token_types_is_given_those_of_a_pair(tmp_path: Path) -> None:
    for index, (name, types) in enumerate((("electra", {0, 1}), ("albert", {0, 1}), ("deberta v3", {0}),
                                           ("deberta, keys alone", {0, 1}), ("distilbert", {0}))):  # fmt: skip
        config = {**CONFIGS[name], "architectures": ["ItsForSequenceClassification"], "id2label": {"0": "score"}}
        weights = reference.random_weights(config, seed=5, heads=_heads(config)[1])
        path = folder(tmp_path / str(index), config, weights, embeds=False)
        model = load("it", [str(path)])
        assert verify(path).inspection.reranks
        assert model.pairing is not None
        (found,) = model.pairing.encode("the model", ["the worker"], None)
        assert {token // 260 for token in found} == types
        block = np.array([found], np.int32)
        assert model.encoder.token_ids(block).max() < 260


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"id2label": {"0": "contradiction", "1": "entailment", "2": "neutral"}},
      r"3 labels \(id2label\); a reranker has one, the score\. Classifiers are not supported"),
     ({"id2label": None}, "2 labels"),
     ({"pooler_hidden_act": "silu"}, 'pooler_hidden_act = "silu" is not supported; gelu, tanh, relu are'),
     ({"pooler_hidden_size": 16}, "pooler_hidden_size = 16")],
)  # fmt: skip
def test_a_classifier_that_makes_no_score_is_refused_by_name(
    change: dict[str, Any], cause: str, tmp_path: Path
) -> None:
    """As the cross-encoders that say which of three labels a pair of sentences has."""
    config = {**V3, "architectures": ["DebertaV2ForSequenceClassification"], "id2label": {"0": "score"}, **change}
    path = folder(tmp_path, config, reference.random_weights(V3, seed=5, heads=_heads(V3)[1]), embeds=False)
    with pytest.raises(ModelError, match=cause):
        load("it", [str(path)])


# Behind the transformer


def modules(path: Path, *parts: tuple[str, dict[str, Any]]) -> None:
    """A `modules.json` with these behind the transformer."""
    listed = [{"path": "", "type": f"{OLD}.Transformer"}]
    for index, (kind, config) in enumerate(parts, start=1):
        listed.append({"path": f"{index}_{kind}", "type": f"{OLD}.{kind}"})
        write(path / f"{index}_{kind}" / "config.json", config)
    write(path / "modules.json", listed)


POOLINGS: Mapping[str, Callable[[Array], Array]] = {
    "cls": lambda hidden: hidden[0], "max": lambda hidden: hidden.max(axis=0),
    "mean": lambda hidden: hidden.mean(axis=0), "lasttoken": lambda hidden: hidden[-1],
    "mean_sqrt_len_tokens": lambda hidden: hidden.sum(axis=0) / np.sqrt(len(hidden)),
    "weightedmean": lambda hidden: np.average(hidden, axis=0, weights=np.arange(1, len(hidden) + 1)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("pooling", "modes"),
    [({"pooling_mode": ["mean", "cls"]}, ["mean", "cls"]),
     ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
      ["cls", "max", "mean"]),
     ({"pooling_mode_lasttoken": True, "pooling_mode_weightedmean_tokens": True,
       "pooling_mode_mean_sqrt_len_tokens": True}, ["mean_sqrt_len_tokens", "weightedmean", "lasttoken"])],
)  # fmt: skip
def test_vectors_of_several_ways_of_pooling_stand_one_behind_the_other(
    pooling: dict[str, Any], modes: list[str], tmp_path: Path
) -> None:
    """Of a list in its order; of the switches of older files in that of sentence-transformers."""
    weights = reference.random_weights(DISTILBERT, seed=2)
    path = folder(tmp_path, DISTILBERT, weights)
    modules(path, ("Pooling", pooling))
    model = load("it", [str(path)])
    assert model.card(("embed",)).dim == prospect("it", [str(path)]).card.dim == 32 * len(modes)
    assert embedded(model, ["the model", "the"]).shape == (2, 32 * len(modes))
    wanted = [
        np.concatenate([POOLINGS[mode](hidden_of(DISTILBERT, weights, text)) for mode in modes]) for text in TEXTS
    ]
    for found in vectors_of(model, TEXTS):
        assert np.abs(found - np.stack(wanted)).max() < 1e-4


def test_a_layer_norm_may_stand_among_the_layers_behind_the_pooling(tmp_path: Path) -> None:
    weights = reference.random_weights(DISTILBERT, seed=2)
    path = folder(tmp_path, DISTILBERT, weights)
    dense = {
        "in_features": 64,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    modules(
        path, ("Pooling", {"pooling_mode": ["cls", "mean"]}), ("LayerNorm", {"dimension": 64}), ("Dense", dense),
        ("LayerNorm", {"dimension": 8}), ("Normalize", {}),
    )  # fmt: skip
    chance = np.random.default_rng(8)
    parts = [
        {"norm.weight": chance.standard_normal(64), "norm.bias": chance.standard_normal(64)},
        {"linear.weight": chance.standard_normal((8, 64)) * 0.1, "linear.bias": chance.standard_normal(8)},
        {"norm.weight": chance.standard_normal(8), "norm.bias": chance.standard_normal(8)},
    ]
    for name, part in zip(("2_LayerNorm", "3_Dense", "4_LayerNorm"), parts, strict=True):
        saved(path / name / "model.safetensors", part)
    model = load("it", [str(path)])
    assert model.embedding is not None
    assert model.embedding.normalize
    assert verify(path).tensors == inspect(path).tensors + 6
    wanted = []
    for text in TEXTS:
        hidden = hidden_of(DISTILBERT, weights, text)
        vector = reference.layer_norm(parts[0], "norm", np.concatenate([hidden[0], hidden.mean(axis=0)]), 1e-5)
        wanted.append(reference.layer_norm(parts[2], "norm", reference.linear(parts[1], "linear", vector), 1e-5))
    for found in vectors_of(model, TEXTS):
        assert np.abs(found - np.stack(wanted)).max() < 1e-4


@pytest.mark.parametrize(
    ("config", "tensors", "cause"),
    [({"dimension": 32}, {"norm.weight": (32,)}, "'norm.bias' of shape"),
     ({"dimension": 32}, {"norm.weight": (32,), "norm.bias": (32,), "other": (2,)}, "does not have: other"),
     ({"dimension": 16}, {}, "dimension is 16, and what comes in has 32"),
     ({"dimension": 32, "eps": 1e-6}, {}, "the field eps = 1e-06"),
     ({}, {}, "dimension is missing; a positive integer is needed")],
)  # fmt: skip
def test_a_layer_norm_behind_the_pooling_is_checked_as_the_model_is(
    config: dict[str, Any], tensors: dict[str, tuple[int, ...]], cause: str, tmp_path: Path
) -> None:
    path = folder(tmp_path, DISTILBERT, reference.random_weights(DISTILBERT, seed=2))
    modules(path, ("Pooling", {"pooling_mode": "cls"}), ("LayerNorm", config))
    saved(path / "2_LayerNorm" / "model.safetensors", {name: np.ones(shape) for name, shape in tensors.items()})
    for check in (verify, lambda path: load("it", [str(path)])):
        with pytest.raises(ModelError, match=cause):
            check(path)

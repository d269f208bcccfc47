"""Encoders in plain numpy, one text at a time in float64, as their papers and transformers have them.

Weights have transformers' names without the body's before them; `random_weights` makes those that a config asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]

# Parts


def linear(w: Weights, name: str, x: Array) -> Array:
    made: Array = x @ w[f"{name}.weight"].T
    return made + w[f"{name}.bias"] if f"{name}.bias" in w else made


def layer_norm(w: Weights, name: str, x: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled: Array = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: Array, eps: float) -> Array:
    scaled: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return scaled * w[f"{name}.weight"]


def gelu(x: Array) -> Array:
    below: Array = np.vectorize(lambda each: 0.5 * (1.0 + math.erf(each / math.sqrt(2.0))))(x)
    return x * below


def gelu_new(x: Array) -> Array:
    made: Array = 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return made


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {"gelu": gelu, "gelu_new": gelu_new, "relu": relu}


def heads_of(x: Array, heads: int) -> Array:
    """(tokens, heads · size) to (heads, tokens, size)."""
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def weighed(scores: Array, values: Array) -> Array:
    """The values (heads, tokens, size) by the softmax of the scores (heads, tokens, tokens): (tokens, heads · size)."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    found: Array = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return found.transpose(1, 0, 2).reshape(scores.shape[1], -1)


def plain_attention(w: Weights, names: Sequence[str], x: Array, heads: int) -> Array:
    q, k, v = (heads_of(linear(w, name, x), heads) for name in names)
    return weighed(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]), v)


# Architectures: (config, weights, ids, types) to the hidden states (tokens, dim)


def embedded(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int], places: Sequence[int]) -> Array:
    x = w["embeddings.word_embeddings.weight"][list(ids)]
    if "embeddings.token_type_embeddings.weight" in w:
        x = x + w["embeddings.token_type_embeddings.weight"][list(types)]
    if "embeddings.position_embeddings.weight" in w:
        x = x + w["embeddings.position_embeddings.weight"][list(places)]
    return layer_norm(w, "embeddings.LayerNorm", x, config.get("layer_norm_eps", 1e-12))


def bert_block(config: Config, w: Weights, layer: str, x: Array, attended: Array) -> Array:
    eps = config.get("layer_norm_eps", 1e-12)
    x = layer_norm(
        w, f"{layer}.attention.output.LayerNorm", x + linear(w, f"{layer}.attention.output.dense", attended), eps
    )
    inner = gelu(linear(w, f"{layer}.intermediate.dense", x))
    return layer_norm(w, f"{layer}.output.LayerNorm", x + linear(w, f"{layer}.output.dense", inner), eps)


def bert(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int], first: int = 0) -> Array:
    x = embedded(config, w, ids, types, range(first, first + len(ids)))
    if "embeddings_project.weight" in w:
        x = linear(w, "embeddings_project", x)
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        names = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        x = bert_block(config, w, layer, x, plain_attention(w, names, x, config["num_attention_heads"]))
    return x


def camembert(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int]) -> Array:
    """Of ids among which is none of padding."""
    return bert(config, w, ids, types, first=config["pad_token_id"] + 1)


def distilbert(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int]) -> Array:
    x = embedded({}, w, ids, types, range(len(ids)))
    for index in range(config["n_layers"]):
        layer = f"transformer.layer.{index}"
        names = [f"{layer}.attention.{part}_lin" for part in "qkv"]
        made = linear(w, f"{layer}.attention.out_lin", plain_attention(w, names, x, config["n_heads"]))
        x = layer_norm(w, f"{layer}.sa_layer_norm", x + made, 1e-12)
        made = linear(w, f"{layer}.ffn.lin2", gelu(linear(w, f"{layer}.ffn.lin1", x)))
        x = layer_norm(w, f"{layer}.output_layer_norm", x + made, 1e-12)
    return x


def albert(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int]) -> Array:
    eps, activation = config["layer_norm_eps"], ACTIVATIONS[config["hidden_act"]]
    x = linear(w, "encoder.embedding_hidden_mapping_in", embedded(config, w, ids, types, range(len(ids))))
    each = config["num_hidden_layers"] // config["num_hidden_groups"]
    for index in range(config["num_hidden_layers"]):
        for inner in range(config["inner_group_num"]):
            layer = f"encoder.albert_layer_groups.{index // each}.albert_layers.{inner}"
            names = [f"{layer}.attention.{part}" for part in ("query", "key", "value")]
            made = linear(w, f"{layer}.attention.dense", plain_attention(w, names, x, config["num_attention_heads"]))
            x = layer_norm(w, f"{layer}.attention.LayerNorm", x + made, eps)
            made = linear(w, f"{layer}.ffn_output", activation(linear(w, f"{layer}.ffn", x)))
            x = layer_norm(w, f"{layer}.full_layer_layer_norm", x + made, eps)
    return x


def deberta_place(config: Config, distance: int) -> int:
    """The row of the embeddings of distances for a query that lies so far behind its key."""
    buckets, farthest = config.get("position_buckets", -1), config.get("max_relative_positions", -1)
    farthest = farthest if farthest > 0 else config["max_position_embeddings"]
    span = buckets if buckets > 0 else farthest
    middle = buckets // 2
    if buckets > 0 and abs(distance) > middle:
        steps = math.log(abs(distance) / middle) / math.log((farthest - 1) / middle) * (middle - 1)
        distance = int(math.copysign(math.ceil(steps - 1e-6) + middle, distance))
    return int(min(max(distance + span, 0), 2 * span - 1))


def deberta(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int]) -> Array:
    heads, terms = config["num_attention_heads"], config["pos_att_type"]
    x = embedded(config, w, ids, types, range(len(ids)))
    table = w["encoder.rel_embeddings.weight"]
    if config.get("norm_rel_ebd") == "layer_norm":
        table = layer_norm(w, "encoder.LayerNorm", table, config["layer_norm_eps"])
    places = np.array([[deberta_place(config, query - key) for key in range(len(ids))] for query in range(len(ids))])
    for index in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        names = [f"{layer}.attention.self.{part}_proj" for part in ("query", "key", "value")]
        q, k, v = (heads_of(linear(w, name, x), heads) for name in names)
        scores = q @ k.transpose(0, 2, 1)
        shared = config.get("share_att_key", False)
        if "c2p" in terms:
            name = names[1] if shared else f"{layer}.attention.self.pos_key_proj"
            known = heads_of(linear(w, name, table), heads)
            scores += np.einsum("hqd,hqkd->hqk", q, known[:, places])
        if "p2c" in terms:
            name = names[0] if shared else f"{layer}.attention.self.pos_query_proj"
            known = heads_of(linear(w, name, table), heads)
            scores += np.einsum("hkd,hqkd->hqk", k, known[:, places])
        count = 1 + ("c2p" in terms) + ("p2c" in terms)
        x = bert_block(config, w, layer, x, weighed(scores / math.sqrt(q.shape[-1] * count), v))
    return x


def t5_bucket(distance: int, count: int, farthest: int) -> int:
    """Of a key that lies so far behind its query."""
    half, size = count // 2, abs(distance)
    first, exact = (half if distance > 0 else 0), half // 2
    if size < exact:
        return first + size
    steps = math.log(size / exact) / math.log(farthest / exact) * (half - exact)
    return first + min(half - 1, exact + int(steps + 1e-6))


def t5(config: Config, w: Weights, ids: Sequence[int], types: Sequence[int]) -> Array:
    eps, heads = config["layer_norm_epsilon"], config["num_heads"]
    gated = config["feed_forward_proj"].startswith("gated")
    activation = gelu_new if gated else ACTIVATIONS[config["feed_forward_proj"]]
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    sizes = config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
    bias = np.array([[table[t5_bucket(key - query, *sizes)] for key in range(len(ids))] for query in range(len(ids))])
    x = w["shared.weight"][list(ids)]
    for index in range(config["num_layers"]):
        first, second = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        normed = rms_norm(w, f"{first}.layer_norm", x, eps)
        q, k, v = (heads_of(linear(w, f"{first}.SelfAttention.{part}", normed), heads) for part in "qkv")
        attended = weighed(q @ k.transpose(0, 2, 1) + bias.transpose(2, 0, 1), v)
        x = x + linear(w, f"{first}.SelfAttention.o", attended)
        normed = rms_norm(w, f"{second}.layer_norm", x, eps)
        inner = activation(linear(w, f"{second}.DenseReluDense.{'wi_0' if gated else 'wi'}", normed))
        inner = inner * linear(w, f"{second}.DenseReluDense.wi_1", normed) if gated else inner
        x = x + linear(w, f"{second}.DenseReluDense.wo", inner)
    return rms_norm(w, "encoder.final_layer_norm", x, eps)


HIDDEN: Mapping[str, Callable[[Config, Weights, Sequence[int], Sequence[int]], Array]] = {
    "camembert": camembert, "distilbert": distilbert, "electra": bert, "albert": albert, "deberta-v2": deberta,
    "t5": t5,
}  # fmt: skip

# Shapes


def _layer(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _tables(config: Config, dim: int) -> Shapes:
    shapes = {"word": config["vocab_size"], "position": config["max_position_embeddings"]}
    if config.get("position_biased_input") is False:
        del shapes["position"]
    if config.get("type_vocab_size"):
        shapes["token_type"] = config["type_vocab_size"]
    return {f"embeddings.{name}_embeddings.weight": (rows, dim) for name, rows in shapes.items()}


def _bert_layers(config: Config, parts: str = "attention.self.{}") -> Shapes:
    dim, hidden, shapes = config["hidden_size"], config["intermediate_size"], Shapes()
    for layer in (f"encoder.layer.{index}" for index in range(config["num_hidden_layers"])):
        for part in ("query", "key", "value"):
            shapes |= _layer(f"{layer}.{parts.format(part)}", dim, dim)
        shapes |= _layer(f"{layer}.attention.output.dense", dim, dim)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", dim)
        shapes |= _layer(f"{layer}.intermediate.dense", dim, hidden) | _layer(f"{layer}.output.dense", hidden, dim)
        shapes |= _norm(f"{layer}.output.LayerNorm", dim)
    return shapes


def _bert(config: Config) -> Shapes:
    dim, width = config["hidden_size"], config.get("embedding_size", config["hidden_size"])
    shapes = _tables(config, width) | _norm("embeddings.LayerNorm", width) | _bert_layers(config)
    return shapes if width == dim else shapes | _layer("embeddings_project", width, dim)


def _distilbert(config: Config) -> Shapes:
    dim, hidden = config["dim"], config["hidden_dim"]
    shapes = _tables(config, dim) | _norm("embeddings.LayerNorm", dim)
    for layer in (f"transformer.layer.{index}" for index in range(config["n_layers"])):
        for part in ("q_lin", "k_lin", "v_lin", "out_lin"):
            shapes |= _layer(f"{layer}.attention.{part}", dim, dim)
        shapes |= _layer(f"{layer}.ffn.lin1", dim, hidden) | _layer(f"{layer}.ffn.lin2", hidden, dim)
        shapes |= _norm(f"{layer}.sa_layer_norm", dim) | _norm(f"{layer}.output_layer_norm", dim)
    return shapes


def _albert(config: Config) -> Shapes:
    dim, width, hidden = config["hidden_size"], config["embedding_size"], config["intermediate_size"]
    shapes = _tables(config, width) | _norm("embeddings.LayerNorm", width)
    shapes |= _layer("encoder.embedding_hidden_mapping_in", width, dim)
    for group in range(config["num_hidden_groups"]):
        for inner in range(config["inner_group_num"]):
            layer = f"encoder.albert_layer_groups.{group}.albert_layers.{inner}"
            for part in ("query", "key", "value", "dense"):
                shapes |= _layer(f"{layer}.attention.{part}", dim, dim)
            shapes |= _norm(f"{layer}.attention.LayerNorm", dim) | _norm(f"{layer}.full_layer_layer_norm", dim)
            shapes |= _layer(f"{layer}.ffn", dim, hidden) | _layer(f"{layer}.ffn_output", hidden, dim)
    return shapes


def _deberta(config: Config) -> Shapes:
    dim = config["hidden_size"]
    shapes = _tables(config, dim) | _norm("embeddings.LayerNorm", dim)
    shapes |= _bert_layers(config, "attention.self.{}_proj")
    buckets, farthest = config.get("position_buckets", -1), config.get("max_relative_positions", -1)
    span = buckets if buckets > 0 else farthest if farthest > 0 else config["max_position_embeddings"]
    shapes["encoder.rel_embeddings.weight"] = (2 * span, dim)
    if config.get("norm_rel_ebd") == "layer_norm":
        shapes |= _norm("encoder.LayerNorm", dim)
    parts = [part for term, part in (("c2p", "key"), ("p2c", "query")) if term in config["pos_att_type"]]
    for index in range(0 if config.get("share_att_key") else config["num_hidden_layers"]):
        for part in parts:
            shapes |= _layer(f"encoder.layer.{index}.attention.self.pos_{part}_proj", dim, dim)
    return shapes


def _t5(config: Config) -> Shapes:
    dim, width, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    shapes: Shapes = {"shared.weight": (config["vocab_size"], dim), "encoder.final_layer_norm.weight": (dim,)}
    buckets = config["relative_attention_num_buckets"], config["num_heads"]
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = buckets
    inner = ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated") else ("wi",)
    for index in range(config["num_layers"]):
        first, second = (f"encoder.block.{index}.layer.{part}" for part in (0, 1))
        shapes |= {f"{part}.layer_norm.weight": (dim,) for part in (first, second)}
        shapes |= {f"{first}.SelfAttention.{part}.weight": (width, dim) for part in "qkv"}
        shapes[f"{first}.SelfAttention.o.weight"] = (dim, width)
        shapes |= {f"{second}.DenseReluDense.{part}.weight": (hidden, dim) for part in inner}
        shapes[f"{second}.DenseReluDense.wo.weight"] = (dim, hidden)
    return shapes


_SHAPES: Mapping[str, Callable[[Config], Shapes]] = {
    "camembert": _bert, "electra": _bert, "distilbert": _distilbert, "albert": _albert, "deberta-v2": _deberta,
    "t5": _t5,
}  # fmt: skip


def random_weights(config: Config, seed: int, heads: Shapes | None = None) -> dict[str, Array]:
    """Each of them random, norms and biases too. `heads`: further tensors."""
    chance = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for name, shape in {**_SHAPES[config["model_type"]](config), **(heads or {})}.items():
        noise = chance.standard_normal(shape)
        if len(shape) == 1:
            made[name] = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif "embeddings" in name or "shared" in name:
            made[name] = noise
        else:
            # Layers that come again and again would make all tokens one.
            made[name] = noise * (0.6 if "albert" in name else 2.0) * shape[-1] ** -0.5
        made[name] = made[name].astype(np.float32).astype(np.float64)
    return made

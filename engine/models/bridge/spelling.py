"""What transformers 5 writes into a config.json in other words than mlx-lm's model files read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from engine.models.fields import Fields
from stoker.contract.shown import as_json
from stoker.errors import ModelError

#: What `rope_parameters` says besides the form of the scaling.
_APART = ("rope_theta", "partial_rotary_factor")
_PLAIN = ("rope_type", "type")
#: Types of scaling by the length of the first training, and its name.
_BY_LENGTH, _ORIGINAL = ("yarn", "longrope", "su"), "original_max_position_embeddings"
#: By which of them a file learns how much of a head it rotates.
PARTS = frozenset(("partial_rotary_factor", "rotary_pct", "rotary_dim"))

#: A layer with a window and one without, as `layer_types` and as a pattern of EXAONE 4's call them.
_LETTERS = {"sliding_attention": "L", "full_attention": "G"}
_LONGEST_PATTERN = 4096
#: What newer releases of transformers call the layers of a Granite 4.
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
#: File -> what transformers takes where a config.json does not say, or says null, and the file takes something else or
#: nothing.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ernie4_5": {"tie_word_embeddings": True},
    "ernie4_5_moe": {"tie_word_embeddings": True},
    "falcon_h1": {
        **dict.fromkeys(
            (
                "attention_out_multiplier",
                "embedding_multiplier",
                "key_multiplier",
                "lm_head_multiplier",
                "ssm_in_multiplier",
                "ssm_out_multiplier",
            ),
            1.0,
        ),
        "mlp_multipliers": [1.0, 1.0],
        "ssm_multipliers": [1.0] * 5,
    },
    "gemma3_text": {"max_position_embeddings": 131_072},
    # Steps of time are not bounded; and positions are those of its states alone.
    "granitemoehybrid": {"time_step_limit": [0.0, math.inf], "position_embedding_type": "nope"},
}
#: The same of the part of a config.json that says what the language model is.
_INNER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": _DEFAULTS["gemma3_text"],
    "qwen3_vl": {"tie_word_embeddings": False},
    "qwen3_vl_moe": {"tie_word_embeddings": False},
}
#: Files of models that may say next to that part alone whether the head is the embedding.
_TIES_OUTSIDE = ("qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")

#: Files that scale what goes into a head of its own, and leave out the scale where the head is the embedding. So they
#: always have one, which is given the embedding (`weights.fill`).
OWN_HEAD = ("minicpm", "minicpm3")


def read_names(file: str, names: Iterable[str]) -> frozenset[str]:
    """The fields that are read for a file: those of its arguments, `names`, and what `ropes.correct` reads for it."""
    return frozenset((*names, "partial_rotary_factor")) if file == "glm" else frozenset(names)


def respelled(config: Mapping[str, Any], file: str, known: frozenset[str]) -> dict[str, Any]:
    """`config` with the names that mlx-lm reads, `known`, together with those that it passes over.

    What a config says in both ways counts as in transformers: a `rope_scaling` that is null says nothing. Raises
    `ModelError` for RoPE by layer type that a file has not.
    """
    made = _under(_DEFAULTS.get(file, {}), config)
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        # The names that its own file knows are not at hand: those that it passes over do no harm.
        made["text_config"] = _with_original(_with_rope(_under(_inner_defaults(config, file), inner), None))
    made = _with_sizes(made, known)
    if file == "granitemoehybrid" and isinstance(made.get("layer_types"), list):
        made["layer_types"] = [
            _KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in made["layer_types"]
        ]
    if file == "exaone4":
        made["sliding_window_pattern"] = _exaone_pattern(made)
    made = _with_original(made if "rope_parameters" in known else _with_rope(made, known))
    made = _with_part(made, known)
    if file in OWN_HEAD:
        made["tie_word_embeddings"] = False
    if file == "deepseek_v2" and made.get("rope_scaling") is None:
        # The file cannot do without scaling: this one changes nothing.
        made["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", "factor": 1.0}
    return made


def _with_sizes(config: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    for name, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if name in known and name not in config and other in config:
            return {**config, name: config[other]}
    pattern = config.get("_sliding_window_pattern")
    if pattern is not None and "sliding_window_pattern" not in config:  # Gemma 3
        return {**config, "sliding_window_pattern": pattern}
    if "block_dim" in known and "block_dim" not in config:  # LFM2
        width = config.get("hidden_size")
        return {**config, "block_dim": width}
    return config


def _inner_defaults(config: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """What a file takes for the language model of a config.json that says it elsewhere, or not at all."""
    own, ties = _INNER_DEFAULTS.get(file, {}), config.get("tie_word_embeddings")
    if file not in _TIES_OUTSIDE or ties is None:
        return own
    return {**own, "tie_word_embeddings": ties}


def _exaone_pattern(config: Mapping[str, Any]) -> str | None:
    """Which layers have a window, and positions, a letter each, from the first layer on; None: none has a window, and
    all have positions. By the list of layers, the letters of a pattern, or how many layers its last one comes after.

    Raises `ModelError` for what is none of these."""
    types, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if config.get("sliding_window") is None:
        return None
    if isinstance(types, list):
        if len(types) != config.get("num_hidden_layers") or not all(kind in tuple(_LETTERS) for kind in types):
            raise ModelError(f"config.json: layer_types {as_json(types)} is no list of {' or '.join(_LETTERS)} a layer")
        return "".join(_LETTERS[kind] for kind in types)
    if type(pattern) is int and 0 < pattern <= _LONGEST_PATTERN:
        return "L" * (pattern - 1) + "G"
    if isinstance(pattern, str) and set(pattern) <= {*_LETTERS.values()}:
        return pattern or None
    raise ModelError(
        f"config.json: sliding_window_pattern = {as_json(pattern)} is none: letters L and G, or a number, are"
    )


def _with_rope(config: Mapping[str, Any], known: frozenset[str] | None) -> dict[str, Any]:
    stated = config.get("rope_parameters")
    if not isinstance(stated, Mapping) or not stated:
        return dict(config)
    parts = {kind: part for kind, part in stated.items() if isinstance(part, Mapping)}
    if not parts:
        # As transformers has it: `rope_scaling or rope_parameters`.
        return dict(config) if config.get("rope_scaling") else {**config, **_read(stated)}
    whole, local = parts.get("full_attention", {}), parts.get("sliding_attention", {})
    read = _read(whole)
    if known is None or "rope_local_base_freq" in known:
        _check_plain(local)
        return _under({**read, "rope_local_base_freq": local.get("rope_theta", 10_000.0)}, config)
    if any(part != whole for part in parts.values()):
        raise ModelError(
            f"config.json: rope_parameters of {', '.join(parts)} differ, which mlx-lm has not for this architecture"
        )
    return _under(read, config)


def _with_original(config: dict[str, Any]) -> dict[str, Any]:
    """With the length of the first training where scaling is by it and does not say it: as in transformers, what the
    model says of itself, else its context. mlx-lm's own default is 4096."""
    stated = config.get(_ORIGINAL) or config.get("max_position_embeddings")
    found = {name: config.get(name) for name in ("rope_scaling", "rope_parameters")}
    scaled = {
        name: {**value, _ORIGINAL: stated}
        for name, value in found.items()
        if isinstance(value, Mapping) and _kind(value) in _BY_LENGTH and value.get(_ORIGINAL) is None
    }
    return config if stated is None else {**config, **scaled}


def _with_part(config: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """With the older names of how much of a head is rotated, and by which base, for a file that knows those alone."""
    part = config.get("partial_rotary_factor")
    older = {"rotary_emb_base": config.get("rope_theta"), "rotary_pct": part}
    if part is not None and "rotary_dim" in known and "partial_rotary_factor" not in known:
        fields = Fields(config, "config.json")
        older["rotary_dim"] = int(fields.number("partial_rotary_factor") * _head_width(config, fields))
    return _under({name: value for name, value in older.items() if name in known and value is not None}, config)


def _head_width(config: Mapping[str, Any], fields: Fields) -> int:
    if config.get("head_dim") is not None:
        return fields.count("head_dim")
    sizes = (("hidden_size", "model_dim", "n_embd"), ("num_attention_heads", "num_heads", "n_head"))
    width, heads = (next((name for name in names if config.get(name) is not None), names[0]) for names in sizes)
    return fields.count(width) // fields.count(heads)


def _under(read: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with what was `read` where it says nothing, or null."""
    return {**config, **{name: value for name, value in read.items() if config.get(name) is None}}


def _read(part: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling` as transformers 4 had them."""
    made = {name: part[name] for name in _APART if name in part}
    scaling = {name: value for name, value in part.items() if name not in _APART}
    kind = _kind(part)
    if kind == "default" and not scaling.keys() - {*_PLAIN}:
        return {**made, "rope_scaling": None}
    return {**made, "rope_scaling": {**scaling, "type": kind, "rope_type": kind}}


def _kind(part: Mapping[str, Any]) -> Any:
    return part.get("rope_type", part.get("type", "default"))


def _check_plain(part: Mapping[str, Any]) -> None:
    kind = part.get("rope_type", "default")
    if kind != "default":
        raise ModelError(
            f"config.json: rope_parameters: sliding_attention: rope_type = {as_json(kind)} is not supported: mlx-lm "
            "scales the other layers alone"
        )

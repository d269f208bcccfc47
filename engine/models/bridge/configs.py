"""What a config.json may ask of mlx-lm's model files.

They take the fields that they know and pass over all others, so what would change the numbers and is passed over is
refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.models.allowed import MISTRAL_WINDOW
from engine.models.bridge import counts, package
from engine.models.bridge.spelling import PARTS, read_names
from engine.models.fields import KINDS, OBJECT, Fields, check_kind
from stoker.contract.shown import as_json
from stoker.errors import ModelError

_SILU = ("silu", "swish")
_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_approx")
_RELU2 = ("relu2", "relu_squared", "sqrelu")
#: Model file -> the activations that it computes, where it is not SiLU.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "gemma4_text"), _GELU),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neox", "gptj", "phi", "phixtral", "starcoder2"), _GELU),
    **dict.fromkeys(("recurrent_gemma", "gear", "muse_spark", "spark2_5"), _GELU),
    **dict.fromkeys(("bitnet", "nemotron", "nanochat", "rwkv7"), _RELU2),
    "nemotron_h": (*_RELU2, *_SILU),
    "apertus": ("xielu",),
    "kimi_k3": ("situ",),
    "phi3small": ("gegelu",),
}
#: Model file -> what it passes over, with the value that it computes.
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "deepseek": {"norm_topk_prob": False, "scoring_func": "softmax"},
    "deepseek_v3": {"scoring_func": "sigmoid", "rope_interleave": True, "topk_method": "noaux_tc"},
    "falcon_h1": {"attention_in_multiplier": 1.0},  # of values
    "glm4_moe_lite": {"scoring_func": "sigmoid", "rope_interleave": True, "topk_method": "noaux_tc"},
    **{file: {"final_logit_softcapping": None, "attn_logit_softcapping": None} for file in ("gemma3", "gemma3_text")},
    "olmoe": {"clip_qkv": None},
    **{
        file: {"topk_method": "noaux_tc"}
        for file in ("exaone_moe", "glm4_moe", "kimi_k25", "kimi_vl", "mimo_v2_flash", "solar_open")
    },
    **{file: {"zero_expert_type": "identity"} for file in ("longcat_flash", "longcat_flash_ngram")},
    "youtu_llm": {"rope_interleave": True},
}
#: Model file -> what transformers takes null for, and it does not.
_NUMBERS = {"gemma2": ("attn_logit_softcapping", "final_logit_softcapping")}
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
#: Types of rope that `initialize_rope` and the model files compute as transformers does.
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "deepseek_yarn", "telechat3-yarn", "longrope", "su",
          "proportional", "mrope")  # fmt: skip
_ROPE_OBJECTS, _TYPES = ("rope_parameters", "rope_scaling"), ("rope_type", "type")
#: Code of the checkpoint's own, which never runs.
_CODE = ("model_file",)
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
                   "seq_length", "model_max_length", "max_target_positions", "block_size")  # fmt: skip
#: For a model whose files do not say how long a text may be.
_NO_CONTEXT = 4096
#: Its only limit is memory: what it keeps of a text does not grow.
RECURRENT_CONTEXT = 1 << 20


@dataclass(frozen=True)
class BridgeArgs:
    """What the engine asks of a model, of any file. `vocab`: columns of its logits."""

    architecture: str
    vocab: int
    context: int
    #: Each layer has its own, in its cache.
    window: None = None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that says what the language model is: of a model that also sees, `text_config`. Raises `ModelError`."""
    inner = config.get("text_config")
    if inner is None:
        return config
    OBJECT.check(inner, "text_config", "config.json")
    if not isinstance(inner.get("model_type"), str | type(None)):
        raise ModelError(f"config.json: text_config: model_type = {as_json(inner['model_type'])}: a text is needed")
    return {**config, **inner}


def check(config: Mapping[str, Any], file: str, args_class: type) -> None:
    """Raise `ModelError` for what mlx-lm's file would pass over or compute otherwise."""
    for name in _CODE:
        if config.get(name):
            raise ModelError(
                f"config.json: {name} = {as_json(config[name])} is code of the checkpoint's own, which never runs"
            )
    text = text_config(config)
    if text.get("use_bidirectional_attention") is True:
        raise ModelError(
            "config.json: use_bidirectional_attention = true is not supported for a model that generates: such a one "
            "embeds, by its modules.json, which is missing"
        )
    for part in [config] if text is config else [config, text]:
        counts.check(part, file, args_class)
    known = read_names(file, (each.name for each in fields(args_class)))
    nested = "text_config" in known
    for name, computed in _FIXED.get(file, {}).items():
        if text.get(name) not in (None, computed):
            raise ModelError(
                f"config.json: {name} = {as_json(text[name])} is not supported: mlx-lm computes "
                f"{as_json(computed)} for this one"
            )
    for name in _NUMBERS.get(file, ()):
        if name in text and text[name] is None:
            raise ModelError(f"config.json: {name} = null is not supported: mlx-lm's file needs a number there")
    rotated = text.get("partial_rotary_factor")
    if rotated not in (None, 1.0) and not (nested or known & PARTS):
        raise ModelError(
            f"config.json: partial_rotary_factor = {as_json(rotated)} is not supported: mlx-lm rotates all of a head "
            "for this architecture"
        )
    if file != "exaone4":  # its pattern was made of the list (`spelling.py`)
        _check_layer_types(text, known, args_class)
    for name in _ACTIVATION_FIELDS:
        _check_activation(text, name, file, taken=name in known)
    for name in _ROPE_OBJECTS:
        value = text.get(name)
        # What `rope_parameters` says is given to the file as `rope_scaling` (`spelling.py`).
        read = {name, "rope_scaling"} if name == "rope_parameters" else {name}
        for each in _ropes(value) if isinstance(value, Mapping) else ():
            _check_rope(each, f"config.json: {name}", taken=nested or bool(read & known))


def _check_layer_types(text: Mapping[str, Any], known: frozenset[str], args_class: type) -> None:
    """Files that count to the next full layer pass over a list that says otherwise."""
    types, usual = text.get("layer_types"), getattr(args_class, "sliding_window_pattern", 6)
    pattern = text.get("sliding_window_pattern", usual)
    if "sliding_window_pattern" not in known or "layer_types" in known or not isinstance(types, list):
        return
    if type(pattern) is not int or pattern < 1:
        raise ModelError(
            f"config.json: sliding_window_pattern = {as_json(pattern)}: a whole number of at least 1 is needed"
        )
    counted = [("sliding" if place % pattern else "full") + "_attention" for place in range(1, len(types) + 1)]
    if types != counted:
        raise ModelError(
            f"config.json: layer_types = {as_json(types)} are not supported: mlx-lm has {as_json(counted)} for this one"
        )


def _check_activation(text: Mapping[str, Any], name: str, file: str, *, taken: bool) -> None:
    value, allowed = text.get(name), _ACTIVATIONS.get(file, _SILU)
    if value is None or taken or value in allowed:
        return
    raise ModelError(
        f"config.json: {name} = {as_json(value)} is not supported: mlx-lm computes {' or '.join(allowed)} for this one"
    )


def check_ropes(config: Mapping[str, Any]) -> None:
    """Raise `ModelError` for a value that none of RoPE's fields has, before any is read under other names."""
    text = text_config(config)
    check_kind(text.get("partial_rotary_factor"), "partial_rotary_factor", "config.json")
    for name in _ROPE_OBJECTS:
        value = text.get(name)
        check_kind(value, name, "config.json")
        for each in (value, *_ropes(value)) if isinstance(value, Mapping) else ():
            for field, part in each.items():
                check_kind(part, field, f"config.json: {name}")
                if field in _TYPES and part is not None and not isinstance(part, str):
                    raise ModelError(f"config.json: {name}: {field} is {as_json(part)}, not a text")


def _ropes(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """One for each kind of layers, or one for all."""
    return [part for name, part in value.items() if isinstance(part, Mapping) and name not in KINDS] or [value]


def _check_rope(value: Mapping[str, Any], where: str, *, taken: bool) -> None:
    kind = value.get("rope_type", value.get("type", "default"))
    named = "rope_type" if "rope_type" in value else "type"
    if kind not in _ROPES:
        raise ModelError(f"{where}: {named} = {as_json(kind)} is not supported; {', '.join(_ROPES)} are")
    if kind != "default" and not taken:
        raise ModelError(f"{where}: {named} = {as_json(kind)} is not supported: mlx-lm has none for this architecture")


def context_of(config: Mapping[str, Any], args: object, *, attends: bool) -> int:
    """The most tokens of a text: what the files say, and no more than what mlx-lm computes rightly."""
    text = text_config(config)
    stated = [text.get(name) for name in _CONTEXT_FIELDS] + [getattr(args, name, None) for name in _CONTEXT_FIELDS]
    found = next((value for value in stated if type(value) is int and value > 0), None)
    if found is None:
        found = _NO_CONTEXT if attends else RECURRENT_CONTEXT
    inner = getattr(args, "text_config", args)
    taken = hasattr(inner, "sliding_window") or isinstance(inner, dict)
    return min([found, *_bounds(text, taken=taken)])


def shown_context(config: Mapping[str, Any], file: str, stated: int) -> int:
    """`context_of` of a model that is not made, whose config.json has `stated`."""
    return min([stated, *_bounds(text_config(config), taken=package.reads_window(file))])


def _bounds(text: Mapping[str, Any], *, taken: bool) -> Iterator[int]:
    """Lengths within which nothing changes by what a model file passes over. `taken`: whether a window is not."""
    window = text.get("sliding_window")
    if type(window) is int and window > 0 and not taken and text.get("use_sliding_window", True):
        yield window  # Every token sees all others.
    yield from _window_of_all(text)
    turned = text.get("no_rope_layers")
    if text.get("model_type") == "llama4_text" and isinstance(turned, list):
        yield from _llama4_bounds(text, turned)


def _window_of_all(text: Mapping[str, Any]) -> Iterator[int]:
    """A Mistral without a list of layers has a window in all of them, where mlx-lm's file has it in none."""
    usual = {"mistral": MISTRAL_WINDOW, "ministral3": None}
    kind = text.get("model_type")
    if kind in usual and not isinstance(text.get("layer_types"), list):
        window = text.get("sliding_window", usual[kind])
        if type(window) is int and window > 0:
            yield window


def _llama4_bounds(text: Mapping[str, Any], turned: list[Any]) -> Iterator[int]:
    """Layers that turn nothing sharpen their scores from a position on; layers of chunks see their own chunk."""
    fields, kinds = Fields(text, "config.json"), text.get("layer_types")
    if text.get("attn_temperature_tuning", True) and not all(turned):
        yield max(1, math.ceil(fields.number("floor_scale", 8192.0)) - 1)
    chunked = "chunked_attention" in kinds if isinstance(kinds, list) else any(turned)
    if chunked and text.get("attention_chunk_size", 8192) is not None:
        yield fields.count("attention_chunk_size", 8192)

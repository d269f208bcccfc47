"""How GGUF files of architectures beyond the Llama family fill mlx-lm's model files. No MLX.

The names and defaults are those of llama.cpp, its converters (`conversion/`) and its models (`src/models/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.models.bridge.gguf_keys import Keys, scaling
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import PARTS
from stoker.errors import ModelError

#: Fields of a config.json beyond the sizes.
Details = Callable[[Keys, GGUF, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class GgufModel:
    """How GGUF files of one architecture fill one of mlx-lm's model files.

    `parts`: the middle of a tensor's name in GGUF -> that in the network. `norm_offset`: what the converter added to
    the weights of norms. `permuted`: whether it has the rows of q and k in another order.
    """

    file: str
    details: Details
    parts: Mapping[str, str] = field(default_factory=lambda: PARTS)
    norm_offset: float = 0.0
    permuted: bool = False


def _gemma(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


def _query_scalar(sizes: Mapping[str, Any], largest: int) -> int:
    """What scores are divided by the root of. No key says it: the largest model of a generation, known by the number
    of its layers, has another one than the others."""
    if sizes["num_hidden_layers"] == largest:
        return int(sizes["hidden_size"] // sizes["num_attention_heads"])
    return int(sizes["head_dim"])


def _gemma2(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    keys.only("attention.sliding_window_pattern", 2)
    keys.only("rope.freq_base_swa", sizes["rope_theta"])
    return {
        "query_pre_attn_scalar": _query_scalar(sizes, 46),
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def _gemma3(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    window = keys.index("attention.sliding_window", 0)
    return {
        "query_pre_attn_scalar": _query_scalar(sizes, 62),
        "sliding_window": window or sizes["max_position_embeddings"],
        "sliding_window_pattern": _pattern(keys, 6) if window else 1,
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0),
        "rope_scaling": scaling(keys, "linear"),
    }


def _pattern(keys: Keys, default: int) -> int:
    """Every how many layers one sees all: a number, or for each layer whether it has a window."""
    name = "attention.sliding_window_pattern"
    stated = keys.get(name)
    if not isinstance(stated, list):
        return keys.count(name, default)
    period = stated.index(False) + 1 if False in stated else len(stated) + 1
    if stated != [place % period != 0 for place in range(1, len(stated) + 1)]:
        raise keys.refuse(name, "mlx-lm has one layer without a window after as many with one, again and again")
    return period


def _phi3(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    turned, original = keys.count("rope.dimension_count", sizes["head_dim"]), "rope.scaling.original_context_length"
    longest = sizes["max_position_embeddings"]
    found = {
        "partial_rotary_factor": turned / sizes["head_dim"],
        "original_max_position_embeddings": keys.count(original, longest),
        "sliding_window": keys.index("attention.sliding_window", 0) or None,
    }
    keys.only("rope.scaling.type", "longrope")
    sides = {name: f"rope_factors_{name}.weight" for name in ("long", "short")}
    if not any(tensor in gguf.tensors for tensor in sides.values()):
        return found
    factors = {f"{name}_factor": _factors(gguf, tensor, turned // 2) for name, tensor in sides.items()}
    gain = keys.number("rope.scaling.attn_factor", 1.0)
    return {**found, "rope_scaling": {"type": "longrope", **factors, "attention_factor": gain}}


def _factors(gguf: GGUF, tensor: str, count: int) -> list[float]:
    """One for each pair that is turned."""
    found: list[float] = gguf.dequantize(tensor).tolist()
    if gguf.tensors[tensor].shape != (count,):
        raise ModelError(f"{gguf.path}: tensor {tensor!r} has shape {gguf.tensors[tensor].shape}, not {(count,)}")
    return found


def _experts(keys: Keys) -> dict[str, int]:
    """Under each of the names that mlx-lm's files have for their number."""
    count = keys.count("expert_count")
    return {"num_experts": count, "num_local_experts": count, "num_experts_per_tok": keys.count("expert_used_count")}


def _qwen2_moe(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    experts = _experts(keys)
    usual = sizes["intermediate_size"] // experts["num_experts_per_tok"]
    return {
        **experts,
        "moe_intermediate_size": keys.count("expert_feed_forward_length", usual),
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", sizes["intermediate_size"]),
        "rope_scaling": scaling(keys, "linear"),
    }


def _qwen3_moe(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    experts = _experts(keys)
    usual = sizes["intermediate_size"] // experts["num_experts_per_tok"]
    return {
        **experts,
        "moe_intermediate_size": keys.count("expert_feed_forward_length", usual),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_scaling": scaling(keys, "linear", "yarn"),
    }


def _gpt_oss(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    keys.only("attention.sliding_window_pattern", 2)
    keys.only("rope.freq_base_swa", sizes["rope_theta"])
    stretched = scaling(keys, "yarn")
    return {
        **_experts(keys),
        "intermediate_size": keys.count("expert_feed_forward_length", sizes["intermediate_size"]),
        "sliding_window": keys.count("attention.sliding_window"),
        # The model's own; no key says it.
        "rope_scaling": None if stretched is None else {**stretched, "truncate": False},
    }


def _mixtral(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    # Older files have the experts' size under both names.
    keys.only("expert_feed_forward_length", sizes["intermediate_size"])
    return {**_experts(keys), "rope_scaling": scaling(keys, "linear")}


def _granite(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        **_UNBIASED,
        "attention_multiplier": keys.number("attention.scale", sizes["head_dim"] ** -0.5),
        "embedding_multiplier": keys.number("embedding_scale", 1.0),
        "residual_multiplier": keys.number("residual_scale", 1.0),
        "logits_scaling": keys.number("logit_scale", 1.0),
        "rope_scaling": scaling(keys, "linear"),
    }


def _smollm3(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    # Each fourth layer knows no positions; no key says it.
    return {**_UNBIASED, "no_rope_layer_interval": 4, "rope_scaling": scaling(keys, "linear", "yarn")}


def _olmo2(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    # One with a window is an OLMo 3.
    keys.only("attention.sliding_window", 0)
    return {**_UNBIASED, "rope_scaling": scaling(keys, "linear")}


_UNBIASED = {"attention_bias": False, "mlp_bias": False}
_GEMMA = {
    **PARTS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {**PARTS, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_QWEN_MOE = {
    **PARTS,
    **{f"ffn_{part}_exps": f"mlp.switch_mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_GPT_OSS = {
    **PARTS,
    **{f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.router",
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
}
_MIXTRAL = {
    **PARTS,
    **{f"ffn_{part}_exps": f"block_sparse_moe.switch_mlp.{part}_proj" for part in ("gate", "up", "down")},
    "ffn_gate_inp": "block_sparse_moe.gate",
}

#: `general.architecture` of the Llama family, in which a Mistral is a `llama`: Stoker's own layers run them.
FAMILY = ("llama", "qwen2", "qwen3")
#: That of all others -> how it is read.
MODELS: Mapping[str, GgufModel] = {
    "gemma": GgufModel("gemma", _gemma, norm_offset=1.0),
    "gemma2": GgufModel("gemma2", _gemma2, _GEMMA, norm_offset=1.0),
    "gemma3": GgufModel("gemma3_text", _gemma3, _GEMMA, norm_offset=1.0),
    "phi3": GgufModel("phi3", _phi3, _PHI3),
    "qwen2moe": GgufModel("qwen2_moe", _qwen2_moe, _QWEN_MOE),
    "qwen3moe": GgufModel("qwen3_moe", _qwen3_moe, _QWEN_MOE),
    "gpt-oss": GgufModel("gpt_oss", _gpt_oss, _GPT_OSS),
    "granite": GgufModel("granite", _granite, permuted=True),
    "smollm3": GgufModel("smollm3", _smollm3, permuted=True),
    "olmo2": GgufModel("olmo2", _olmo2, _GEMMA),
}
#: A `llama` with experts.
MIXTRAL = GgufModel("mixtral", _mixtral, _MIXTRAL, permuted=True)
#: Tensors that a config takes.
READ_BEFORE = ("rope_factors_long.weight", "rope_factors_short.weight")


def model_of(metadata: Mapping[str, Any]) -> GgufModel | None:
    """How a file is read; None if Stoker's own layers run it. Raises `ModelError` for an architecture that is not
    read."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in (*FAMILY, *MODELS):
        names = ", ".join((*FAMILY, *MODELS))
        raise ModelError(f"architecture {architecture!r} is not supported in GGUF; {names} are")
    if architecture == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    return MODELS.get(architecture)

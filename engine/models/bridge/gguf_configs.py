"""What a GGUF file says of an architecture beyond the Llama family, in the words of a config.json. No MLX.

The names and defaults are those of llama.cpp, its converters (`conversion/`) and its models (`src/models/`). A key that
nothing here asks for is refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.models.allowed import ANYTHING, Inert, Table
from engine.models.fields import Fields
from engine.weights.gguf import GGUF
from engine.weights.gguf_names import PARTS
from stoker.errors import ModelError

#: Keys that change nothing, and the values with which they do not.
_INERT: Inert = {
    **dict.fromkeys(("vocab_size", "rope.scaling.finetuned", "rope.scaling.original_context_length",
                     "attention.layer_norm_epsilon"), ANYTHING),
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,), "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip


class _Recorded(Mapping[str, Any]):
    """Remembers what it was asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


class Keys(Fields):
    """The keys of one architecture, asked for without its name before them."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._start = f"{architecture}."
        own = {key: value for key, value in metadata.items() if key.startswith(self._start)}
        self._recorded = _Recorded(own)
        super().__init__(self._recorded, "GGUF metadata")

    def get(self, name: str) -> Any:
        return self._recorded.get(self._start + name)

    def count(self, name: str, default: int | None = None) -> int:
        return super().count(self._start + name, default)

    def index(self, name: str, default: int) -> int:
        return super().index(self._start + name, default)

    def number(self, name: str, default: float | None = None) -> float:
        return super().number(self._start + name, default)

    def only(self, name: str, allowed: object) -> None:
        super().only(self._start + name, allowed)

    def refuse(self, name: str, why: str) -> ModelError:
        value = str(self.get(name))[:100]
        return ModelError(f"{self._where}: {self._start}{name} = {value} is not supported: {why}")

    def finish(self) -> None:
        """Raise `ModelError` for a key that nothing asked for and that could change something."""
        inert = {self._start + name: values for name, values in _INERT.items()}
        Table(self._recorded.asked, inert).check(self._recorded.values_, self._where)


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


def config_of(gguf: GGUF, model: GgufModel) -> dict[str, Any]:
    """The config.json of a file. Raises `ModelError` naming a key."""
    keys = Keys(gguf.metadata, gguf.metadata["general.architecture"])
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{gguf.path}: the tensor 'token_embd.weight' is missing or no matrix")
    dim, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", dim // heads)
    keys.only("attention.value_length", head_dim)
    sizes: dict[str, Any] = {
        "model_type": model.file,
        "vocab_size": embedding.shape[0],
        "hidden_size": dim,
        "num_hidden_layers": keys.count("block_count"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.count("context_length"),
        "rope_theta": keys.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    config = {**sizes, **model.details(keys, gguf, sizes)}
    if "partial_rotary_factor" not in config:
        keys.only("rope.dimension_count", head_dim)
    keys.finish()
    return config


def _scaling(keys: Keys, *kinds: str) -> dict[str, Any] | None:
    """`rope_scaling`, of one of these kinds."""
    kind, factor = keys.get("rope.scaling.type") or "none", keys.number("rope.scale_linear", 1.0)
    if kind == "none":
        kind = "linear" if factor != 1.0 else kind
    else:
        factor = keys.number("rope.scaling.factor", factor)
    if kind == "none":
        return None
    if kind not in kinds:
        raise keys.refuse("rope.scaling.type", f"{' and '.join(('none', *kinds))} are for this architecture")
    scaling = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys.count("rope.scaling.original_context_length")
        scaling["beta_fast"] = keys.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    return scaling


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
        "rope_scaling": _scaling(keys, "linear"),
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


_GEMMA = {
    **PARTS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


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
        "rope_scaling": _scaling(keys, "linear"),
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
        "rope_scaling": _scaling(keys, "linear", "yarn"),
    }


def _gpt_oss(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    keys.only("attention.sliding_window_pattern", 2)
    keys.only("rope.freq_base_swa", sizes["rope_theta"])
    scaling = _scaling(keys, "yarn")
    return {
        **_experts(keys),
        "intermediate_size": keys.count("expert_feed_forward_length", sizes["intermediate_size"]),
        "sliding_window": keys.count("attention.sliding_window"),
        # The model's own; no key says it.
        "rope_scaling": None if scaling is None else {**scaling, "truncate": False},
    }


def _mixtral(keys: Keys, gguf: GGUF, sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    # Older files have the experts' size under both names.
    keys.only("expert_feed_forward_length", sizes["intermediate_size"])
    return {**_experts(keys), "rope_scaling": _scaling(keys, "linear")}


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

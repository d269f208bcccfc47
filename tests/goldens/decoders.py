"""Tiny random checkpoints of decoders that run through mlx-lm's model files, and what torch transformers computes.

Every parameter is random. Each row is run by itself in float32, eager, without padding or cache.

    .venv-peers/bin/python tests/goldens/decoders.py
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from architectures import SIZES as PLAIN
from architectures import VOCABULARY
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

#: Tokens of the rows: over several windows of 8 and longer than the context of 32 that RoPE was scaled from; and short.
LENGTHS = (48, 13)
#: Both are long, because transformers takes other factors for short texts, where mlx-lm takes one kind for all.
LONG = {"phi3-longrope": (48, 40)}
#: As `architectures.py` has them, except that gate and up are of a size that no other matrix has.
SIZES: dict[str, Any] = {**PLAIN, "intermediate_size": 48}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
LATENT = {
    **ROUTED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
DEEPSEEK_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 4.0, 8.0],
}


def plain(base: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base, **more}


def by_kind(local: float, base: float, **more: Any) -> dict[str, Any]:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": base}
    return {"sliding_attention": plain(local), "full_attention": scaled if more else plain(base)}


#: Name -> (model_type, what its config has besides `SIZES`).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": (
        "gemma2",
        {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0,
         "final_logit_softcapping": 4.0, "rope_parameters": plain(1000.0)},
    ),
    "gemma3_text": (
        "gemma3_text",
        {"num_hidden_layers": 3, "hidden_size": 16, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 20,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window_pattern": 3,
         "rope_parameters": by_kind(100.0, 5000.0)},
    ),
    "gemma3_text-linear": (
        "gemma3_text",
        {"num_hidden_layers": 3, "hidden_size": 16, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 20,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window_pattern": 3,
         "rope_parameters": by_kind(100.0, 5000.0, factor=4.0)},
    ),
    "phi3": ("phi3", {"rope_parameters": plain(1000.0)}),
    "phi3-window": ("phi3", {"sliding_window": 8, "rope_parameters": plain(1000.0)}),
    "phi3-partial": (
        "phi3", {"partial_rotary_factor": 0.5, "rope_parameters": plain(1000.0, partial_rotary_factor=0.5)}
    ),
    "phi3-longrope": (
        "phi3",
        {"original_max_position_embeddings": 32,
         "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}},
    ),
    "phi3-short": (
        "phi3",
        {"max_position_embeddings": 64, "original_max_position_embeddings": 64,
         "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64}},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 24, "norm_topk_prob": False, "rope_parameters": plain(1000.0)},
    ),
    "qwen3_moe": (
        "qwen3_moe", {**EXPERTS, "head_dim": 8, "norm_topk_prob": True, "rope_parameters": plain(1000.0)}
    ),
    "qwen3_moe-dense": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 8, "norm_topk_prob": False, "mlp_only_layers": [0], "rope_parameters": YARN},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "num_local_experts": 4, "intermediate_size": 24, "num_experts_per_tok": 2, "sliding_window": 8,
         "rope_parameters": {**YARN, "truncate": False}},
    ),
    "glm4": (
        "glm4",
        {"head_dim": 8, "attention_bias": True, "partial_rotary_factor": 0.5,
         "rope_parameters": plain(1000.0, partial_rotary_factor=0.5)},
    ),
    "glm4_moe": (
        "glm4_moe",
        {**ROUTED, "head_dim": 8, "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
         "routed_scaling_factor": 1.5, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
         "partial_rotary_factor": 0.5, "rope_parameters": plain(1000.0, partial_rotary_factor=0.5)},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
         "norm_topk_prob": False, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v2-lite": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
         "norm_topk_prob": False, "rope_parameters": plain(1000.0)},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
         "rope_parameters": DEEPSEEK_YARN},
    ),
    "mixtral": (
        "mixtral", {"num_local_experts": 4, "intermediate_size": 24, "num_experts_per_tok": 2, "rope_parameters": plain(1000.0)}  # noqa: E501
    ),
    "mixtral-window": (
        "mixtral",
        {"num_local_experts": 4, "intermediate_size": 24, "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": plain(1000.0)},  # noqa: E501
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
         "attention_bias": True, "mlp_bias": True, "rope_parameters": plain(1000.0)},
    ),
    "olmo2": ("olmo2", {"rope_parameters": plain(1000.0)}),
    "olmo2-llama3": ("olmo2", {"rope_parameters": LLAMA3}),
    "smollm3": (
        "smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "rope_parameters": plain(1000.0)}
    ),
    "smollm3-yarn": ("smollm3", {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "rope_parameters": YARN}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "conv_bias": True, "block_multiple_of": 8,
         "block_auto_adjust_ff_dim": True, "rope_parameters": plain(1000.0)},
    ),
    "starcoder2": (
        "starcoder2", {"use_bias": True, "sliding_window": None, "rope_parameters": plain(1000.0)}
    ),
    "starcoder2-window": (
        "starcoder2", {"use_bias": True, "sliding_window": 8, "rope_parameters": plain(1000.0)}
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": False, "rope_parameters": plain(1000.0)}),
    "cohere-norms": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True, "rope_parameters": plain(1000.0)}),
    "cohere2": (
        "cohere2",
        {"logit_scale": 0.25, "sliding_window": 8, "head_dim": 8,
         "layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": 2,
         "rope_parameters": plain(1000.0)},
    ),
}  # fmt: skip


def main(here: Path) -> None:
    home = here / "decoders"
    asked = sys.argv[1:] or list(CASES)
    home.mkdir(exist_ok=True)
    for name in asked:
        shutil.rmtree(home / name, ignore_errors=True)
        kind, fields = CASES[name]
        generator = torch.Generator().manual_seed(7)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **fields}), dtype="float32")
        model = model.eval().requires_grad_(False)
        model.set_attn_implementation("eager")
        randomise(model, generator)
        model.save_pretrained(home / name)
        (home / name / "generation_config.json").unlink(missing_ok=True)
        arrays: dict[str, np.ndarray] = {}
        for row, tokens in enumerate(rows(generator, LONG.get(name, LENGTHS))):
            arrays[f"tokens.{row}"] = tokens.numpy().astype(np.int32)
            arrays[f"logits.{row}"] = logits(model, tokens)
        np.savez_compressed(home / name / "logits.npz", **arrays)
        print(name, {len(value): float(np.abs(value).max()) for key, value in arrays.items() if "logits" in key})
    (here / "decoders.json").write_text(
        json.dumps({"made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
                    "checkpoints": list(CASES)}, indent=1) + "\n"
    )  # fmt: skip


def rows(generator: torch.Generator, lengths: tuple[int, ...]) -> Iterator[torch.Tensor]:
    for length in lengths:
        yield torch.randint(4, VOCABULARY, (length,), generator=generator)


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights large enough that attention looks somewhere; norms about 1, biases about 0; routers' biases too."""
    tensors = [*model.named_parameters(), *((name, each) for name, each in model.named_buffers() if "bias" in name)]
    for name, parameter in tensors:
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            scale = 1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale)
        else:
            parameter.copy_(noise * 0.3 + (1.0 if "norm" in name.lower() and not name.endswith("bias") else 0.0))


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    found: np.ndarray = model(tokens[None], use_cache=False).logits[0].numpy()
    return found


if __name__ == "__main__":
    main(Path(__file__).parent)

"""Tiny configurations for mlx-lm's model files: one set of sizes for all, and what each needs of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.models.bridge import package

VOCAB = 67
#: Under every name that a file has for it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "model_dim": 32, "n_inner": 48,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "num_transformer_layers": 4,
    "intermediate_size": 48, "ffn_hidden_size": 48, "ffn_dim": 48, "expert_ffn_hidden_size": 16,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "num_key_value_heads": 2, "multi_query": True, "head_dim": 8, "num_kv_heads": 2, "num_query_heads": 4,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256, "max_sequence_length": 256,
    "context_length": 256, "seq_length": 256,
    "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5, "norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "rope_theta": 10_000.0, "rotary_emb_base": 10_000, "rotary_dim": 4, "rotary_pct": 0.5,
    "partial_rotary_factor": 0.5, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "use_bias": False, "bias": False, "use_qkv_bias": False, "qkv_bias": False, "add_bias_linear": False,
    "no_bias": True, "use_qk_norm": True, "clip_qkv": None,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "moe_topk": 2,
    "top_k": 2, "moe_top_k": 2, "num_shared_experts": 1, "num_experts_per_token": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_layer_freq": 1, "routed_scaling_factor": 1.0, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "score_function": "sigmoid", "moe_k": 2, "num_dense_layers": 1,
    "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "sliding_window": 8, "sliding_window_size": 8, "sliding_window_pattern": 2, "attention_chunk_size": 8,
    "logit_scale": 0.5, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8,
    "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "state_size": 4, "conv_kernel": 3, "mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_dt_rank": 4,
    "time_step_rank": 4, "time_step_limit": [0.0, 100.0], "ssm_state_size": 8, "chunk_size": 16, "expand": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "full_attention_interval": 2,
}  # fmt: skip

_SLIDING = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "full_attention"] * 2
_PLAIN_ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
_YARN = {
    "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0,
    "mscale_all_dim": 0.7, "rope_theta": 10_000.0,
}  # fmt: skip
_CONV = {"conv_bias": True, "conv_L_cache": 3, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_MAMBA = {
    "use_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
}
_GROUPED = {"layer_group_size": 2, "group_norm_size": 1, "moe_intermediate_size": 16, "rope_interleave": True}
_LONGCAT = {
    "attention_method": "MLA", "zero_expert_type": "identity", "zero_expert_num": 2, "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True, "num_layers": 2,
}  # fmt: skip
_INDEXED = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "rope_parameters": _PLAIN_ROPE}
#: Model file -> what it needs beyond `SIZES`, or another value; None takes a size away.
OWN: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 32, "num_kv_reuse_layers": 1},
    "afmoe": {"layer_types": _SLIDING},
    "apertus": {"post_norm": False, "qk_norm": True, "hidden_act": "xielu"},
    "baichuan_m1": {"sliding_window_layers": [1, 3], "conv_window": 2},
    "bailing_hybrid": {**_GROUPED},
    "bailing_moe_linear": {**_GROUPED, "num_key_value_heads": 4},
    "deepseek_v2": {"rope_scaling": _YARN, "topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": {"rope_scaling": _YARN},
    "deepseek_v32": {**_INDEXED, "num_key_value_heads": 4},
    "exaone4": {"rope_scaling": _PLAIN_ROPE, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _SLIDING, "is_moe_layer": [False, True, True, True]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    "gear": {"layer_types": ["conv", "full_attention", "conv", "sliding_attention"]},
    "gemma3": {
        "nested": {"sliding_window_pattern": 2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        "vocab_size": VOCAB,
    },
    "gemma3n": {"nested": {
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "rope_local_base_freq": 10_000.0,
        "layer_types": _SLIDING, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 3, "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0,
        "laurel_rank": 4,
    }},
    "gemma4": {"vocab_size": VOCAB,
               "nested": {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 16,
                          "hidden_size_per_layer_input": 8, "num_global_key_value_heads": 1}},
    "gemma4_text": {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB, "global_head_dim": 16,
                    "hidden_size_per_layer_input": 8, "num_global_key_value_heads": 1},
    "glm4_moe": {"rope_scaling": _PLAIN_ROPE},
    "glm_moe_dsa": {**_INDEXED, "num_key_value_heads": 4},
    "gpt_oss": {"intermediate_size": 64},
    "gpt2": {"num_key_value_heads": None},
    "gpt_bigcode": {"num_key_value_heads": None},
    "granitemoehybrid": {**_MAMBA, "mamba_n_groups": 2, "shared_intermediate_size": 16,
                         "layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "alpha": 10.0, "factor": 1.0}, "num_shared_expert": 1,
                "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "kimi_k25": {"nested": {"rope_scaling": _YARN}},
    "kimi_k3": {"nested": {
        "mla_use_output_gate": True, "num_key_value_heads": 4, "routed_expert_hidden_size": 16,
        "latent_moe_use_norm": True, "attn_res_block_size": 2, "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 4.0, "hidden_act": "situ",
        "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 8,
                               "short_conv_kernel_size": 3},
    }},
    "kimi_linear": {
        "model_max_length": 256, "num_key_value_heads": 4,
        "linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 8,
                               "short_conv_kernel_size": 3},
    },
    "kimi_vl": {"nested": {}},
    "lfm2": {**_CONV, "block_dim": 32, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_ff_dim": 48,
             "block_auto_adjust_ff_dim": False},
    "lfm2-vl": {"nested": {**_CONV, "block_dim": 32, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
                           "block_ff_dim": 48, "block_auto_adjust_ff_dim": False, "model_type": "lfm2"}},
    "lfm2_moe": {**_CONV, "use_expert_bias": True},
    "lille-130m": {"block_size": 256, "n_kv_heads": 2, "n_embd": 96},
    "llama4": {"nested": {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}},
    "llama4_text": {"intermediate_size_mlp": 48, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {**_LONGCAT},
    "longcat_flash_ngram": {**_LONGCAT, "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 2, "emb_split_num": 2},
    "mamba": {"use_conv_bias": True, "intermediate_size": 64},
    "mamba2": {"use_conv_bias": True, "head_dim": 16, "intermediate_size": 64},
    "mellum": {"layer_types": _SLIDING,
               "rope_parameters": {"sliding_attention": _PLAIN_ROPE, "full_attention": _PLAIN_ROPE}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [1, 0, 1, 0], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "moe_layer_freq": [0, 1, 1, 1],
        "swa_rope_theta": 1000.0, "swa_num_attention_heads": 4, "swa_head_dim": 8,
        "swa_num_key_value_heads": 1, "swa_v_head_dim": 4,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0},
    "minicpm3": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0,
                 "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0] * 4,
                                  "long_factor": [2.0] * 4}},
    "minimax": {"shared_intermediate_size": 16},
    "ministral3": {"rope_parameters": {**_PLAIN_ROPE, "llama_4_scaling_beta": 0.1,
                                       "original_max_position_embeddings": 16},
                   "layer_types": _SLIDING},
    "mistral3": {"nested": {"model_type": "ministral3", "layer_types": _SLIDING,
                            "rope_parameters": {**_PLAIN_ROPE, "llama_4_scaling_beta": 0.1,
                                                "original_max_position_embeddings": 16}}},
    "mistral4": {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1}},
    "muse_glimmer": {},
    "muse_spark": {"nested": {
        "post_norm_eps": 1e-5, "rope_parameters": _PLAIN_ROPE, "layer_rope_theta": [10_000.0, 0, 10_000.0, 0],
        "layer_types": _SLIDING, "output_multiplier": 0.5, "moe_hidden_size": 16, "num_shared_experts": None,
    }},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"num_hidden_layers": 2, "block_configs": [
        {"attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
         "ffn": {"ffn_mult": 1.5, "no_op": False, "replace_with_linear": False}},
        {"attention": {"no_op": False, "replace_with_linear": True, "n_heads_in_group": None},
         "ffn": {"ffn_mult": None, "no_op": False, "replace_with_linear": True}},
    ]},
    "nemotron_h": {**_MAMBA, "hybrid_override_pattern": ["M", "*", "-", "E"],
                   "moe_shared_expert_intermediate_size": 16},
    "nanochat": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "olmo_hybrid": {"layer_types": _HYBRID, "linear_allow_neg_eigval": True, "linear_num_key_heads": 4},
    "olmo3": {"layer_types": _SLIDING},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [1.0] * 4,
                "ffn_dim_divisor": 8},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0]},
             "original_max_position_embeddings": 64},
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 48, "gegelu_limit": 20.0,
                  "blocksparse_block_size": 32, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 2},
    "phimoe": {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5] * 4,
                                "short_mscale": 1.0, "long_mscale": 1.1}},
    "phixtral": {"num_vocab": VOCAB},
    "pixtral": {"nested": {"model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo3": {"window_size": 8},
    "qwen": {"kv_channels": 8, "intermediate_size": 96},
    "qwen2_vl": {"nested": {"model_type": "qwen2"}},
    "qwen3_5": {"nested": {"rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 0.5, "type": "default"},
                           "num_experts": 0}},
    "qwen3_5_moe": {"nested": {"rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 0.5, "type": "default"}}},
    "qwen3_vl": {"nested": {"model_type": "qwen3"}},
    "qwen3_vl_moe": {"nested": {"model_type": "qwen3_moe"}},
    "recurrent_gemma": {"conv1d_width": 3, "logits_soft_cap": 30.0, "attention_window_size": 8,
                        "block_types": ["recurrent", "attention"]},
    "rwkv7": {"a_low_rank_dim": 4, "v_low_rank_dim": 4, "gate_low_rank_dim": 4, "decay_low_rank_dim": 4},
    "smollm3": {"no_rope_layer_interval": 2},
    "spark2_5": {"layer_types": _SLIDING, "hidden_act": "gelu",
                 "rope_parameters": {"sliding_attention": _PLAIN_ROPE, "full_attention": _PLAIN_ROPE}},
    "step3p5": {"num_attention_groups": 2, "layer_types": _SLIDING, "share_expert_dim": 16, "moe_layers_enum": "1,2,3",
                "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2}},
    "talkie": {"num_attention_heads": 4},
}  # fmt: skip


#: Those with a `text_config` that take a window.
_WINDOWS = ("gemma3", "gemma3n", "gemma4", "mistral3", "muse_spark")


def config(name: str) -> dict[str, Any]:
    """A config.json for the model file `name`."""
    own = OWN.get(name, {})
    nested = own.get("nested")
    if nested is not None:
        text = {"model_type": name, **SIZES, **nested}
        if name not in _WINDOWS:
            # A window that a model file passes over bounds the context.
            text["sliding_window"] = None
        kept = {key: value for key, value in own.items() if key != "nested"}
        return {
            "model_type": name,
            **kept,
            "text_config": {key: value for key, value in text.items() if value is not None},
        }
    merged = {"model_type": name, **SIZES, **own}
    known = {field.name for field in dataclasses.fields(package.load(name).ModelArgs)}
    return {key: value for key, value in merged.items() if value is not None and (key in known or key == "model_type")}

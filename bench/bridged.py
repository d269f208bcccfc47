"""Shapes of architectures that run through mlx-lm's model files, for `bench.generate --shape`. Nothing is imported."""

from __future__ import annotations

from typing import Any

#: Architectures that run through mlx-lm's model files: Gemma 3 270M (windows, two rotary bases, a large vocabulary),
#: one of Phi-3's layout (fused projections), and a mixture of experts of Qwen3's layout; the last two of half a billion
#: parameters.
BRIDGED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "sliding_window_pattern": 6, "hidden_activation": "gelu_pytorch_tanh",
    },
    "phi3": {
        "model_type": "phi3", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32_064,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
    },
}  # fmt: skip

"""The decoders that most people run, through mlx-lm's model files, against torch transformers."""

from __future__ import annotations

from typing import Any

import pytest

from stoker.errors import ModelError
from tests.engine import decoder_goldens

#: One of each thing that mlx-lm passes over or names otherwise.
QUICK = ("gemma3_text-linear", "phi3-short", "phi3-longrope", "qwen3_moe-dense", "gpt_oss", "deepseek_v3",
         "smollm3-yarn", "starcoder2", "lfm2", "gemma2")  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_logits_are_those_of_transformers_at_every_position(name: str) -> None:
    decoder_goldens.check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in decoder_goldens.NAMES if name not in QUICK])
def test_logits_of_every_other_golden_are_those_of_transformers(name: str) -> None:
    decoder_goldens.check(name)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob = true is not supported: mlx-lm computes false"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported: mlx-lm computes \[\]"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 3}, "layer_types = .* are not supported: mlx-lm has"),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
                }
            },
            'sliding_attention: rope_type = "linear" is not supported',
        ),
        (
            "starcoder2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            'rope_parameters: rope_type = "yarn" is not supported',
        ),
        (
            "olmo2",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        (
            "olmo2",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e3}}},
            "full_attention, sliding_attention differ",
        ),
    ],
)
def test_what_mlx_lm_would_compute_otherwise_than_transformers_is_refused_by_name(
    name: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        decoder_goldens.opened(name, **fields)

"""Tiny random checkpoints of every architecture, with all their odd features on, and what transformers computes.

Every parameter is random, biases and norms too, so that none can be forgotten unseen. Each row is run by itself in
float32, without padding or cache: what ours must agree with, however it batches.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 64
#: Special tokens have the same ids everywhere; 1 is MPNet's padding, whose id its code takes for granted.
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
#: Tokens of the decoders' rows: over several windows of 8, and of uneven length.
LENGTHS = (40, 9, 23)
#: Tokens of the encoders' rows: the first reaches past MPNet's last bucket (128 tokens apart).
ENCODER_LENGTHS = (150, 1, 37)

#: Of every decoder: grouped queries.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
ENCODER_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}


def plain(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}


#: Original context 32: of the four frequencies of a head of 8 one is kept, one blended, two divided.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def checkpoints() -> dict[str, PreTrainedModel]:
    return {
        "qwen2-tied": Qwen2ForCausalLM(
            Qwen2Config(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_parameters=plain(1e6))
        ),
        "qwen2-untied": Qwen2ForCausalLM(
            Qwen2Config(**SIZES, tie_word_embeddings=False, rms_norm_eps=1e-3, rope_parameters=plain(1e4))
        ),
        "qwen3": Qwen3ForCausalLM(
            Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True, rope_parameters=plain(1e6))
        ),
        "llama-llama3": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3)),
        "llama-linear": LlamaForCausalLM(
            LlamaConfig(
                **{**SIZES, "num_key_value_heads": 4},
                head_dim=10,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
            )
        ),
        "mistral": MistralForCausalLM(
            MistralConfig(**SIZES, head_dim=8, sliding_window=8, rms_norm_eps=1e-5, rope_parameters=plain(1e4))
        ),
        "bert": BertModel(BertConfig(**ENCODER_SIZES, max_position_embeddings=160, layer_norm_eps=1e-3)),
        "mpnet": MPNetModel(MPNetConfig(**ENCODER_SIZES, max_position_embeddings=162, layer_norm_eps=1e-5)),
    }


#: Stored in shards of this many bytes, or in 16 bits.
SHARDED = {"qwen2-untied": 40_000}
HALVED = {"qwen2-tied": torch.bfloat16, "qwen3": torch.float16, "bert": torch.float16}


def make(here: Path, made_with: dict[str, str]) -> str:
    home = here / "architectures"
    shutil.rmtree(home, ignore_errors=True)
    generator = torch.Generator().manual_seed(5)
    arrays: dict[str, np.ndarray] = {}
    names = []
    for name, model in checkpoints().items():
        model = model.eval().requires_grad_(False)
        model.set_attn_implementation("eager")
        randomise(model, generator)
        save(model, home / name, name)
        tokenizer().save(str(home / name / "tokenizer.json"))
        lengths = ENCODER_LENGTHS if name in ("bert", "mpnet") else LENGTHS
        for row, length in enumerate(lengths):
            tokens = torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator)
            arrays[f"{name}.tokens.{row}"] = tokens.numpy().astype(np.int32)
            arrays[f"{name}.output.{row}"] = output(model, tokens)
        names.append(name)
    check_window(home / "mistral", arrays["mistral.tokens.0"], arrays["mistral.output.0"])
    np.savez_compressed(here / "architectures.npz", **arrays)
    (here / "architectures.json").write_text(
        json.dumps({"made_with": made_with, "checkpoints": names}, indent=1) + "\n"
    )
    return f"architectures: {', '.join(names)}"


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights large enough that attention looks somewhere; norms about 1, biases about 0."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            scale = 1.0 if "embed" in name or "relative" in name else 1.5 * parameter.shape[1] ** -0.5
            parameter.copy_(noise * scale)
        else:
            parameter.copy_(noise * 0.3 + (1.0 if name.endswith("norm.weight") or "Norm.weight" in name else 0.0))


def save(model: PreTrainedModel, folder: Path, name: str) -> None:
    """In 16 bits if so listed: the model's own parameters are then rounded too, but computed with in float32."""
    stored = model
    if name in HALVED:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(HALVED[name]))
        # A copy: `to` would round the rotary frequencies as well.
        stored = copy.deepcopy(model).to(HALVED[name])
    stored.save_pretrained(folder, max_shard_size=SHARDED.get(name, "1GB"))


@torch.inference_mode()
def output(model: PreTrainedModel, tokens: torch.Tensor) -> np.ndarray:
    """Logits (T, vocabulary) of a decoder, hidden states (T, dim) of an encoder."""
    result = model(tokens[None])
    return (result.logits if hasattr(result, "logits") else result.last_hidden_state)[0].numpy()


def check_window(folder: Path, tokens: np.ndarray, whole: np.ndarray) -> None:
    """Stop unless the window makes a difference from position 8 on, and none before."""
    config = MistralConfig.from_pretrained(folder, sliding_window=None)
    model = MistralForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    difference = np.abs(output(model, torch.from_numpy(tokens).long()) - whole).max(axis=-1)
    if difference[:8].max() > 1e-4 or difference[8:].min() < 1e-3:
        raise SystemExit(f"architectures: the sliding window is not what the oracle computed: {difference}")


def tokenizer() -> Tokenizer:
    """A byte-level BPE of 64 tokens, made of a sentence."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator(["a stoker keeps the furnace hot, and a warm model answers at once"], trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made

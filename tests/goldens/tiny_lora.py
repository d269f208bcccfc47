"""A LoRA run on a tiny random Llama, in plain torch: what the trainer's losses, norms and matrices must come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA = 4, 8.0
STEPS, ROWS = 8, 3
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP = 5e-3, 3, 0.01, 1.5
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoraLinear(torch.nn.Module):
    """y = x W + (alpha / rank) · (x A) B, with W frozen."""

    def __init__(self, base: torch.nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        bound = base.in_features**-0.5
        start = (torch.rand(base.in_features, RANK, generator=generator) * 2 - 1) * bound
        self.a = torch.nn.Parameter(start)
        self.b = torch.nn.Parameter(torch.zeros(RANK, base.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + (ALPHA / RANK) * ((x @ self.a) @ self.b)


def make(here: Path, made_with: dict[str, str]) -> str:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = tiny_llama()
    folder = here / "tiny-llama"
    folder.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_diff_dict(), indent=1, sort_keys=True) + "\n")

    batches = [random_rows(generator), random_rows(generator)] * (STEPS // 2)
    probe = torch.tensor([batches[0][0]["tokens"]])
    with torch.inference_mode():
        arrays = {"logits_before": model(probe).logits[0].numpy().copy()}
    layers = add_lora(model, generator)
    for name, layer in layers.items():
        arrays[f"start.{name}.a"] = layer.a.detach().numpy().copy()

    reports = list(train(model, layers, batches))
    for name, layer in layers.items():
        arrays[f"end.{name}.a"] = layer.a.detach().numpy()
        arrays[f"end.{name}.b"] = layer.b.detach().numpy()
    with torch.inference_mode():
        arrays["logits_after"] = model(probe).logits[0].numpy()
    np.savez_compressed(here / "tiny_lora.npz", **arrays)
    content = {
        "rank": RANK,
        "alpha": ALPHA,
        "targets": TARGETS,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP_STEPS,
        "weight_decay": WEIGHT_DECAY,
        "clip": CLIP,
        "made_with": made_with,
        "probe": batches[0][0]["tokens"],
        "batches": batches,
        "reports": reports,
    }
    (here / "tiny_lora.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    clipped = sum(report["gradient_norm"] > CLIP for report in reports)
    if not 0 < clipped < STEPS:
        raise SystemExit(f"tiny lora: {clipped} of {STEPS} steps are clipped; some must be, and some not")
    return f"tiny lora: loss {reports[0]['loss']:.3f} to {reports[-1]['loss']:.3f}, {clipped} of {STEPS} steps clipped"


def tiny_llama() -> LlamaForCausalLM:
    """Grouped queries, an output head of its own; weights large enough that attention looks somewhere."""
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(torch.float32).eval().requires_grad_(False)


def random_rows(generator: torch.Generator) -> list[dict[str, Any]]:
    """Rows of uneven length; the loss counts `tokens[start:]`."""
    rows = []
    for _ in range(ROWS):
        length = int(torch.randint(6, 20, (), generator=generator))
        tokens = torch.randint(3, 61, (length,), generator=generator).tolist()
        rows.append({"tokens": [*tokens, 2], "start": int(torch.randint(1, 5, (), generator=generator))})
    return rows


def add_lora(model: LlamaForCausalLM, generator: torch.Generator) -> dict[str, LoraLinear]:
    layers = {}
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in TARGETS:
            layers[name] = LoraLinear(module, generator)
            setattr(model.get_submodule(parent), last, layers[name])
    return layers


def train(model: LlamaForCausalLM, layers: dict[str, LoraLinear], batches: list[list[dict[str, Any]]]) -> Any:
    """AdamW with bias correction, linear warm-up to a constant rate, clipping to a global norm."""
    parameters = [matrix for layer in layers.values() for matrix in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.999), eps=1e-8)
    for step, rows in enumerate(batches):
        rate = LEARNING_RATE * min(1.0, (step + 1) / (WARMUP_STEPS + 1))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(model, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        yield {"step": step + 1, "loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate}


def loss_of(model: LlamaForCausalLM, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Mean cross-entropy over all targets of the batch, each row run by itself: no padding can leak in."""
    losses = []
    for row in rows:
        tokens = torch.tensor([row["tokens"]])
        logits = model(tokens[:, :-1]).logits[0, row["start"] - 1 :]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, row["start"] :], reduction="none"))
    return torch.cat(losses).mean()

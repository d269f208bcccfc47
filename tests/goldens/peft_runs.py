"""Training runs of torch with peft on the tiny random Llama, and adapters as peft saves them. `make goldens-peft`.

For each of `RUNS`: the matrices it starts from, its batches, its losses and norms, step by step; the folder that peft
writes at the end, and the logits that peft gives with it.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
BASE, OUT = HERE / "tiny-llama", HERE / "peft"
STEPS, ROWS = 30, 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
SHARED = {"rank": 4, "alpha": 8.0, "learning_rate": 1e-2, "warmup_steps": 4, "weight_decay": 0.01, "clip": 1.0}
#: In the terms of `TrainRequest`.
RUNS: dict[str, dict[str, Any]] = {
    "lora": {"targets": EVERYTHING, "schedule": "cosine"},
    "dora": {"targets": EVERYTHING, "dora": True, "schedule": "linear"},
    "lora-accumulation": {"targets": ATTENTION, "accumulation": 2, "rslora": True},
    "dora-smoothing": {"targets": ATTENTION, "dora": True, "accumulation": 2, "label_smoothing": 0.1},
}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    made_with = {name: version(name) for name in ("torch", "transformers", "peft")}
    for number, (name, options) in enumerate(RUNS.items()):
        run = {"label_smoothing": 0.0, "accumulation": 1, "schedule": "constant", **SHARED, **options}
        record, made = make(run, OUT / name, seed=number)
        arrays: dict[str, Any] = made
        (OUT / f"{name}.json").write_text(json.dumps({"made_with": made_with, **record}) + "\n")
        np.savez_compressed(OUT / f"{name}.npz", **arrays)
        losses = [report["loss"] for report in record["reports"]]
        print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}")


def make(run: dict[str, Any], folder: Path, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = base()
    config = LoraConfig(
        r=run["rank"],
        lora_alpha=run["alpha"],
        target_modules=run["targets"],
        use_dora=run.get("dora", False),
        use_rslora=run.get("rslora", False),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, config)
    arrays = {f"start.{name}.a": value for name, value in matrices(tuned, "lora_A").items()}
    few = [[rows(generator) for _ in range(run["accumulation"])] for _ in range(3)]
    # Seen again and again, so that there is something to learn.
    batches = [few[step % len(few)] for step in range(STEPS)]
    reports = list(train(tuned, run, batches))
    probe = torch.tensor([batches[0][0][0]["tokens"]])
    with torch.inference_mode():
        arrays["logits"] = tuned(probe).logits[0].numpy()
    tuned.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return {"run": run, "probe": probe[0].tolist(), "batches": batches, "reports": reports}, arrays


def base() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**json.loads((BASE / "config.json").read_text())))
    model.load_state_dict(load_file(BASE / "model.safetensors"))
    return model.to(torch.float32).eval()


def matrices(model: Any, part: str) -> dict[str, np.ndarray]:
    """By the layer's name; laid out (in, rank)."""
    return {
        name.split(f".{part}.")[0].removeprefix("base_model.model.model."): value.detach().numpy().T.copy()
        for name, value in model.named_parameters()
        if f".{part}." in name
    }


def rows(generator: torch.Generator) -> list[dict[str, Any]]:
    """Rows of uneven length; the loss counts `tokens[start:]`."""
    found = []
    for _ in range(ROWS):
        length = int(torch.randint(6, 20, (), generator=generator))
        tokens = torch.randint(3, 61, (length,), generator=generator).tolist()
        found.append({"tokens": [*tokens, 2], "start": int(torch.randint(1, 5, (), generator=generator))})
    return found


def rate_of(run: dict[str, Any], step: int) -> float:
    """What a person would write for these schedules: up to the peak in warmup_steps + 1 steps, then as named to 0."""
    if step < run["warmup_steps"]:
        return float(run["learning_rate"] * (step + 1) / (run["warmup_steps"] + 1))
    done = (step - run["warmup_steps"]) / (STEPS - run["warmup_steps"])
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + float(np.cos(np.pi * done)))}
    return float(run["learning_rate"] * shape[run["schedule"]])


def train(model: Any, run: dict[str, Any], batches: list[Any]) -> Any:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=run["learning_rate"], weight_decay=run["weight_decay"], betas=(0.9, 0.999), eps=1e-8
    )
    for step, parts in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate_of(run, step)
        optimizer.zero_grad()
        # All rows of the step as one batch: what accumulation has to equal.
        losses = [row_losses(model, row, run["label_smoothing"]) for part in parts for row in part]
        loss = torch.cat(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, run["clip"])
        optimizer.step()
        yield {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate_of(run, step)}


def row_losses(model: Any, row: dict[str, Any], smoothing: float) -> torch.Tensor:
    """Each row by itself: no padding can leak in."""
    tokens = torch.tensor([row["tokens"]])
    logits = model(tokens[:, :-1]).logits[0, row["start"] - 1 :]
    return torch.nn.functional.cross_entropy(
        logits, tokens[0, row["start"] :], reduction="none", label_smoothing=smoothing
    )


if __name__ == "__main__":
    main()

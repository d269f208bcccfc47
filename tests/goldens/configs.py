"""What transformers computes of the checkpoints in `architectures/` when their configs or tensors are said otherwise.

Each case is a checkpoint, the fields of its config.json that are changed, and what is done to its tensors.
`configs.json` holds the first two, `configs.npz` the logits or hidden states of the last positions of the checkpoint's
first row.
`python tests/goldens/configs.py` makes both; `make goldens` does too.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

#: Positions that are kept, from the end.
LAST = 8
ENCODERS = ("bert", "mpnet")
OLDER: dict[str, Any] = {"rope_parameters": None, "rope_theta": 10_000.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
NEWER = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}

#: Case -> (checkpoint, changed fields).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": ("qwen2-untied", {**OLDER, "rope_scaling": YARN}),
    "yarn-factor": ("qwen2-untied", {**OLDER, "rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 3.0}}),
    "yarn-mscale": ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.5, "mscale_all_dim": 0.5}}),
    "yarn-not-truncated": ("llama-llama3", {"rope_parameters": {**YARN, "rope_theta": 1e4, "truncate": False}}),
    "yarn-window": ("mistral", {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "yarn-original-outside": (
        "llama-llama3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32},
    ),
    "dynamic": ("qwen2-untied", {**OLDER, "rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    "llama3-original-outside": ("llama-llama3", {"original_max_position_embeddings": 64}),
    "older-and-newer": (
        "qwen2-untied",
        {"rope_parameters": NEWER, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
    "older-and-newer-base": (
        "qwen2-untied",
        {"rope_theta": 777.0, "rope_parameters": NEWER, "rope_scaling": {"type": "linear", "factor": 3.0}},
    ),
    "base-outside": ("qwen2-untied", {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default"}}),
    "no-rope": ("qwen2-untied", {"rope_parameters": None}),
    "swish": ("llama-llama3", {"hidden_act": "swish"}),
    "gelu-python": ("bert", {"hidden_act": "gelu_python"}),
    "heads-null": ("llama-linear", {"num_key_value_heads": None}),
    "own-head": ("llama-linear", {}),
    "head-alone": ("llama-linear", {}),
    "no-prefix": ("llama-llama3", {}),
    "gamma-beta": ("bert", {}),
    "prefix-gamma-beta": ("mpnet", {}),
}

Tensors = dict[str, torch.Tensor]


def _older_norms(tensors: Tensors) -> Tensors:
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }


def _head_alone(tensors: Tensors) -> Tensors:
    return {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}


#: What is done to the tensors.
TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "own-head": lambda tensors: {
        **tensors,
        "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0).contiguous(),
    },
    "head-alone": _head_alone,
    "no-prefix": lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
    "gamma-beta": _older_norms,
    "prefix-gamma-beta": lambda tensors: {f"mpnet.{name}": each for name, each in _older_norms(tensors).items()},
}


def make(here: Path, made_with: dict[str, str]) -> str:
    rows = np.load(here / "architectures.npz")
    arrays = {}
    for name, (checkpoint, change) in CASES.items():
        tokens = torch.from_numpy(rows[f"{checkpoint}.tokens.0"]).long()
        arrays[name] = _output(here / "architectures" / checkpoint, name, change, tokens)[-LAST:]
    np.savez_compressed(here / "configs.npz", **arrays)
    said = {name: {"checkpoint": checkpoint, "change": change} for name, (checkpoint, change) in CASES.items()}
    (here / "configs.json").write_text(json.dumps({"made_with": made_with, "cases": said}, indent=1) + "\n")
    return f"configs: {len(CASES)} cases"


@torch.inference_mode()
def _output(checkpoint: Path, name: str, change: dict[str, Any], tokens: torch.Tensor) -> np.ndarray:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / checkpoint.name
        shutil.copytree(checkpoint, folder)
        config = {**json.loads((folder / "config.json").read_text()), **change}
        left_out = ("rope_parameters",)
        config = {key: value for key, value in config.items() if value is not None or key not in left_out}
        (folder / "config.json").write_text(json.dumps(config))
        if name in TENSORS:
            file = folder / "model.safetensors"
            save_file(TENSORS[name](load_file(file)), file, {"format": "pt"})
        kind = AutoModel if checkpoint.name in ENCODERS else AutoModelForCausalLM
        model, found = kind.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        if found["missing_keys"] or found["unexpected_keys"]:
            raise SystemExit(f"configs: {name}: {found}")
        result = model.eval()(tokens[None])
        numbers: np.ndarray = (result.logits if hasattr(result, "logits") else result.last_hidden_state)[0].numpy()
        return numbers


if __name__ == "__main__":
    packages = ("torch", "transformers", "numpy")
    print(make(Path(__file__).resolve().parent, {name: importlib.metadata.version(name) for name in packages}))

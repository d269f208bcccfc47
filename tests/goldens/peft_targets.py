"""Which layers PEFT changes for targets of every form, none where it refuses them: `peft_targets.json`.

`python tests/goldens/peft_targets.py` makes it, in an environment with torch, transformers and peft.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

#: Layers 1 and 11 end alike.
LAYERS = 12
CASES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": None},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]},
    {"target_modules": ["0.self_attn.q_proj", "self_attn.v_proj", "layers.1.mlp.up_proj"]},
    {"target_modules": ["1.self_attn.q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": "All-Linear"},
    {"target_modules": r".*\.(0|11)\.self_attn\.[qk]_proj"},
    {"target_modules": r"layers\.0\.self_attn\.q_proj"},
    {"target_modules": r".*\.q"},
    {"target_modules": r"model\.layers\.\d\.mlp\.\w+_proj", "exclude_modules": ["up_proj", "3.mlp.gate_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 11, 40]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["l.*s"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "blocks"},
    {"target_modules": ["model.layers.5.self_attn.q_proj", "k_proj"], "layers_to_transform": [2]},
    {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.3.self_attn.q_proj", "layers.4.self_attn.q_proj"]},
    {"target_modules": "all-linear", "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    {"target_modules": "(q_proj"},
]


def layers(fields: dict[str, Any]) -> list[str]:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=2)
    )
    try:
        adapted = get_peft_model(model, LoraConfig(r=1, task_type="CAUSAL_LM", **fields))
    except Exception as error:  # what PEFT raises for targets is of many kinds
        print(f"{fields}: {type(error).__name__}: {str(error)[:80]}")
        return []
    tail = ".lora_A.default.weight"
    names = [name for name, _ in adapted.named_parameters() if name.endswith(tail)]
    return sorted(name.removeprefix("base_model.model.model.").removesuffix(tail) for name in names)


if __name__ == "__main__":
    made_with = {name: importlib.metadata.version(name) for name in ("peft", "transformers", "torch")}
    cases = [{"fields": fields, "layers": layers(fields)} for fields in CASES]
    content = {"made_with": made_with, "layers": LAYERS, "cases": cases}
    Path(__file__).with_suffix(".json").write_text(json.dumps(content) + "\n")

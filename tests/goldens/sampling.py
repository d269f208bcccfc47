"""Ask transformers what its logits processors make of random logits: writes sampling.npz into this folder.

Run in the environment of requirements/peers.txt: `.venv-peers/bin/python tests/goldens/sampling.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

HERE = Path(__file__).parent
VOCABULARY, ROWS = 61, 8
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
CASES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 10.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.0, "top_k": 1_000_000},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 3.0, "min_p": 1.0},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 0.9, "logit_bias": {"7": 5.0, "3": -100.0, "60": 2.5}},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "logit_bias": {"1": 3.0, "50": 4.0},
    },
]


def processors(case: dict[str, Any]) -> LogitsProcessorList:
    """In the order of `GenerationMixin._get_logits_processor`."""
    made = LogitsProcessorList()
    if "logit_bias" in case:
        made.append(SequenceBiasLogitsProcessor({(int(token),): bias for token, bias in case["logit_bias"].items()}))
    if "repetition_penalty" in case:
        made.append(RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    made.append(TemperatureLogitsWarper(case["temperature"]))
    if "top_k" in case:
        made.append(TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        made.append(TopPLogitsWarper(case["top_p"]))
    if "min_p" in case:
        made.append(MinPLogitsWarper(case["min_p"]))
    return made


def main() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (len(CASES), ROWS, VOCABULARY)).astype(np.float32)
    prompt = torch.tensor([PROMPT] * ROWS)
    scores = [processors(case)(prompt, torch.tensor(rows)).numpy() for case, rows in zip(CASES, logits, strict=True)]
    np.savez_compressed(HERE / "sampling.npz", logits=logits, scores=np.stack(scores).astype(np.float32))
    (HERE / "sampling.json").write_text(json.dumps({"prompt": PROMPT, "cases": CASES}, indent=1) + "\n")


if __name__ == "__main__":
    main()

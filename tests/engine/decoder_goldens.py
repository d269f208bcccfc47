"""Decoders of mlx-lm's model files held to torch transformers, by what `tests/goldens/decoders` has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.models.bridge import package
from engine.models.bridge.decoder import BridgedDecoder
from engine.models.key_values import KeyValues
from engine.weights.precision import Precision
from tests.engine import cached

HOME = Path(__file__).parents[1] / "goldens" / "decoders"
NAMES: tuple[str, ...] = tuple(json.loads((HOME.parent / "decoders.json").read_text())["checkpoints"])
#: What every position's logits agree within.
CLOSE = 2e-4


def opened(name: str, **fields: Any) -> BridgedDecoder:
    config = {**json.loads((HOME / name / "config.json").read_text()), **fields}
    file = package.file_of(config)
    assert file is not None
    return BridgedDecoder.from_folder(HOME / name, config, file, Precision(mx.float32, None))


def check(name: str) -> float:
    """The largest difference of any logit: whole texts, and a prompt with steps behind it."""
    model, content = opened(name), np.load(HOME / name / "logits.npz")
    apart = 0.0
    for row in range(2):
        tokens = content[f"tokens.{row}"].tolist()[: model.args.context]
        wanted = content[f"logits.{row}"][: len(tokens)]
        apart = max(apart, _apart(model(mx.array([tokens])), model, wanted))
        kv, prompt = KeyValues(model, 1, 64), len(tokens) - 3
        parts = [(0, prompt), *((at, at + 1) for at in range(prompt, len(tokens)))]
        for begin, end in parts:
            found = cached.through(model, kv, [tokens[begin:end]], [begin], exact=True, kv_length=end)
            apart = max(apart, float(np.abs(found[0] - wanted[begin:end]).max()))
    assert apart < CLOSE, f"{name}: {apart} from transformers, {CLOSE} allowed"
    return apart


def _apart(hidden: mx.array, model: BridgedDecoder, wanted: np.ndarray) -> float:
    return float(np.abs(np.array(model.logits(hidden))[0] - wanted).max())

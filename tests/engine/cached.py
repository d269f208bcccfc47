"""A pass of a model over keys and values, as the generate lane makes it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from engine.models.decoder import Decoder
from engine.models.key_values import KeyValues
from engine.models.view import View


def through(model: Decoder, kv: KeyValues, tokens: list[list[int]], offset: list[int], **how: Any) -> np.ndarray:
    """Logits (rows, tokens, vocabulary) of one pass over `kv`, which keeps what it writes."""
    shape = len(tokens), len(tokens[0])
    how = {"exact": False, "kv_length": kv.capacity, "window": model.args.window, **how}
    view = View(kv.stored, mx.array(offset), shape, sizes=model.kv_sizes, **how)
    got = model.logits(model(mx.array(tokens), view))
    kv.stored = view.written
    del view
    return np.array(got)

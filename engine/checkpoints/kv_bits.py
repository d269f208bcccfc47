"""In how many bits a model keeps its keys and values: as was asked for, or 16 where they are of another kind."""

from __future__ import annotations

import logging

from engine.models.bridge.decoder import BridgedDecoder
from engine.models.decoder import Decoder
from engine.models.kv_sizes import KvSizes
from kernels.packed_kv import fits

log = logging.getLogger(__name__)


def keep_in_bits(name: str, model: Decoder, bits: int) -> None:
    """Let a model that was just loaded keep its keys and values in so many bits. One that cannot serves all the same,
    in 16, and the log has one line."""
    if bits == 16:
        return
    if isinstance(model, BridgedDecoder) and model.shard is not None:
        # Each rank knows its own layers alone, and all have to decide alike.
        why: str | None = "ranks share its layers, which run mlx-lm's file"
    else:
        why = unfit(model.kv_sizes, bits)
    if why is None:
        model.kv_bits = bits
    else:
        log.warning("model %s keeps its keys and values in 16 bits, %d were asked for: %s", name, bits, why)


def unfit(sizes: KvSizes, bits: int) -> str | None:
    """Why keys and values of this kind stay as they are, and not in `bits`, or None."""
    if sizes.states or not sizes.keys:
        return "its recurrent layers keep states, whose errors would add up"
    for keys, values in zip(sizes.keys, sizes.values, strict=True):
        if (keys.heads, keys.size) != (values.heads, values.size):
            return (
                f"it keeps {keys.heads} times {keys.size} numbers of a token, and {values.heads} times {values.size}: "
                "no keys and values of heads"
            )
        if not fits(keys.size, bits):
            return f"its heads have {keys.size} numbers, which is no multiple of 8"
    return None

"""How the rows of one pass are sampled, for the device; and whose fault it is where that fails."""

from __future__ import annotations

from collections.abc import Sequence

from engine.generation.draws import Draw
from engine.generation.row import Row
from engine.generation.sampling_batch import SamplingBatch, sampling_batch


def gather(rows: Sequence[Row], ahead: Sequence[int], vocabulary: int, size: int) -> tuple[list[Draw], SamplingBatch]:
    """How the next token of each row is sampled, and the same for the device, padded to `size`. Raises `RowFault`."""
    made: dict[Row, Draw] = {}
    for row, steps in zip(rows, ahead, strict=True):
        if row not in made:
            with row.guarded():
                made[row] = row.draw(steps)
    draws = [made[row] for row in rows]
    return draws, sampling_of(rows, draws, vocabulary, size)


def sampling_of(rows: Sequence[Row], draws: Sequence[Draw], vocabulary: int, size: int) -> SamplingBatch:
    """The draws for the device, each of the row at its index. Raises `RowFault`."""
    try:
        return sampling_batch(draws, vocabulary, size)
    except Exception:
        for row, draw in zip(rows, draws, strict=True):
            with row.guarded():
                sampling_batch([draw], vocabulary)
        raise

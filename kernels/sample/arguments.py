"""What `sample` is called with."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx


class Penalties(NamedTuple):
    """Tokens so far. A row's entries (rows, any) may be padded with `seen` 0; entries of one token are added up.

    A token counts as seen (for `repetition`: Keskar et al., 2019) if any entry of it has `seen` above 0, and its
    `counts` are for `presence` and `frequency` (OpenAI's). `last`, int32 (rows,), is one more entry that counts 1;
    below 0: none. The three strengths are float32 (rows,), 1, 0 and 0 where a row has none.
    """

    seen_ids: mx.array
    seen: mx.array
    counts: mx.array
    last: mx.array
    repetition: mx.array
    presence: mx.array
    frequency: mx.array


class SampleInput(NamedTuple):
    """A batch of logits with the parameters of each row. A tuple, as `Kernel` is called with its fields one by one.

    float32, (rows,) or (rows, 1): `temperature` above 0, `top_p` (1: off), `min_p` (0: off), `uniform` in [0, 1).
    `top_k`: int32, 0 or the vocabulary: off. `greedy`: bool; such a row takes the first of its best tokens.
    `allowed`: int32 or uint32 (rows, vocabulary / 32), a bit for each token that a grammar allows.
    """

    #: (rows, vocabulary)
    logits: mx.array
    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    uniform: mx.array
    greedy: mx.array
    penalties: Penalties | None = None
    allowed: mx.array | None = None

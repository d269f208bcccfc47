"""One pass over a new token of each row that decodes and over a chunk of prompts (Agrawal et al., Sarathi-Serve, 2024).

A small pass takes what reading the weights takes, however few its tokens: prompts that go along pay for their own
products alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from engine.models.attention import from_heads
from engine.models.view import View


class MixedView:
    """What such a pass writes and reads: two views, each of storage of its own.

    Their tokens go through everything except attention in one line, (rows + prompts · tokens, dim): first those of
    `decoding`, one a row, then those of `prompts`, one prompt after the other.
    """

    def __init__(self, decoding: View, prompts: View) -> None:
        self.views = decoding, prompts
        self._rows, self._shape = decoding.shape[0], prompts.shape
        after = mx.array(np.arange(self._shape[1], dtype=np.int32))
        #: The position of each token, int32 (rows + prompts · tokens,).
        self.offset = mx.concatenate([decoding.offset, (prompts.offset[:, None] + after).reshape(-1)])

    def parts(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Heads of all tokens, (rows + prompts · tokens, heads, 1, size), as each view takes them: (rows, heads, 1,
        size) and (prompts, heads, tokens, size)."""
        decoding, prompts = x[: self._rows], x[self._rows :, :, 0]
        return decoding, prompts.reshape(*self._shape, *prompts.shape[1:]).swapaxes(1, 2)

    def joined(self, attended: Sequence[mx.array]) -> mx.array:
        """What both views made of `parts`, as one line again, (rows + prompts · tokens, heads · size)."""
        lines = (x.shape[0] * x.shape[2] for x in attended)
        return mx.concatenate([from_heads(x, (line,)) for x, line in zip(attended, lines, strict=True)])

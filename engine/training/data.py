"""From examples to batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engine.text.tokenizer import Tokenizer
from stoker.contract.dataset import Example
from stoker.errors import DatasetError


@dataclass(frozen=True)
class TokenizedExample:
    """`tokens[start:]` is what the loss counts."""

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class Batch:
    """`inputs`: int32 (rows, tokens), padded on the right. `places`: int32 (targets,), flat places of `inputs` whose
    next token counts; `targets`: int32 (targets,), those tokens."""

    inputs: mx.array
    places: mx.array
    targets: mx.array

    @property
    def tokens(self) -> int:
        return int(self.inputs.size)


def tokenize(examples: Sequence[Example], tokenizer: Tokenizer, max_length: int) -> list[TokenizedExample]:
    """Prompt and completion are encoded apart, as they will meet in use, and the completion ends with EOS, so that
    the model learns to stop. An example longer than `max_length` raises `DatasetError` with its number."""
    end = [] if tokenizer.main_eos_id is None else [tokenizer.main_eos_id]
    found = []
    for number, example in enumerate(examples, 1):
        prompt = tokenizer.encode(example.prompt) if example.prompt else []
        tokens = prompt + tokenizer.encode(example.completion, special=not prompt) + end
        if len(tokens) > max_length:
            raise DatasetError(
                f"dataset, example {number}: {len(tokens)} tokens given; max_length is {max_length}. "
                "Shorten it or raise max_length."
            )
        # A text has no prompt: its first token has nothing before it to be predicted from.
        found.append(TokenizedExample(tokens, max(1, len(prompt))))
    return found


def collate(examples: Sequence[TokenizedExample]) -> Batch:
    """Make one batch. Causal attention never looks right, so the padding needs no mask: no target sees it."""
    width = max(len(example.tokens) for example in examples) - 1
    inputs = np.zeros((len(examples), width), dtype=np.int32)
    places: list[int] = []
    targets: list[int] = []
    for row, example in enumerate(examples):
        inputs[row, : len(example.tokens) - 1] = example.tokens[:-1]
        places.extend(range(row * width + example.start - 1, row * width + len(example.tokens) - 1))
        targets.extend(example.tokens[example.start :])
    return Batch(mx.array(inputs), mx.array(places, dtype=mx.int32), mx.array(targets, dtype=mx.int32))


def batches(examples: Sequence[TokenizedExample], size: int, seed: int) -> Iterator[Batch]:
    """Batches without end: each epoch is a new permutation that depends on (seed, epoch) alone."""
    size = min(size, len(examples))
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(len(examples))
        for start in range(0, len(order) - size + 1, size):
            yield collate([examples[place] for place in order[start : start + size]])
        epoch += 1

"""From examples to batches of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from engine.text.tokenizer import Tokenizer
from engine.training.conversation import Writer
from stoker.contract import TrainRequest
from stoker.contract.dataset import Example
from stoker.contract.requests import MAX_STEPS
from stoker.errors import DatasetError, InvalidRequest, ModelError

#: Batches whose examples are sorted by length together: enough that little is padding, and the order stays random.
_BUCKET = 16


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """`tokens`: int32 (n,). `learned`: bool (n,), the tokens that the loss counts; never the first, which nothing
    predicts."""

    tokens: np.ndarray
    learned: np.ndarray
    #: Of the dataset, from 1: a conversation may make several examples.
    line: int = 0

    @classmethod
    def of(cls, pieces: Iterable[tuple[Sequence[int], bool]]) -> TokenizedExample:
        """From runs of tokens, each to be learned or not."""
        tokens: list[int] = []
        learned: list[bool] = []
        for run, learn in pieces:
            tokens += run
            learned += [learn] * len(run)
        learned[:1] = [False]
        return cls(np.array(tokens, dtype=np.int32), np.array(learned, dtype=bool))

    def all_learned(self) -> TokenizedExample:
        """The same with every token to be learned."""
        return TokenizedExample.of([(self.tokens.tolist(), True)])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TrainingBatch:
    """`inputs`: int32 (rows, tokens), padded on the right. `positions`: int32 (targets,), flat positions in `inputs`
    whose next token counts; `targets`: int32 (targets,), those tokens; `weights`: float32 (targets,), 0 where a target
    only pads. `count`: targets that count; `tokens`: of `inputs`, without padding."""

    inputs: mx.array
    positions: mx.array
    targets: mx.array
    weights: mx.array
    count: int
    tokens: int


def allowed_length(request: TrainRequest, context: int) -> int:
    """The tokens that an example may have. The default goes down to what the model takes; a length that was asked for
    and is longer raises `InvalidRequest`."""
    asked = request.max_length
    if asked > context and asked != TrainRequest.model_fields["max_length"].default:
        raise InvalidRequest(f"max_length: {asked} given; {request.model} takes {context}.")
    return min(asked, context)


def tokenize(
    examples: Iterable[Example], tokenizer: Tokenizer, max_length: int, *, learn_prompts: bool = False
) -> list[TokenizedExample]:
    """The loss counts completions, or everything with `learn_prompts`; of a conversation, what the assistant says.

    An example is encoded as one text, and the completion ends with EOS, so that the model learns to stop. An example
    that is too long or that the template refuses raises `DatasetError` with its number.
    """
    found = []
    for number, example in enumerate(examples, 1):
        try:
            tokenized = _chat(example, tokenizer) if example.messages else [_plain(example, tokenizer)]
        except (InvalidRequest, ModelError) as error:
            raise DatasetError(f"dataset, example {number}: {error}") from None
        for one in tokenized:
            found.append(replace(one.all_learned() if learn_prompts else one, line=number))
            _check(found[-1], number, max_length)
    if not found:
        raise DatasetError("dataset: no example in it.")
    return found


def _check(tokenized: TokenizedExample, number: int, max_length: int) -> None:
    if len(tokenized) > max_length:
        raise DatasetError(
            f"dataset, example {number}: {len(tokenized)} tokens given; max_length is {max_length}. "
            "Shorten it or raise max_length."
        )
    if not tokenized.learned.any():
        raise DatasetError(f"dataset, example {number}: no token in it that could be learned.")


def _plain(example: Example, tokenizer: Tokenizer) -> TokenizedExample:
    """A token that holds the end of the prompt and the beginning of the completion is learned: in use the model has to
    write it."""
    tokens, stops = tokenizer.encode_spans(example.prompt + example.completion, special=True)
    learned = [stop > len(example.prompt) or not example.prompt for stop in stops]
    end = tokenizer.main_eos_id
    closing = [] if end is None or tokens[-1:] == [end] else [end]
    return TokenizedExample.of([*_runs(tokens, learned), (closing, True)])


def _chat(example: Example, tokenizer: Tokenizer) -> list[TokenizedExample]:
    """The conversation as the template writes it; each of the assistant's turns is learned, its end included."""
    found = []
    for written in Writer(tokenizer).write(example.messages):
        # The template writes every special token itself.
        tokens, stops = tokenizer.encode_spans(written.text, special=False)
        learned = [any(start < stop <= end for start, end in written.learned) for stop in stops]
        found.append(TokenizedExample.of(_runs(tokens, learned)))
    return found


def _runs(tokens: Sequence[int], learned: Sequence[bool]) -> list[tuple[Sequence[int], bool]]:
    return [([token], learn) for token, learn in zip(tokens, learned, strict=True)]


def split(
    examples: Sequence[TokenizedExample], share: float, seed: int
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Examples to learn from, and those of a `share` of the lines, which are held out, drawn by `seed`. Those of one
    line hold one another, so none is learned from while another is held out. Raises `DatasetError` if one side would be
    empty."""
    lines = list(dict.fromkeys(example.line for example in examples))
    held = round(share * len(lines))
    if share and not 0 < held < len(lines):
        raise DatasetError(
            f"held_out: {share:g} of {len(lines)} examples is {held}; both sides need one. "
            "Give more examples or another share."
        )
    order = np.random.default_rng((seed, 1)).permutation(len(lines))
    apart = {lines[index] for index in order[:held]}
    return [one for one in examples if one.line not in apart], [one for one in examples if one.line in apart]


def divided(
    examples: Sequence[TokenizedExample], request: TrainRequest
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Examples to learn from, and those that are held out, as `request` has it. Raises `DatasetError`."""
    if not request.held_out_lines:
        return split(examples, request.held_out, request.seed)
    last = examples[-1].line - request.held_out_lines
    learned = [example for example in examples if example.line <= last]
    if not learned:
        raise DatasetError(
            f"held_out_lines: {request.held_out_lines} of {examples[-1].line} given; none is left to learn from."
        )
    return learned, [example for example in examples if example.line > last]


def batches_an_epoch(size: int, learned: int) -> int:
    """Of `size` of `learned` examples each. What does not fill a batch waits for another epoch."""
    return learned // min(size, learned)


def steps_of(request: TrainRequest, epochs: int, learned: int) -> int:
    """The steps in which so many epochs are over."""
    return _up(epochs * batches_an_epoch(request.batch_size, learned), request.accumulation) // request.accumulation


def with_steps(request: TrainRequest, learned: int) -> TrainRequest:
    """`request` with its number of steps, where it says epochs; `learned`: examples. Raises `InvalidRequest`."""
    if request.epochs is None:
        return request
    steps = steps_of(request, request.epochs, learned)
    if steps > MAX_STEPS:
        raise InvalidRequest(f"epochs: {request.epochs} given, which are {steps} steps; at most {MAX_STEPS}.")
    return request.model_copy(update={"steps": steps})


def dataset_digest(examples: Sequence[TokenizedExample]) -> str:
    """Names what is learned, token by token."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + example.learned.tobytes())
    return digest.hexdigest()[:16]


def collate(examples: Sequence[TokenizedExample], align: int = 1, part: slice = slice(None)) -> TrainingBatch:
    """Make one batch. Causal attention never looks right, so the padding needs no mask: no target sees it.

    Sizes are rounded up to a multiple of `align`, so that a compiled step meets few shapes. `part`: of the examples;
    their rows are as long as those of the whole batch.
    """
    width = _up(max(map(len, examples)) - 1, align)
    examples = examples[part]
    inputs = np.zeros((len(examples), width), dtype=np.int32)
    positions, targets = [], []
    for row, example in enumerate(examples):
        inputs[row, : len(example) - 1] = example.tokens[:-1]
        learned = np.flatnonzero(example.learned)
        positions.append(row * width + learned - 1)
        targets.append(example.tokens[learned])
    count = sum(map(len, targets))
    padding = _up(count, align) - count
    return TrainingBatch(
        mx.array(inputs),
        mx.array(np.pad(np.concatenate(positions), (0, padding)).astype(np.int32)),
        mx.array(np.pad(np.concatenate(targets), (0, padding)).astype(np.int32)),
        mx.array(np.pad(np.ones(count, dtype=np.float32), (0, padding))),
        count,
        sum(map(len, examples)) - len(examples),
    )


def _up(size: int, align: int) -> int:
    return -(-size // align) * align


class Batches:
    """Batches without end, the n-th a function of n and the seed alone: a run goes on at any batch.

    Each epoch is a permutation of its own; runs of it are sorted by length, so that batches hold examples of like
    length, and the batches are shuffled again. What does not fill a batch waits for another epoch.
    """

    def __init__(self, examples: Sequence[TokenizedExample], size: int, seed: int) -> None:
        self._examples, self._seed = examples, seed
        self._size = min(size, len(examples))
        self.an_epoch = batches_an_epoch(size, len(examples))
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def examples(self, number: int) -> list[TokenizedExample]:
        """Those of the batch `number`, from 0."""
        epoch, index_in_epoch = divmod(number, self.an_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return [self._examples[index] for index in self._order[index_in_epoch]]

    def _order_of(self, epoch: int) -> np.ndarray:
        """int64 (batches, size)."""
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(len(self._examples))[: self.an_epoch * self._size]
        lengths = np.array([len(self._examples[index]) for index in order])
        run = self._size * _BUCKET
        for start in range(0, len(order), run):
            part = slice(start, start + run)
            order[part] = order[part][np.argsort(lengths[part], kind="stable")]
        return order.reshape(-1, self._size)[random.permutation(self.an_epoch)]

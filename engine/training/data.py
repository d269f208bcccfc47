"""From examples to batches of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engine.text import chat
from engine.text.tokenizer import Tokenizer
from stoker.contract.dataset import Example
from stoker.errors import DatasetError, InvalidRequest, ModelError

#: Batches whose examples are sorted by length together: enough that little is padding, and the order stays random.
_BUCKET = 16


@dataclass(frozen=True, eq=False)
class TokenizedExample:
    """`tokens`: int32 (n,). `learned`: bool (n,), the tokens that the loss counts; never the first, which nothing
    predicts."""

    tokens: np.ndarray
    learned: np.ndarray

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

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """`inputs`: int32 (rows, tokens), padded on the right. `places`: int32 (targets,), flat places of `inputs` whose
    next token counts; `targets`: int32 (targets,), those tokens; `weights`: float32 (targets,), 0 where a target only
    pads. `count`: targets that count; `tokens`: of `inputs`, without padding."""

    inputs: mx.array
    places: mx.array
    targets: mx.array
    weights: mx.array
    count: int
    tokens: int


def tokenize(
    examples: Iterable[Example], tokenizer: Tokenizer, max_length: int, *, learn_prompts: bool = False
) -> list[TokenizedExample]:
    """The loss counts completions, or everything with `learn_prompts`; of a conversation, what the assistant says.

    Prompt and completion are encoded apart, as they will meet in use, and the completion ends with EOS, so that the
    model learns to stop. An example that is too long or that the template refuses raises `DatasetError` with its
    number.
    """
    found = []
    for number, example in enumerate(examples, 1):
        try:
            pieces = _chat(example, tokenizer) if example.messages else _plain(example, tokenizer)
        except (InvalidRequest, ModelError) as error:
            raise DatasetError(f"dataset, example {number}: {error}") from None
        tokenized = TokenizedExample.of((tokens, learn or learn_prompts) for tokens, learn in pieces)
        if len(tokenized) > max_length:
            raise DatasetError(
                f"dataset, example {number}: {len(tokenized)} tokens given; max_length is {max_length}. "
                "Shorten it or raise max_length."
            )
        if not tokenized.learned.any():
            raise DatasetError(f"dataset, example {number}: no token in it that could be learned.")
        found.append(tokenized)
    if not found:
        raise DatasetError("dataset: no example in it.")
    return found


def _plain(example: Example, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    end = [] if tokenizer.main_eos_id is None else [tokenizer.main_eos_id]
    if not example.prompt:
        return [(tokenizer.encode(example.completion) + end, True)]
    return [
        (tokenizer.encode(example.prompt), False),
        (tokenizer.encode(example.completion, special=False) + end, True),
    ]


def _chat(example: Example, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The conversation as the template writes it; each of the assistant's turns is learned, its end included."""
    pieces = []
    done = ""
    for place, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        asked = _render(tokenizer, example.messages[:place], generate=True)
        answered = _render(tokenizer, example.messages[: place + 1], generate=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise InvalidRequest(
                "the model's chat template writes earlier turns anew when later ones come, so what the assistant said "
                'cannot be told apart. Give it as {"prompt", "completion"}.'
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    # The template writes every special token itself.
    return [(tokenizer.encode(text, special=False), learn) for text, learn in pieces if text]


def _render(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], *, generate: bool) -> str:
    if tokenizer.chat_template is None:
        raise InvalidRequest('messages given, but the model has no chat template. Give {"prompt", "completion"}.')
    return chat.render(
        tokenizer.chat_template,
        messages,
        add_generation_prompt=generate,
        bos_token=_text(tokenizer, tokenizer.bos_id),
        eos_token=_text(tokenizer, tokenizer.main_eos_id),
    )


def _text(tokenizer: Tokenizer, token: int | None) -> str | None:
    return None if token is None else tokenizer.inner.id_to_token(token)


def split(
    examples: Sequence[TokenizedExample], share: float, seed: int
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Examples to learn from, and a `share` of them held out, drawn by `seed`. Raises `DatasetError` if one side would
    be empty."""
    held = round(share * len(examples))
    if share and not 0 < held < len(examples):
        raise DatasetError(
            f"held_out: {share:g} of {len(examples)} examples is {held}; both sides need one. "
            "Give more examples or another share."
        )
    order = np.random.default_rng((seed, 1)).permutation(len(examples))
    return [examples[place] for place in sorted(order[held:])], [examples[place] for place in sorted(order[:held])]


def dataset_digest(examples: Sequence[TokenizedExample]) -> str:
    """Names what is learned, token by token."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.tokens.tobytes() + example.learned.tobytes())
    return digest.hexdigest()[:16]


def collate(examples: Sequence[TokenizedExample], align: int = 1) -> Batch:
    """Make one batch. Causal attention never looks right, so the padding needs no mask: no target sees it.

    Sizes are rounded up to a multiple of `align`, so that a compiled step meets few shapes.
    """
    width = _up(max(map(len, examples)) - 1, align)
    inputs = np.zeros((len(examples), width), dtype=np.int32)
    places, targets = [], []
    for row, example in enumerate(examples):
        inputs[row, : len(example) - 1] = example.tokens[:-1]
        learned = np.flatnonzero(example.learned)
        places.append(row * width + learned - 1)
        targets.append(example.tokens[learned])
    count = sum(map(len, targets))
    padding = _up(count, align) - count
    return Batch(
        mx.array(inputs),
        mx.array(np.pad(np.concatenate(places), (0, padding)).astype(np.int32)),
        mx.array(np.pad(np.concatenate(targets), (0, padding)).astype(np.int32)),
        mx.array(np.pad(np.ones(count, dtype=np.float32), (0, padding))),
        count,
        sum(map(len, examples)) - len(examples),
    )


def _up(size: int, align: int) -> int:
    return -(-size // align) * align


class Batches:
    """Batches without end, the n-th a function of n and the seed alone: a run goes on at any place.

    Each epoch is a permutation of its own; runs of it are sorted by length, so that batches hold examples of like
    length, and the batches are shuffled again. What does not fill a batch waits for another epoch.
    """

    def __init__(self, examples: Sequence[TokenizedExample], size: int, seed: int) -> None:
        self._examples, self._seed = examples, seed
        self._size = min(size, len(examples))
        self.an_epoch = len(examples) // self._size
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def examples(self, number: int) -> list[TokenizedExample]:
        """Those of the batch `number`, from 0."""
        epoch, place = divmod(number, self.an_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return [self._examples[index] for index in self._order[place]]

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

"""A training run in a process of its own, for tests that kill it: `python -m tests.engine.training_child HOME OPTIONS`.

Prints a line before and after every micro-step, and within the writing of checkpoints: a test that kills it knows
that it lives. The last line is `done`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.platform import blas

blas.boot(1)

import mlx.core as mx  # noqa: E402

from engine.checkpoints.loading import LoadedModel  # noqa: E402
from engine.models.llama import Llama  # noqa: E402
from engine.training.data import tokenize  # noqa: E402
from engine.training.run import TrainingRun  # noqa: E402
from engine.weights import safetensors  # noqa: E402
from stoker.contract.dataset import Example  # noqa: E402
from tests.engine import tiny  # noqa: E402
from tests.engine.conftest import TINY, RandomTensors  # noqa: E402

EXAMPLES = [Example(tiny.text(range(3, 4 + n % 5)), tiny.text(range(9 + n, 11 + n + n % 7))) for n in range(30)]


def say(word: str) -> None:
    print(word, flush=True)


def chatty() -> None:
    """Say a word before each file and folder of a checkpoint is flushed."""
    plain = os.fsync

    def fsync(handle: int) -> None:
        say("file")
        plain(handle)

    os.fsync = fsync  # type: ignore[assignment]


def tiny_model() -> LoadedModel:
    mx.random.seed(7)
    return tiny.loaded(Llama(TINY, RandomTensors()))


def open_run(home: Path, options: dict[str, Any], kept: Callable[[], object] = lambda: None) -> TrainingRun:
    model = tiny_model()
    return TrainingRun(model, tiny.asking(**options), tokenize(EXAMPLES, model.tokenizer, 64), home / "run", kept)


def main(home: Path, options: str) -> None:
    chatty()
    run = open_run(home, json.loads(options))
    while not run.finished:
        say("step")
        run.advance()
    adapter = run.adapter()
    safetensors.write(
        home / "end.safetensors",
        {f"{name}.{side}": array for name, sides in adapter.matrices.items() for side, array in sides.items()},
    )
    say("done")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""One side of the training benchmark, as a process: a step for each line on standard input, a JSON line for each step.

`python -m bench.train_side stoker|mlx-lm FOLDER BATCH LENGTH`; on a CPU both run on the BLAS that Stoker boots.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.platform import blas
from stoker.contract.requests import LoraTarget

blas.boot()

import mlx.core as mx  # noqa: E402

from bench.training_steps import answer_steps, examples, rows, vocabulary  # noqa: E402

RANK, ALPHA, RATE, DECAY = 8, 16.0, 1e-4, 0.01
TARGETS: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
#: What is printed by libraries must not be taken for an answer.
_answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def answer(**fields: Any) -> None:
    print(json.dumps(fields), file=_answers, flush=True)


def stoker(folder: Path, batch: int, length: int) -> None:
    from engine.checkpoints.loading import load
    from engine.training.trainer import Trainer
    from stoker.contract import TrainRequest

    model = load("bench", [str(folder)])
    request = TrainRequest(
        model="bench", name="bench", dataset="none", steps=1_000_000, rank=RANK, alpha=ALPHA, targets=TARGETS,
        batch_size=batch, learning_rate=RATE, weight_decay=DECAY,
    )  # fmt: skip
    answer_steps(Trainer(model.decoder, request, examples(folder, batch, length)).run(), answer)


def mlx_lm(folder: Path, batch: int, length: int) -> None:
    """Its own trainer, batches as its own iterator lays them out: (batch, length + 1) tokens and (offset, length)."""
    from mlx import optimizers
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.freeze()
    keys = {f"self_attn.{target}" for target in TARGETS}
    linear_to_lora_layers(model, len(model.layers), {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": keys})
    tokens = mx.array(rows(batch, length, vocabulary(folder)))
    lengths = mx.array([[0, length]] * batch)

    def batches(**_: Any) -> Iterator[tuple[mx.array, mx.array]]:
        answer(ready=True)
        for _line in sys.stdin:
            yield tokens, lengths

    class Answer(TrainingCallback):
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            answer(
                seconds=1.0 / info["iterations_per_second"],
                loss=info["train_loss"],
                peak=int(info["peak_memory"] * 1e9),
            )

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArgs(
            batch_size=batch, iters=1_000_000, steps_per_report=1, steps_per_save=10_000_000, max_seq_length=length + 1,
            adapter_file=f"{out}/adapters.safetensors",
        )  # fmt: skip
        optimizer = optimizers.AdamW(RATE, weight_decay=DECAY, bias_correction=True)
        mx.eval(model.parameters())
        mx.clear_cache()
        mx.reset_peak_memory()
        train(model, optimizer, None, None, arguments, iterate_batches=batches, training_callback=Answer())


if __name__ == "__main__":
    side, where, batch_size, tokens_a_row = sys.argv[1:]
    {"stoker": stoker, "mlx-lm": mlx_lm}[side](Path(where), int(batch_size), int(tokens_a_row))
    mx.clear_streams()

"""What a training run would be: `stoker train --dry-run`. Measured, not guessed: one step is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from engine.checkpoints.loading import load
from engine.platform import probe
from engine.training.data import allowed_length, batches_an_epoch, divided, steps_of, tokenize, with_steps
from engine.training.trainer import Trainer
from stoker.contract import TrainRequest
from stoker.contract.dataset import TrainInput, iterate_lines


def plan(sources: Sequence[str], dataset: Path, request: TrainRequest) -> dict[str, Any]:
    """Counts and lengths of the examples, tokens an epoch, and the time and memory of the run, by the longest batch.

    Raises what the run itself would raise for its data.
    """
    model = load(request.model, sources)
    limit = allowed_length(request, model.context)
    lines = iterate_lines(TrainInput(dataset).lines(), dataset.name)
    examples = tokenize(lines, model.tokenizer, limit, learn_prompts=request.learn_prompts)
    learned, held_out = divided(examples, request)
    request = with_steps(request, len(learned))
    lengths = np.array([len(example) for example in examples])
    longest = sorted(learned, key=len)[-request.batch_size :]
    mx.reset_peak_memory()
    trainer = Trainer(model.decoder, request.model_copy(update={"steps": 2, "accumulation": 1}), longest)
    seconds = []
    for _ in trainer.run():
        seconds.append(time.perf_counter())
    step = (seconds[-1] - seconds[-2]) * request.accumulation
    trained = sum(array.size for sides in trainer.adapter().matrices.values() for array in sides.values())
    return {
        "examples": len(learned),
        "held_out": len(held_out),
        "steps": request.steps,
        "tokens_an_epoch": int(sum(map(len, learned))),
        "learned_an_epoch": int(sum(int(example.learned.sum()) for example in learned)),
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
        "steps_an_epoch": steps_of(request, 1, len(learned)),
        "epochs": request.steps * request.accumulation / batches_an_epoch(request.batch_size, len(learned)),
        "trained_parameters": int(trained),
        "seconds_a_step": step,
        "seconds": step * request.steps,
        "memory_bytes": int(mx.get_peak_memory()),
        "device": probe.device(),
    }

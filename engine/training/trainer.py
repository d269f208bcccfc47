"""The trainer: a generator of reports, one optimizer step each. The caller decides when the next step runs."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence

import mlx.core as mx
import numpy as np
from mlx import optimizers

from engine.adapters.lora import LoraConfig, LoraWeights, Matrices, TrainableLora, initialise
from engine.loading import LoadedModel
from engine.models.llama import Llama
from engine.training.data import Batch, TokenizedExample, batches
from stoker.contract import TrainReport, TrainRequest
from stoker.errors import JobFailed


def train(
    model: LoadedModel, examples: Sequence[TokenizedExample], request: TrainRequest
) -> Generator[TrainReport, None, LoraWeights]:
    """Train a LoRA adapter on `model`, whose own weights stay as they are; returns the adapter.

    AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with decoupled decay and bias correction, linear warm-up to a
    constant rate, gradients clipped to a global norm. Raises `JobFailed` when the loss is no longer a number.
    """
    config = LoraConfig(request.rank, request.alpha, request.targets)
    matrices = initialise(config, model.linear_shapes, request.seed).matrices
    optimizer = optimizers.AdamW(request.learning_rate, weight_decay=request.weight_decay, bias_correction=True)

    def loss_at(matrices: Matrices, batch: Batch) -> mx.array:
        return loss_of(model.decoder, TrainableLora(matrices, config.scale), batch)

    loss_and_gradient = mx.value_and_grad(loss_at)
    tokens = 0
    for step, batch in zip(range(request.steps), batches(examples, request.batch_size, request.seed), strict=False):
        began = time.perf_counter()
        optimizer.learning_rate = learning_rate(request, step)
        mean_loss, gradients = loss_and_gradient(matrices, batch)
        gradients, global_norm = optimizers.clip_grad_norm(gradients, request.clip)  # type: ignore[no-untyped-call]
        matrices = optimizer.apply_gradients(gradients, matrices)
        mx.eval(mean_loss, global_norm, matrices, optimizer.state)
        loss, norm = _number(mean_loss), _number(global_norm)
        _refuse_divergence(step, loss, norm)
        tokens += batch.tokens
        yield TrainReport(
            index=step,
            step=step + 1,
            steps=request.steps,
            loss=loss,
            learning_rate=learning_rate(request, step),
            gradient_norm=norm,
            tokens=tokens,
            tokens_per_second=batch.tokens / (time.perf_counter() - began),
        )
    return LoraWeights(config, matrices)


def learning_rate(request: TrainRequest, step: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant. `step` counts from 0."""
    return request.learning_rate * min(1.0, (step + 1) / (request.warmup_steps + 1))


def loss_of(model: Llama, adapters: TrainableLora, batch: Batch) -> mx.array:
    """Mean cross-entropy, in nats, over the batch's targets.

    Only the hidden states that predict a target go through the output head: with prompts masked and a vocabulary of
    50,000 or more this is most of the step's memory, and a good part of its time.
    """
    hidden = model(batch.inputs, adapters=adapters)
    chosen = hidden.reshape(-1, hidden.shape[-1])[batch.places]
    logits = model.logits(chosen)
    correct = mx.take_along_axis(logits, batch.targets[:, None], axis=-1)[:, 0]
    return mx.mean(mx.logsumexp(logits, axis=-1) - correct)


def _number(scalar: mx.array) -> float:
    return float(np.array(scalar))


def _refuse_divergence(step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise JobFailed(
            f"training diverged at step {step + 1}: loss {loss}, gradient norm {norm}. "
            "Lower learning_rate, or add warmup_steps."
        )

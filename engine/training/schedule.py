"""Learning rates: constant, linear, cosine, each behind an optional linear warm-up."""

from __future__ import annotations

import math

from stoker.contract import TrainRequest


def learning_rate(request: TrainRequest, step: int) -> float:
    """The rate of step `step` (from 0).

    It rises linearly over `warmup_steps` to `learning_rate`, and is then kept, or falls to 0 just behind the last step:
    linearly, or along half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983).
    """
    if step < request.warmup_steps:
        return request.learning_rate * (step + 1) / (request.warmup_steps + 1)
    done = (step - request.warmup_steps) / max(1, request.steps - request.warmup_steps)
    if request.schedule == "linear":
        return request.learning_rate * (1.0 - done)
    if request.schedule == "cosine":
        return request.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
    return request.learning_rate

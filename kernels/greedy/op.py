"""The likeliest token of each row with its logit and log-probability: argmax and logsumexp in one pass."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels.body import Body
from kernels.greedy.cases import cases, timings
from kernels.kernel import DTYPES, Arrays, Kernel, threads_for

_BODY = Body("greedy", ("logits",), ("chosen", "raw", "logprob", "probability"), ("common.h", "maximum.h"))
_MOST = 1 << 20
#: Logits that a thread has under way at once.
_DEPTH = 8


class Chosen(NamedTuple):
    """Of each row the token (int32), its logit and log-probability, and 1; logit NaN where the row's are not finite."""

    token: mx.array
    logit: mx.array
    logprob: mx.array
    probability: mx.array


def greedy(logits: mx.array) -> Chosen:
    """The likeliest token of each row of (rows, vocabulary). Of equal ones the first; a row that holds a NaN or +∞ is
    marked by a NaN for its logit, and has token 0."""
    return Chosen(*KERNEL(logits))


def _reference(logits: mx.array) -> Arrays:
    logits = logits.astype(mx.float32)
    chosen = mx.argmax(logits, axis=-1)
    raw = mx.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    sound = mx.all(logits < mx.inf, axis=-1)
    found = mx.where(sound, chosen.astype(mx.int32), 0), mx.where(sound, raw, mx.nan)
    return [*found, raw - mx.logsumexp(logits, axis=-1), mx.ones(raw.shape)]


def _refuse(logits: mx.array) -> str | None:
    if logits.dtype not in DTYPES:
        return f"logits of dtype {logits.dtype}"
    return None if logits.ndim == 2 and 0 < logits.shape[1] <= _MOST else f"logits of shape {logits.shape}"


def _launch(logits: mx.array) -> Arrays:
    rows, vocabulary = logits.shape
    return _BODY.launch(
        (logits,),
        template=[("T", logits.dtype), ("V", vocabulary), ("DEPTH", _DEPTH)],
        groups=(rows, 1),
        threads=threads_for(vocabulary),
        outputs=[((rows,), mx.int32), *[((rows,), mx.float32)] * 3],
    )


KERNEL = Kernel(
    name="greedy",
    reason="one launch for some ten (argmax, logsumexp, what is finite, what puts them together); one pass for four",
    bodies=(_BODY,),
    launch=_launch,
    reference=_reference,
    refuse=_refuse,
    cases=cases,
    timings=timings,
    # A log-probability near 0 is the difference of larger numbers.
    tolerances=dict.fromkeys(DTYPES, 5e-5),
)

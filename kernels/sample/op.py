"""From logits to tokens without a sort: penalties, grammar, temperature, top-k, top-p, min-p and the draw, a row each.

Scores are logits after penalties and grammar, over the temperature. Kept are those that reach the smallest score which
top-k, then top-p on what top-k left, then min-p keep: tokens of equal score are cut or kept together, and the best is
always kept. The draw takes the first token, in the order of the vocabulary, at which the sum of kept probabilities goes
beyond the row's number.

How it comes without a sort: the first launch makes a histogram of the scores in bins of 1/8, with counts and masses;
the second finds the bin in which top-k and top-p cut, and sorts that bin alone: a radix select of two quantities.
Which part of the scores is looked at next is decided by counts, which are exact; masses are rounded, and only choose
among parts that hold a score. So every loop has a bound that no number can break.

What is exact: top-k, ties, and that a token is kept by the rule above. What is rounded: `kernels/sample/rule.py` says
how far, and computes it in float64.

Numbers that are none: a NaN among the logits, and a score at or below −4e37, is no score: its token is never drawn. A
row without any score takes token 0 with probability 0. Log-probabilities take a NaN for −3e38 and what is infinite for
±3e38. A temperature that is no positive normal number makes its row greedy. `top_p` and `min_p` that are NaN are off,
and so is a `top_k` below 1 or beyond the vocabulary; below 0 `top_p`, beyond 1 `min_p` keep the best scores alone.
`uniform` is taken into [0, 1], a NaN for 0.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from kernels.body import Body, Template
from kernels.kernel import DTYPES, Arrays, Kernel
from kernels.sample.arguments import SampleInput
from kernels.sample.cases import cases, timings
from kernels.sample.hard import hard
from kernels.sample.reference import reference
from kernels.sample.rule import error

_CHUNK, _BLOCK, _PICK_THREADS = 512, 4096, 512
_MOST = 1 << 20
_ROW = ("temperature", "top_k", "top_p", "min_p", "uniform", "greedy")
_PENALTIES = ("seen_ids", "seen", "counts", "last", "repetition", "presence", "frequency")
_SCAN = Body(
    "sample_scan",
    ("logits", "temperature", "top_k", "top_p", "greedy", *_PENALTIES, "allowed"),
    ("stats", "histogram", "scores"),
    ("sample/sample.h",),
    of="sample",
)
_PICK = Body(
    "sample_pick",
    ("logits", "scores", "stats", "histogram", *_ROW),
    ("chosen", "raw", "logprob", "probability"),
    ("common.h", "maximum.h", "sample/sample.h", "sample/sample_pick.h"),
    of="sample",
)


class Sampled(NamedTuple):
    """Of each row the token (int32), its raw logit and log-probability, and its probability among those kept."""

    token: mx.array
    logit: mx.array
    logprob: mx.array
    probability: mx.array


def sample(given: SampleInput) -> Sampled:
    """One token a row."""
    return Sampled(*KERNEL(*given))


def _refuse(given: SampleInput) -> str | None:
    logits, penalties, allowed = given.logits, given.penalties, given.allowed
    if logits.dtype not in DTYPES:
        return f"logits of dtype {logits.dtype}"
    if logits.ndim != 2 or not 1 < logits.shape[1] <= _MOST:
        return f"logits of shape {logits.shape}"
    if any(array.dtype != mx.float32 for array in (given.temperature, given.top_p, given.min_p, given.uniform)):
        return "parameters that are not float32"
    if given.top_k.dtype != mx.int32 or given.greedy.dtype != mx.bool_:
        return "top_k that is not int32, or greedy that is not bool"
    if penalties is not None and penalties.last.dtype != mx.int32:
        return "a last token that is not int32"
    if allowed is not None and allowed.shape[1] * 32 < logits.shape[1]:
        return "a grammar of fewer tokens than the logits"
    return None


def _launch(given: SampleInput) -> Arrays:
    logits, temperature, top_k, top_p, min_p, uniform, greedy, penalties, allowed = given
    rows, vocabulary = logits.shape
    adjusted = penalties is not None or allowed is not None
    sizes: Template = [
        ("T", logits.dtype),
        ("V", vocabulary),
        ("CHUNKS", -(-vocabulary // _CHUNK)),
        ("BLOCKS", -(-vocabulary // _BLOCK)),
        ("ADJUSTED", adjusted),
    ]
    stats, histogram, scores = _scan(given, sizes, adjusted)
    return _PICK.launch(
        (logits, scores, stats, histogram, temperature, top_k, top_p, min_p, uniform, greedy),
        template=sizes,
        groups=(rows, 1),
        threads=_PICK_THREADS,
        outputs=[((rows,), mx.int32), *[((rows,), mx.float32)] * 3],
    )


def _scan(given: SampleInput, sizes: Template, adjusted: bool) -> Arrays:
    """The first launch: sums of each chunk, a histogram of each block, and what scores are adjusted."""
    logits, temperature, top_k, top_p, _, _, greedy, penalties, allowed = given
    rows, vocabulary = logits.shape
    chunks, blocks = -(-vocabulary // _CHUNK), -(-vocabulary // _BLOCK)
    ids = top_k if penalties is None else penalties.seen_ids
    return _SCAN.launch(
        (
            *(logits, temperature, top_k, top_p, greedy),
            *((top_k, temperature, temperature, top_k, *[temperature] * 3) if penalties is None else penalties),
            top_k if allowed is None else allowed,
        ),
        template=[
            *sizes,
            *(("WIDTH", ids.size // rows), ("PENALISED", penalties is not None), ("MASKED", allowed is not None)),
            *(("WORDS", 1 if allowed is None else allowed.shape[1]), ("TALLY", 1 if penalties is None else _BLOCK)),
        ],
        groups=(rows, blocks),
        threads=256,
        outputs=[
            ((rows, chunks, 4), mx.float32),
            ((rows, blocks, 2, 256), mx.uint32),
            ((rows, vocabulary) if adjusted else (1,), mx.float32),
        ],
    )


KERNEL = Kernel(
    name="sample",
    reason="a sort of the vocabulary moves it some ten times and then takes eight more launches; this reads it once",
    bodies=(_SCAN, _PICK),
    launch=lambda *fields: _launch(SampleInput(*fields)),
    reference=lambda *fields: reference(SampleInput(*fields)),
    refuse=lambda *fields: _refuse(SampleInput(*fields)),
    cases=cases,
    timings=timings,
    error=error,
    hard=hard,
    tolerances=dict.fromkeys(DTYPES, 2e-05),
)

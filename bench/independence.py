"""Whether a request's tokens depend on what else runs: alone, in a full batch, and resumed in the middle.

`python -m bench.independence`: random weights of Qwen2.5-0.5B's shape (on a CPU a small one) in float32, in
16 bits and quantized, greedy and drawn with seeds, on the device at hand. A row says of how many requests all tokens
were the same, and where in the others the first one differed.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Record, Row, parser, row
from engine.platform import blas
from stoker.contract import GenerateRequest, StreamToken, TrainReport

NAME = "bench-model"
#: What a worker loads the model with.
FORMS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bits": {"quantize": "4bit"},
}
WAYS: Mapping[str, Mapping[str, Any]] = {"greedy": {}, "drawn": {"temperature": 0.8, "top_k": 50}}
#: Requests, their tokens and those of a prompt.
REQUESTS, TOKENS, PROMPT = 32, 128, 64


class Run:
    """An engine over one form of the model."""

    def __init__(self, folder: Path, home: Path, form: Mapping[str, Any]) -> None:
        from engine.engine import Engine
        from engine.generation.limits import LaneLimits

        self._made: defaultdict[str, list[StreamToken]] = defaultdict(list)
        limits = LaneLimits(slots=REQUESTS, kv_bytes=4 << 30)
        precision: Any = dict(form)
        self.engine = Engine(
            {NAME: (str(folder),)}, adapters=home, publish=self._publish, limits=limits, precision=precision
        )
        self.engine.start()

    def _publish(self, entries: list[tuple[str, StreamToken | TrainReport]]) -> None:
        for job, token in entries:
            assert isinstance(token, StreamToken)
            self._made[job].append(token)

    def tokens(
        self,
        prompts: Mapping[int, Sequence[int]],
        way: Mapping[str, Any],
        known: Mapping[int, Sequence[StreamToken]] | None = None,
    ) -> dict[int, list[StreamToken]]:
        """What all of them make at once, each with its number as its seed, behind the tokens that are known."""
        known = known or {}
        sent = {}
        for number, prompt in prompts.items():
            request = GenerateRequest(
                model=NAME, prompt_ids=tuple(prompt), max_tokens=TOKENS, ignore_eos=True, seed=number, **way
            )
            sent[number] = self.engine.submit(f"job-{number}", request, known.get(number))
        for ticket in sent.values():
            ticket.result(600)
        made = {number: [*known.get(number, ()), *self._made[f"job-{number}"]] for number in prompts}
        self._made.clear()
        return made


def compared(name: str, one: Mapping[int, list[StreamToken]], other: Mapping[int, list[StreamToken]]) -> list[Row]:
    """Of the requests, the share whose tokens were the same throughout. Of the rest the index of the first other token,
    and by how much the logprobs of the two were apart there."""
    first, near = list[float](), list[float]()
    for number, mine in one.items():
        pairs = list(zip(mine, other[number], strict=True))
        index = next((index for index, (a, b) in enumerate(pairs) if a.token_id != b.token_id), None)
        if index is not None:
            first.append(index)
            near.append(abs(pairs[index][0].logprob - pairs[index][1].logprob))
    found = [row(f"{name}: the same", "%", [100 * (len(one) - len(first)) / len(one)])]
    if first:
        found.append(row(f"{name}: the first other token", "index", first))
        found.append(row(f"{name}: its logprob apart, at most", "", [max(near)]))
    return found


def measured(run: Run, form: str, vocabulary: int) -> list[Row]:
    random = np.random.default_rng(1)
    prompts = {number: random.integers(0, vocabulary, PROMPT).tolist() for number in range(REQUESTS)}
    rows: list[Row] = []
    for name, way in WAYS.items():
        together = run.tokens(prompts, way)
        halves = {number: tokens[: TOKENS // 2] for number, tokens in together.items()}
        alone: dict[int, list[StreamToken]] = {}
        for number, prompt in prompts.items():
            alone |= run.tokens({number: prompt}, way)
        others = {
            "the same again": run.tokens(prompts, way),
            "each alone": alone,
            "resumed in the middle": run.tokens(prompts, way, halves),
        }
        for what, made in others.items():
            rows += compared(f"{form}, {name}: {REQUESTS} at once, {what}", together, made)
    return rows


def main() -> int:
    options = parser(__doc__).parse_args()
    blas.boot()
    from bench.checkpoint import QWEN, SMALL, write_random
    from engine.platform.probe import device

    cpu = device() == "cpu"
    config: dict[str, Any] = SMALL if cpu else QWEN
    record = Record(f"independence{'' if cpu else '-gpu'}", options.out, device=device(), requests=REQUESTS)
    with tempfile.TemporaryDirectory() as home:
        folder = write_random(Path(home) / NAME, config)

        def one(form: str) -> list[Row]:
            run = Run(folder, Path(home) / "adapters", FORMS[form])
            try:
                return measured(run, form, config["vocab_size"])
            finally:
                run.engine.stop()

        for form in FORMS:
            record.part(form, partial(one, form))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())

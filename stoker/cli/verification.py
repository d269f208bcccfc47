"""What `stoker verify` tries on a worker that holds the models of the demo: every kind of job, against what torch made
of the same weights, and how fast it went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from stoker.cli.demo import ADAPTER, EMBED_MODEL, GENERATE_MODEL, QUESTION
from stoker.client import Client, GenerateJob
from stoker.errors import JobCancelled, StokerError
from stoker.local.checks import Check

#: Cosine of a vector with torch's float32 vector: 16-bit weights turn it by less than a fiftieth of this.
CLOSE = 0.999
#: Rows that decode together, and tokens of each that are timed.
ROWS, TOKENS = 8, 64
STEPS = 12
#: Seconds that one job may take: a first use of a kernel compiles it.
PATIENCE = 300.0


@dataclass(frozen=True)
class Golden:
    """What torch made. `prompts`: token ids, and those that follow for certain (see `tests/goldens/verification.py`).
    `vectors`: float32, one for each of `texts`."""

    prompts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    texts: tuple[str, ...]
    vectors: tuple[tuple[float, ...], ...]

    @classmethod
    def read(cls) -> Golden:
        found = json.loads(resources.files("stoker.data").joinpath("verification.json").read_text("utf-8"))
        prompts = tuple((tuple(each["prompt_ids"]), tuple(each["token_ids"])) for each in found["prompts"])
        return cls(prompts, tuple(found["texts"]), tuple(map(tuple, found["vectors"])))


@dataclass(frozen=True)
class Rate:
    """How fast something went, through the queue, on a machine that may have done other things as well."""

    name: str
    unit: str
    value: float


class Tour:
    """Jobs of every kind. `checks` yields a verdict after each step; a step that fails hides no other. `rates`: of the
    steps that were timed."""

    def __init__(self, client: Client, golden: Golden) -> None:
        self._client, self._golden = client, golden
        self.rates: list[Rate] = []

    def checks(self) -> Iterator[Check]:
        for name, step, remedy in (
            ("embed", self._embed, _WRONG),
            ("generate", self._generate, _WRONG),
            ("stream", self._stream, "the broker's pub/sub and streams: `stoker doctor`"),
            ("seeds", self._seeds, _WRONG),
            ("rows", self._rows, _WRONG),
            ("pattern", self._pattern, _WRONG),
            ("cancel", self._cancel, "see the worker's log in STOKER_HOME/logs"),
            ("train", self._train, _WRONG),
            ("adapter", self._adapter, _WRONG),
        ):
            yield _tried(name, step, remedy)

    def _embed(self) -> str:
        import numpy as np

        right = np.array(self._golden.vectors, np.float32)
        vectors = self._client.embed(self._golden.texts, model=EMBED_MODEL).result(PATIENCE)
        worst = float((vectors * right).sum(1).min())
        _must(worst >= CLOSE, f"a vector's cosine with torch's is {worst:.5f}, at least {CLOSE} expected")
        many = [f"{text} {number}" for number in range(64) for text in self._golden.texts]
        self._timed("embed, 256 short texts", "texts/s", len(many), lambda: self._embedded(many))
        return f"{len(vectors)} vectors, the worst cosine with torch's is {worst:.5f}"

    def _embedded(self, texts: Sequence[str]) -> None:
        self._client.embed(texts, model=EMBED_MODEL).result(PATIENCE)

    def _generate(self) -> str:
        jobs = [self._greedy(prompt, len(right)) for prompt, right in self._golden.prompts]
        for job, (prompt, right) in zip(jobs, self._golden.prompts, strict=True):
            made = job.result(PATIENCE).token_ids
            _must(tuple(made) == right, f"token ids {list(made)} after {list(prompt)[-8:]}; torch has {list(right)}")
        return f"{sum(len(right) for _, right in self._golden.prompts)} greedy tokens, all torch's"

    def _stream(self) -> str:
        prompt = self._golden.prompts[0][0]
        self._greedy(prompt, TOKENS).result(PATIENCE)
        began, first = time.perf_counter(), 0.0
        tokens = []
        for token in self._greedy(prompt, TOKENS).stream(timeout=PATIENCE):
            first = first or time.perf_counter() - began
            tokens.append(token)
        seconds = time.perf_counter() - began - first
        _must([token.index for token in tokens] == list(range(TOKENS)), f"{len(tokens)} tokens came, not all in order")
        self.rates.append(Rate("first token of a stream", "ms", 1000 * first))
        self.rates.append(Rate("generate, 1 stream", "tokens/s", (TOKENS - 1) / max(seconds, 1e-6)))
        return f"{TOKENS} tokens, the first after {1000 * first:.0f} ms"

    def _seeds(self) -> str:
        prompt = self._golden.prompts[0][0]
        first, again, other = (self._sampled(prompt, seed=seed) for seed in (7, 7, 8))
        _must(first == again, f"one seed gave two texts: {first!r} and {again!r}")
        _must(first != other, f"two seeds gave one text: {first!r}")
        return "a seed gives its text twice, another seed another one"

    def _sampled(self, prompt: Sequence[int], *, seed: int) -> str:
        job = self._client.generate(
            prompt_ids=prompt, model=GENERATE_MODEL, seed=seed, temperature=1.0, max_tokens=24, ignore_eos=True
        )
        return job.result(PATIENCE).text

    def _rows(self) -> str:
        prompt, right = max(self._golden.prompts, key=lambda each: len(each[1]))
        jobs: list[GenerateJob] = []

        def all_rows() -> None:
            jobs.extend(self._greedy(prompt, TOKENS) for _ in range(ROWS))
            for job in jobs:
                job.result(PATIENCE)

        self._timed(f"generate, {ROWS} streams", "tokens/s", ROWS * TOKENS, all_rows)
        wrong = sum(tuple(job.result(PATIENCE).token_ids[: len(right)]) != right for job in jobs)
        _must(not wrong, f"{wrong} of {ROWS} rows that decoded together differ from torch")
        return f"{ROWS} rows together have the tokens of one alone"

    def _pattern(self) -> str:
        job = self._client.generate("The year is", model=GENERATE_MODEL, max_tokens=8, regex=" (19|20)[0-9]{2}")
        text = job.result(PATIENCE).text
        _must(len(text) == 5 and text[1:].isdigit(), f"{text!r} does not fit the pattern that was asked for")
        return f"{text!r} fits its pattern"

    def _cancel(self) -> str:
        job = self._greedy(self._golden.prompts[0][0], 4000)
        next(iter(job.stream(timeout=PATIENCE, cancel_on_close=False)))
        job.cancel()
        try:
            job.result(PATIENCE)
        except JobCancelled:
            return "a running stream ends when it is cancelled"
        raise _Failed("a stream that was cancelled went on to its end")

    def _train(self) -> str:
        with resources.as_file(resources.files("stoker.data").joinpath("house_style.jsonl")) as dataset:
            job = self._client.train(
                ADAPTER, dataset, model=GENERATE_MODEL, steps=STEPS, batch_size=4, learning_rate=2e-3, max_length=64
            )
            made = job.result(PATIENCE)
        _must(made.last_loss < made.first_loss, f"the loss went from {made.first_loss:.3f} to {made.last_loss:.3f}")
        self.rates.append(Rate("train", "tokens/s", made.tokens / max(made.usage.run_seconds, 1e-6)))
        return f"loss {made.first_loss:.3f} → {made.last_loss:.3f} in {STEPS} steps"

    def _adapter(self) -> str:
        def answer(adapter: str | None) -> str:
            return (
                self._client.generate(QUESTION, model=GENERATE_MODEL, max_tokens=24, adapter=adapter)
                .result(PATIENCE)
                .text
            )

        before, changed, after = answer(None), answer(ADAPTER), answer(None)
        _must(before == after, "the base answers differently after its adapter was used")
        _must(before != changed, "the adapter that was trained changes nothing")
        return "the adapter changes the answer, and leaves the base as it was"

    def _greedy(self, prompt: Sequence[int], tokens: int) -> GenerateJob:
        return self._client.generate(prompt_ids=prompt, model=GENERATE_MODEL, max_tokens=tokens, ignore_eos=True)

    def _timed(self, name: str, unit: str, count: int, run: Callable[[], None]) -> None:
        began = time.perf_counter()
        run()
        self.rates.append(Rate(name, unit, count / (time.perf_counter() - began)))


_WRONG = "open an issue with the report: this machine computes something else than torch"


class _Failed(Exception):
    """What came is not what had to come."""


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Failed(otherwise)


def _tried(name: str, step: Callable[[], str], remedy: str) -> Check:
    try:
        return Check(name, True, step())
    except _Failed as error:
        return Check(name, False, str(error), remedy)
    except StokerError as error:
        return Check(name, False, f"{type(error).__name__}: {error}", "see the worker's log in STOKER_HOME/logs")
    except Exception as error:
        # What came cannot even be compared, as vectors of another width; the other checks go on.
        return Check(name, False, f"{type(error).__name__}: {error}", _WRONG)

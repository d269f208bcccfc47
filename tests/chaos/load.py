"""The work that goes on meanwhile: a few requests of every kind, whose right answers are known from a calm run."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from stoker import Client
from stoker.broker.outcome import JobStatus
from stoker.client import GenerateJob, Job, TrainJob
from stoker.errors import (
    BrokerUnavailable,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobLost,
    StokerError,
)
from tests.chaos.fleet import EMBED, GENERATE
from tests.chaos.poison import Poison

Weights = npt.NDArray[np.float32]

KINDS = ("generate", "embed", "train")
#: Requests for generation that fail by themselves, among the others: what each ends with on every worker.
BAD: dict[str, tuple[dict[str, Any], type[StokerError], str]] = {
    "grammar": ({"regex": "a(?=b)"}, InvalidRequest, "look-ahead"),
    "recursion": ({"json_schema": {"allOf": [{"$ref": "#"}, {"type": "object"}]}}, InvalidRequest, "circular"),
    "compiling": ({"json_schema": {"type": "integer", "multipleOf": 123_456_789}}, InvalidRequest, "to compile"),
    "token": ({"logit_bias": {2**30: 1.0}}, InvalidRequest, "logit_bias: token"),
    "deadline": ({"max_tokens": 4000, "deadline": 0.3}, DeadlineExceeded, "deadline"),
}
#: One job in so many is one of these, in turn.
BAD_EVERY = 5
#: Of every kind so many different requests.
PLANS = 4
#: Seconds that a job may take from the end of the storm on.
LAST_SECONDS = 240.0


def send(client: Client, kind: str, plan: int, job_id: str) -> Job[Any]:
    """Request `plan` of a kind: always the same for the same numbers, except for the job's id."""
    if kind == "embed":
        texts = [f"{'ab ' * (1 + plan + number % 5)}" for number in range(10 + 20 * plan)]
        return client.embed(texts, model=EMBED, job_id=job_id, priority=plan)
    if kind == "generate":
        return client.generate(
            "ab " * (plan + 1), model=GENERATE, max_tokens=300 * (plan + 1), job_id=job_id, priority=plan,
            temperature=0.0 if plan == 0 else 0.8, top_k=10 * plan, seed=plan,
        )  # fmt: skip
    rows = [{"text": "ab " * (1 + number % 7)} for number in range(9)]
    return client.train(
        job_id, rows, model=GENERATE, steps=40 * (plan + 1), rank=2 + plan, seed=plan, max_length=32, batch_size=2,
        job_id=job_id, priority=plan,
    )  # fmt: skip


def send_bad(client: Client, name: str, job_id: str) -> Job[Any]:
    options = {"temperature": 0.8, "n": 2, **BAD[name][0]}
    return client.generate("ab ab", model=GENERATE, job_id=job_id, **options)


def follow(job: Job[Any], adapters: Path) -> tuple[Any, int]:
    """What the job made, as it can be compared, and how many entries its stream had. Raises what the job ended with."""
    if isinstance(job, GenerateJob):
        tokens = list(job.stream(cancel_on_close=False))
        indices, result = [token.index for token in tokens], job.result()
        if indices != list(range(len(tokens))):
            raise AssertionError(f"the stream's indices are {indices}")
        if "".join(token.text for token in tokens) != result.text:
            raise AssertionError("the stream's text is not the result's")
        return [token.token_id for token in tokens], len(tokens)
    if isinstance(job, TrainJob):
        reports = list(job.progress())
        if [report.step for report in reports] != list(range(1, len(reports) + 1)):
            raise AssertionError(f"the reports' steps are {[report.step for report in reports]}")
        made = job.result()
        path = adapters / GENERATE / made.adapter / str(made.version) / "adapter_model.safetensors"
        weights = safetensors.numpy.load_file(path)
        return weights, len(reports)
    return job.result(), 0


def equal(kind: str, made: Any, right: Any, *, exact: bool) -> bool:
    """Tokens to the last bit; vectors as far as another batch may change them; weights to the last bit if they are
    `exact`, or as far as the order may in which ranks add."""
    if kind == "embed":
        return bool(np.allclose(made, right, atol=1e-5))
    if kind == "generate":
        return bool(made == right)
    if exact:
        return _bytes(made) == _bytes(right)
    return made.keys() == right.keys() and all(_alike(made[name], right[name]) for name in right)


def _bytes(weights: Mapping[str, Weights]) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in weights.items()}


def _alike(made: Weights, right: Weights) -> bool:
    """One step of a run more or less would change its weights by more."""
    return made.shape == right.shape and bool(np.linalg.norm(made - right) <= 2e-3 * np.linalg.norm(right))


@dataclass
class Answers:
    """(kind, plan) → what a run that nobody disturbed made of it."""

    adapters: Path
    #: Whether all workers add in the same order.
    exact: bool = True
    right: dict[tuple[str, int], Any] = field(default_factory=dict)

    def learn(self, client: Client) -> None:
        wanted = [(kind, plan) for kind in KINDS for plan in range(PLANS)]
        for kind, plan in wanted:
            self.right[kind, plan], _ = follow(send(client, kind, plan, f"calm-{kind}-{plan}"), self.adapters)


@dataclass
class Load:
    """Keeps `width` jobs open while the storm lasts, and writes down what is wrong with any of them."""

    client: Client
    answers: Answers
    chance: random.Random
    adapters: Path
    poison: Poison
    width: int
    #: Training runs of ten jobs.
    runs: int = 1
    jobs: int = 0
    entries: int = 0
    cancelled: int = 0
    refused: int = 0
    #: Dead letters of a disk that took nothing, by job.
    sent_again: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    open: dict[str, threading.Thread] = field(default_factory=dict)

    def feed(self) -> None:
        """Send as many as are missing. Called by the storm between two acts."""
        while len(self.open) < self.width:
            self.jobs += 1
            if self.jobs % BAD_EVERY == 1:
                name = list(BAD)[self.jobs // BAD_EVERY % len(BAD)]
                job_id = f"bad-{name}-{self.jobs}"
                self._open(job_id, self._bad, name, job_id)
                continue
            kind, plan = self.chance.choices(KINDS, (7 - self.runs, 3, self.runs))[0], self.chance.randrange(PLANS)
            job_id = f"{kind}-{plan}-{self.jobs}"
            cancel_after = self.chance.uniform(0, 3) if self.chance.random() < 0.1 else None
            twice = self.chance.random() < 0.2
            self._open(job_id, self._one, kind, plan, job_id, cancel_after, twice)

    def _open(self, job_id: str, target: Callable[..., None], *arguments: Any) -> None:
        self.open[job_id] = threading.Thread(target=target, args=arguments, daemon=True)
        self.open[job_id].start()

    def wait_for_all(self) -> None:
        """Wait for all that was sent."""
        end = time.monotonic() + LAST_SECONDS
        for job_id, thread in list(self.open.items()):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                record = self.client.redis.hgetall(f"stoker:job:{job_id}")
                self.wrong.append(f"{job_id} has not ended: {record}")

    def _bad(self, name: str, job_id: str) -> None:
        """One that has to end with its own error, and with no other."""
        _, error, words = BAD[name]
        try:
            job = self._sent(lambda: send_bad(self.client, name, job_id))
            job.result()
            self.wrong.append(f"{job_id} ended well")
        except error as caught:
            self.refused += 1
            if words not in str(caught):
                self.wrong.append(f"{job_id} ended with another's words: {caught}")
        except Exception as caught:
            self.wrong.append(f"{job_id}: {type(caught).__name__}: {caught}")
        finally:
            self.open.pop(job_id, None)

    def _one(self, kind: str, plan: int, job_id: str, cancel_after: float | None, twice: bool) -> None:
        try:
            job = self._sent(lambda: send(self.client, kind, plan, job_id))
            if twice:
                job = self._sent(lambda: send(self.client, kind, plan, job_id))
            if cancel_after is not None:
                threading.Timer(cancel_after, self._cancel, [job]).start()
            made, entries = self._followed(job, partial(send, self.client, kind, plan))
            self.entries += entries
            if not equal(kind, made, self.answers.right[kind, plan], exact=self.answers.exact):
                self.wrong.append(f"{job_id} made something else than the undisturbed run")
        except JobCancelled:
            self.cancelled += 1
            if cancel_after is None:
                self.wrong.append(f"{job_id} was cancelled, though nobody asked for it")
        except Exception as error:
            self.wrong.append(f"{job_id}: {type(error).__name__}: {error}")
        finally:
            self.open.pop(job_id, None)

    def _followed(self, job: Job[Any], anew: Callable[[str], Job[Any]]) -> tuple[Any, int]:
        """As a person would who mends the disk, and sends the dead letter again; `anew`, where the letter was lost."""
        while True:
            try:
                return follow(job, self.adapters)
            except JobDead as error:
                # Without its policy the broker takes three crashes for too many.
                if "the disk of" not in str(error) and not (self.poison.policy_lost and "crashed" in str(error)):
                    raise
                self.sent_again[job.id] += 1
                time.sleep(0.5)
                try:
                    job = self._sent(partial(self.client.retry, job.id))
                except JobLost:
                    if not self.poison.letters_lost:
                        raise
                    job = self._sent(partial(anew, f"{job.id}-anew"))

    @staticmethod
    def _sent(send_it: Callable[[], Job[Any]]) -> Job[Any]:
        """As a caller would who knows that an id sent twice is one job."""
        while True:
            try:
                return send_it()
            except BrokerUnavailable:
                time.sleep(0.2)

    def _cancel(self, job: Job[Any]) -> None:
        try:
            if job.status() in (JobStatus.QUEUED, JobStatus.RUNNING):
                job.cancel()
        except StokerError:
            # The broker is away: then this job is not cancelled, which is a right ending too.
            return

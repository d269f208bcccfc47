"""Counting: jobs where their leases say it, and the engine's steps in its own thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from engine.ticket import StepOutput, Ticket
from stoker.contract import GenerateResult, StreamToken, TrainReport, TrainResult, Usage
from stoker.contract.vectors import Embedded
from stoker.monitor import exposition, metrics
from stoker.monitor.numbers import Numbers
from tests.monitor.scraped import Scrape
from tests.monitor.test_curve import report
from workers.account import DeliveryEnd, JobAccount
from workers.services.engine_meter import EngineMeter
from workers.services.job_meter import JobMeter


class Counted:
    """Both meters over one set of numbers and one clock."""

    def __init__(self) -> None:
        self.now, self.numbers = 100.0, Numbers()
        self.jobs = JobMeter(self.numbers, lambda: {"base"}, self.clock)
        self.engine = EngineMeter(self.numbers, self.jobs.submitted, self.clock)

    def clock(self) -> float:
        return self.now

    @property
    def found(self) -> Scrape:
        return Scrape.of(exposition.text(exposition.of_workers([self.numbers.report("w@here")])).decode())

    def step(self, *made: tuple[Ticket[Any], int, int], kind: str = "generate", **changes: Any) -> None:
        """Tokens as (ticket, index, completion)."""
        entries: list[Any] = [(ticket, token(index, completion)) for ticket, index, completion in made]
        self.engine.step("base", kind, 0.5, StepOutput(entries=entries, **changes))


def token(index: int, completion: int = 0) -> StreamToken:
    return StreamToken(
        index=index, token_id=1, text="a", logit=0.0, logprob=-1.0, probability=1.0, completion=completion
    )


@pytest.fixture
def counted() -> Counted:
    return Counted()


def account(**changes: Any) -> JobAccount:
    """Of a job that waited for two seconds before it was claimed."""
    return JobAccount(**{"job": "job", "kind": "generate", "model": "base", "wait": 2.0, "began": 0.0, **changes})


def test_a_job_is_counted_when_it_begins_and_when_it_is_over(counted: Counted) -> None:
    counted.jobs.begun(account())
    counted.now += 3.0
    counted.jobs.ended(account(outcome=DeliveryEnd.SUCCEEDED))
    found = counted.found
    lane = {"model": "base", "kind": "generate"}
    assert found.value("stoker_job_attempts_total", **lane) == 1
    assert found.value("stoker_queue_wait_seconds_sum", **lane) == 2.0
    assert found.value("stoker_job_duration_seconds_sum", **lane) == 5.0
    assert found.value("stoker_jobs_total", **lane, outcome="succeeded") == 1


def test_a_job_that_goes_on_here_is_an_attempt_and_has_not_waited_again(counted: Counted) -> None:
    counted.jobs.begun(account(wait=500.0, attempt=2))
    assert counted.found.value("stoker_job_attempts_total") == counted.found.value("stoker_job_resumes_total") == 1
    assert counted.found.value("stoker_queue_wait_seconds_count") == 0


def test_a_job_that_was_passed_on_has_waited_once(counted: Counted) -> None:
    counted.jobs.begun(account())
    counted.jobs.ended(account(outcome=DeliveryEnd.PASSED_ON))
    counted.jobs.begun(account(wait=2.25, passed=True))
    assert counted.found.value("stoker_queue_wait_seconds_count") == 1
    assert counted.found.value("stoker_queue_wait_seconds_sum") == 2.0
    assert counted.found.value("stoker_job_resumes_total") == 0


@pytest.mark.parametrize("outcome", DeliveryEnd)
def test_each_end_of_a_job_is_counted_once_and_a_delivery_that_ends_none_is_not(
    counted: Counted, outcome: DeliveryEnd
) -> None:
    counted.jobs.ended(account(outcome=outcome))
    ended = outcome in ("succeeded", "failed", "cancelled", "dead")
    counts = {each: counted.found.value("stoker_jobs_total", outcome=each) for each in DeliveryEnd}
    assert counts == {**dict.fromkeys(DeliveryEnd, 0.0), outcome: float(ended)}
    assert counted.found.value("stoker_job_duration_seconds_count") == 0, "it was not begun here"
    assert counted.found.value("stoker_jobs_returned_total") == (outcome == "returned")


def test_models_and_kinds_that_others_name_make_no_series_of_their_own(counted: Counted) -> None:
    for number in range(50):
        counted.jobs.begun(account(model=f"model-{number}", kind=f"kind-{number}"))
    counted.jobs.begun(account())
    labels = {sample.labels: sample.value for sample in counted.numbers.report().samples["stoker_job_attempts_total"]}
    assert labels == {("other", "other"): 50.0, ("base", "generate"): 1.0}


def test_a_jobs_submission_is_forgotten_when_it_is_over(counted: Counted) -> None:
    counted.jobs.begun(account())
    counted.jobs.ended(account(outcome=DeliveryEnd.DROPPED))
    assert counted.jobs.submitted("job") == 98.0, "another delivery of it has nothing to do"
    counted.jobs.ended(account(outcome=DeliveryEnd.FENCED))
    assert counted.jobs.submitted("job") is None


def test_the_first_token_counts_from_the_submission_and_the_others_from_the_one_before(counted: Counted) -> None:
    ticket = Ticket[Any]("job", "generate")
    counted.jobs.begun(account())
    for index, after in enumerate((1.0, 0.025, 0.5)):
        counted.now += after
        counted.step((ticket, index, 0))
    found = counted.found
    assert found.value("stoker_time_to_first_token_seconds_sum") == pytest.approx(3.0)
    assert found.value("stoker_inter_token_seconds_count") == 2
    assert found.value("stoker_inter_token_seconds_sum") == pytest.approx(0.525)
    assert found.value("stoker_inter_token_seconds_bucket", le="0.02") == 0
    assert found.value("stoker_inter_token_seconds_bucket", le="0.03") == 1
    assert found.value("stoker_generated_tokens_total", model="base") == 3


def test_completions_of_one_job_are_counted_apart_and_have_one_first_token(counted: Counted) -> None:
    ticket = Ticket[Any]("job", "generate")
    counted.step((ticket, 0, 0), (ticket, 1, 1))
    counted.now += 0.25
    counted.step((ticket, 2, 1), (ticket, 3, 0))
    found = counted.found
    assert found.value("stoker_time_to_first_token_seconds_count") == 1
    assert found.value("stoker_inter_token_seconds_count") == 2
    assert found.value("stoker_inter_token_seconds_sum") == 0.5


def test_a_stream_that_goes_on_here_has_no_first_token_here(counted: Counted) -> None:
    ticket = Ticket[Any]("job", "generate")
    counted.step((ticket, 7, 0))
    counted.now += 0.1
    counted.step((ticket, 8, 0))
    assert counted.found.value("stoker_time_to_first_token_seconds_count") == 0
    assert counted.found.value("stoker_inter_token_seconds_count") == 1


def test_a_step_counts_for_its_lane_with_its_rows(counted: Counted) -> None:
    counted.step(kind="embed", rows=5)
    counted.step(kind="embed")
    found = counted.found
    assert found.value("stoker_engine_busy_seconds_total", kind="embed") == 1.0
    assert (found.value("stoker_batch_size_count"), found.value("stoker_batch_size_sum")) == (1, 5)


def test_the_last_report_of_a_run_is_shown(counted: Counted) -> None:
    ticket = Ticket[Any]("run", "train")
    reports: list[TrainReport] = [report(1), report(2)]
    counted.engine.step("base", "train", 0.1, StepOutput(entries=[(ticket, each) for each in reports]))
    found = counted.found
    assert found.value("stoker_training_step") == 2
    assert found.value("stoker_training_steps") == reports[1].steps
    assert found.value("stoker_training_loss") == reports[1].loss
    assert found.value("stoker_training_tokens_per_second") == reports[1].tokens_per_second


def result(prompt: int, cached: int) -> GenerateResult:
    usage = Usage(prompt_tokens=prompt, cached_tokens=cached)
    return GenerateResult(model="base", adapter=None, text="", token_ids=(), finish_reason="stop", usage=usage)


def test_tokens_that_went_in_count_when_their_job_is_done(counted: Counted) -> None:
    ticket = Ticket[Any]("job", "generate")
    trained = TrainResult(
        model="base", adapter="a", version=1, steps=1, first_loss=1.0, last_loss=1.0, best_step=1, tokens=30,
        usage=Usage(),
    )  # fmt: skip
    embedded = Embedded(np.zeros((1, 2), np.float32), tokens=5, run_seconds=0.1)
    for kind, made in (("generate", result(40, 32)), ("generate", result(9, 0)), ("embed", embedded),
                       ("train", trained)):  # fmt: skip
        counted.engine.step("base", kind, 0.1, StepOutput(ended=[(ticket, made)]))
    found = counted.found
    tokens = {kind: found.value("stoker_input_tokens_total", kind=kind) for kind in ("generate", "embed", "train")}
    assert tokens == {"generate": 49, "embed": 5, "train": 30}
    assert found.value("stoker_prefix_hits_total") == 1
    assert found.value("stoker_prefix_hit_tokens_total") == 32


def test_what_is_served_has_its_series_before_the_first_job(counted: Counted) -> None:
    card: Any = SimpleNamespace(model="base", kinds=("generate", "train"))
    counted.jobs.expect([card])
    assert len(counted.found.samples["stoker_jobs_total"]) == 2 * 4
    assert counted.found.value("stoker_jobs_total") == 0


def test_a_token_asks_no_clock_of_its_own_and_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step of many tokens costs is counted, not timed: the machine decides that."""
    lock = MagicMock()
    monkeypatch.setattr("workers.services.job_meter.threading", SimpleNamespace(Lock=lambda: lock))
    counted = Counted()
    counted = Counted()
    asked: list[float] = []

    def clock() -> float:
        asked.append(200.0)
        return 200.0

    tickets = [Ticket[Any](f"job-{number}", "generate") for number in range(64)]
    counted.step(*((ticket, 0, 0) for ticket in tickets))
    engine = EngineMeter(counted.numbers, pytest.fail, clock)
    counted.jobs.begun(account())
    taken = lock.__enter__.call_count
    assert taken > 0
    entries: list[Any] = [(ticket, token(1)) for ticket in tickets]
    series = len(counted.numbers.report().samples)
    engine.step("base", "generate", 0.1, StepOutput(entries=entries))
    assert len(asked) == 1
    assert lock.__enter__.call_count == taken
    assert len(counted.numbers.report().samples) == series
    assert counted.numbers.of(metrics.INTER_TOKEN, "base").counts[-1] == 64


def test_each_token_of_a_step_counts(counted: Counted) -> None:
    tickets = [Ticket[Any](f"job-{number}", "generate") for number in range(3)]
    counted.step(*((ticket, 0, 0) for ticket in tickets))
    assert counted.found.value("stoker_generated_tokens_total", model="base") == 3

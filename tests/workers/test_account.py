"""What a worker's account of a job takes from its ticket, its claim and its result."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from engine.ticket import Ticket
from stoker.contract import EmbedReply, GenerateResult, TrainResult, Usage
from stoker.logs.lines import FIELDS
from workers.account import DeliveryEnd, JobAccount
from workers.services.joblog import JobLog


def ticket(kind: str, started: float | None, first: float | None, ended: float | None) -> Ticket[Any]:
    made: Ticket[Any] = Ticket("job", kind)
    made.submitted, made.started, made.first_entry, made.ended = 1.0, started, first, ended
    return made


@pytest.mark.parametrize(
    ("kind", "times", "phases"),
    [
        ("generate", (2.0, 3.0, 5.0), [("engine queue", 1, 2), ("prefill", 2, 3), ("decode", 3, 5)]),
        # It ended in the middle of its prompt, or before it began.
        ("generate", (2.0, None, 5.0), [("engine queue", 1, 2), ("prefill", 2, 5)]),
        ("generate", (None, None, 5.0), [("engine queue", 1, 5)]),
        ("embed", (2.0, None, 5.0), [("engine queue", 1, 2), ("embed", 2, 5)]),
        ("train", (2.0, 3.0, 5.0), [("engine queue", 1, 2), ("train", 2, 5)]),
        ("adapters", (2.0, None, 5.0), [("engine queue", 1, 2), ("load adapter", 2, 5)]),
    ],
)
def test_the_engines_phases_follow_each_other_without_a_gap(
    kind: str, times: tuple[float | None, float | None, float], phases: list[tuple[str, float, float]]
) -> None:
    account = JobAccount("job", kind, "m")
    account.ran(ticket(kind, *times))
    assert [(phase.name, phase.began, phase.ended) for phase in account.phases] == phases


def test_a_phase_that_fails_is_reported_too() -> None:
    account = JobAccount("job", "embed", "m")
    with pytest.raises(ValueError, match="x"), account.phase("load"):
        raise ValueError("x")
    assert [phase.name for phase in account.phases] == ["load"]


def test_tokens_of_an_embedding_are_those_that_it_read() -> None:
    account = JobAccount("job", "embed", "m")
    account.made(EmbedReply(blob="b", rows=1, dim=1, usage=Usage(prompt_tokens=9)))
    assert account.tokens == 9


def test_tokens_of_a_generation_and_of_a_run_are_those_of_their_results() -> None:
    generated, trained = JobAccount("job", "generate", "m"), JobAccount("job", "train", "m")
    usage = Usage(prompt_tokens=7, completion_tokens=3)
    generated.made(
        GenerateResult(model="m", adapter=None, text="x", token_ids=(1, 2, 3), finish_reason="length", usage=usage)
    )
    assert (generated.prompt_tokens, generated.tokens) == (7, 3)
    counts: dict[str, Any] = {"version": 1, "steps": 2, "best_step": 2, "tokens": 30}
    trained.made(TrainResult(model="m", adapter="a", first_loss=2.0, last_loss=1.0, usage=usage, **counts))
    assert (trained.prompt_tokens, trained.tokens) == (0, 30)


@pytest.mark.parametrize("end", DeliveryEnd)
def test_an_end_that_should_be_looked_at_is_a_warning(end: DeliveryEnd, caplog: pytest.LogCaptureFixture) -> None:
    account = JobAccount("job", "embed", "m")
    account.outcome = end
    with caplog.at_level(logging.INFO, logger="stoker.jobs"):
        JobLog().ended(account)
    bad = end in (DeliveryEnd.FAILED, DeliveryEnd.DEAD)
    assert [record.levelno for record in caplog.records] == [logging.WARNING if bad else logging.INFO]


@pytest.mark.parametrize(("end", "counted"), [(DeliveryEnd.SUCCEEDED, True), (DeliveryEnd.FAILED, False)])
def test_the_last_line_of_a_job_says_how_long_it_ran_and_what_it_made_if_it_made_anything(
    end: DeliveryEnd, counted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    account = JobAccount("job", "embed", "m", began=100.0, ended=102.5)
    account.made(EmbedReply(blob="b", rows=1, dim=1, usage=Usage(prompt_tokens=9)))
    account.outcome = end
    with caplog.at_level(logging.INFO, logger="stoker.jobs"):
        JobLog().ended(account)
    (record,) = caplog.records
    fields = getattr(record, FIELDS)
    assert (fields["event"], fields["outcome"], fields["duration"]) == ("ended", end, 2.5)
    assert (fields.get("tokens"), fields.get("prompt_tokens")) == ((9, 0) if counted else (None, None))

"""What training runs look like to OpenAI's clients, and what the fields of a request for one become; and what a key of
the gateway is counted for. Without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from stoker import AsyncClient
from stoker.broker import api_keys, keys
from stoker.broker.api_keys import ApiKey
from stoker.broker.connection import connect
from stoker.broker.fine_tunes import Ending, FineTune
from stoker.contract import TrainReport
from stoker.gateway.access import Keyed
from stoker.gateway.calls import Caller
from stoker.gateway.errors import Refused
from stoker.gateway.fields import checked_body
from stoker.gateway.fine_tuning_body import LEARNING_RATE, FineTuningBody
from stoker.gateway.fine_tuning_form import checkpoints, events, job_object, name_of
from stoker.gateway.fine_tuning_state import Standing
from stoker.settings import Settings


def record(**fields: Any) -> FineTune:
    what: dict[str, Any] = {"training_file": "file-t", "validation_file": "file-v", "metadata": {"a": "b"}}
    what |= {"epochs": 3, "batch_size": 4, "multiplier": 1.5, "seed": 6, "model": "base", "adapter": "style"}
    return FineTune(id="ft-1", owner="team", created=100, **what | fields)


SUCCEEDED = Ending(status="succeeded", finished=200, version=3, step=9, loss=1.5, held_out_loss=1.75, tokens=77)
FAILED = Ending(status="failed", finished=200, code="job_failed", message="it fell over")
CANCELLED = Ending(status="cancelled", finished=200)


async def all_of(items: AsyncIterator[dict[str, object]]) -> list[Any]:
    return [item async for item in items]


@pytest.mark.parametrize(
    ("standing", "shown"),
    [
        (Standing("running"), {"status": "running"}),
        (
            Standing("succeeded", SUCCEEDED),
            {"status": "succeeded", "fine_tuned_model": "base:style", "finished_at": 200, "trained_tokens": 77},
        ),
        (
            Standing("failed", FAILED),
            {
                "status": "failed", "finished_at": 200,
                "error": {"code": "job_failed", "message": "it fell over", "param": None},
            },
        ),
        (Standing("cancelled", CANCELLED), {"status": "cancelled", "finished_at": 200}),
    ],
)  # fmt: skip
def test_a_run_is_shown_as_its_vendor_does(standing: Standing, shown: dict[str, Any]) -> None:
    hyper = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.5}
    assert job_object(record(), standing) == {
        "id": "ft-1", "object": "fine_tuning.job", "created_at": 100, "model": "base", "fine_tuned_model": None,
        "finished_at": None, "error": None, "organization_id": "team", "result_files": [], "seed": 6,
        "trained_tokens": None, "training_file": "file-t", "validation_file": "file-v", "estimated_finish": None,
        "integrations": [], "metadata": {"a": "b"}, "hyperparameters": hyper,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}, **shown,
    }  # fmt: skip


def test_a_version_that_does_not_serve_is_asked_for_by_its_number() -> None:
    assert name_of(record(), SUCCEEDED) == "base:style"
    assert name_of(record(promote=False), SUCCEEDED) == "base:style@3"


def report(index: int, **fields: Any) -> TrainReport:
    what: dict[str, Any] = {"loss": 2.0, "learning_rate": 0.5, "gradient_norm": 1.0, "tokens": 9, "epoch": 0.5}
    return TrainReport(index=index, step=index + 1, steps=9, tokens_per_second=1.0, **what | fields)


class Reports:
    """Of a run, as the broker gives them: the newest first, so many at a time. It notes what it was asked."""

    def __init__(self, *entries: bytes) -> None:
        self._entries = entries
        self.asked: list[tuple[int | None, int]] = []

    async def __call__(self, below: int | None, count: int) -> list[bytes]:
        self.asked.append((below, count))
        last = len(self._entries) if below is None else below
        return list(reversed(self._entries[:last]))[:count]


def listed(standing: Standing, reports: Reports, after: str | None = None) -> list[Any]:
    return asyncio.run(all_of(events(record(), standing, reports, after)))


def test_events_of_a_run_come_newest_first_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.gateway.fine_tuning_form.STRIDE", 2)
    entries = [report(number, published=150.9 + number).model_dump_json().encode() for number in range(5)]
    found = listed(Standing("succeeded", SUCCEEDED), Reports(*entries))
    ids = [f"ftevent-ft-1-{name}" for name in ("ended", 4, 3, 2, 1, 0, "created")]
    assert [event["id"] for event in found] == ids
    for at, name in enumerate(ids):
        assert [event["id"] for event in listed(Standing("succeeded", SUCCEEDED), Reports(*entries), name)] == ids[at:]
    assert found[1] == {
        "id": "ftevent-ft-1-4", "object": "fine_tuning.job.event", "created_at": 154, "level": "info",
        "message": "Step 5/9: training loss=2.0000", "type": "metrics",
        "data": {
            "step": 5, "total_steps": 9, "epoch": 0.5, "train_loss": 2.0, "valid_loss": None, "learning_rate": 0.5,
            "gradient_norm": 1.0, "tokens": 9,
        },
    }  # fmt: skip
    assert [event["id"] for event in listed(Standing("running"), Reports(*entries))] == ids[1:]


@pytest.mark.parametrize(
    ("ending", "message", "level"),
    [
        (SUCCEEDED, "The job has successfully completed; new model: base:style", "info"),
        (FAILED, "The job has failed: it fell over", "error"),
        (CANCELLED, "The job was cancelled", "error"),
    ],
)
def test_the_last_event_says_how_a_run_ended_and_the_first_that_it_began(
    ending: Ending, message: str, level: str
) -> None:
    last, first = listed(Standing(ending.status, ending), Reports())
    said = {"object": "fine_tuning.job.event", "type": "message", "data": None}
    assert last == {**said, "id": "ftevent-ft-1-ended", "created_at": 200, "level": level, "message": message}
    created = {"id": "ftevent-ft-1-created", "created_at": 100, "level": "info"}
    assert first == {**said, **created, "message": "Created fine-tuning job: ft-1"}


def test_a_report_says_what_was_held_out_or_its_note_and_one_that_cannot_be_read_ends_the_list() -> None:
    entries = [
        b"of another program",
        report(1, held_out_loss=1.25).model_dump_json().encode(),
        report(2, note="rolled back").model_dump_json().encode(),
    ]
    noted, stepped, created = listed(Standing("running"), Reports(*entries))
    assert (noted["level"], noted["message"], noted["type"], noted["data"]) == ("warn", "rolled back", "message", None)
    assert stepped["message"] == "Step 2/9: training loss=2.0000, validation loss=1.2500"
    assert stepped["created_at"] == created["created_at"] == 100


def test_what_a_run_made_is_its_one_checkpoint() -> None:
    def found(standing: Standing) -> list[Any]:
        return asyncio.run(all_of(checkpoints(record(promote=False), standing)))

    assert found(Standing("succeeded", SUCCEEDED)) == [
        {
            "id": "ftckpt-ft-1-3", "object": "fine_tuning.job.checkpoint", "created_at": 200,
            "fine_tuning_job_id": "ft-1", "step_number": 9, "fine_tuned_model_checkpoint": "base:style@3",
            "metrics": {"step": 9, "train_loss": 1.5, "full_valid_loss": 1.75},
        }
    ]  # fmt: skip
    assert found(Standing("running")) == found(Standing("failed", FAILED)) == []


# What is asked for

ASKED: dict[str, Any] = {"model": "base", "training_file": "file-t"}


def options(held_out_lines: int = 0, **fields: Any) -> dict[str, Any]:
    return dict(checked_body(FineTuningBody, ASKED | fields).options(7, held_out_lines))


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"hyperparameters": {"n_epochs": 5}}, {"epochs": 5}),
        ({"hyperparameters": {"batch_size": 9}}, {"batch_size": 9}),
        ({"hyperparameters": {"learning_rate_multiplier": 0.5}}, {"learning_rate": LEARNING_RATE / 2}),
        ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}}}, {"epochs": 5}),
        ({"method": {"type": "supervised"}}, {}),
        ({"stoker": {"rank": 16, "promote": False}}, {"rank": 16, "promote": False}),
    ],
)
def test_a_field_becomes_its_own_option_of_the_run(fields: dict[str, Any], changed: dict[str, Any]) -> None:
    plain = {"batch_size": 4, "seed": 7, "held_out_lines": 0, "learning_rate": LEARNING_RATE, "epochs": 3}
    assert options() == plain
    assert options(**fields) == plain | changed


def test_steps_take_the_place_of_epochs_and_lines_that_are_held_out_that_of_a_share() -> None:
    asked = options(stoker={"steps": 9})
    assert asked["steps"] == 9
    assert "epochs" not in asked
    assert options(3)["held_out_lines"] == 3
    assert options(stoker={"held_out": 0.5})["held_out"] == 0.5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stoker": {"steps": 9}, "hyperparameters": {"n_epochs": 1}}, "stoker.steps"),
        ({"stoker": {"epochs": 9}}, "stoker.epochs"),
        ({"stoker": {"seed": 9}}, "stoker.seed"),
        ({"stoker": {"batch_size": 9}}, "stoker.batch_size"),
        ({"stoker": {"rnak": 9}}, "stoker"),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "hyperparameters"),
        ({"suffix": "a b"}, "suffix"),
        ({"stoker": {"rank": 0}}, "stoker.rank"),
        ({"hyperparameters": {"batch_size": 0}}, "method.supervised.hyperparameters.batch_size"),
        ({"stoker": {"held_out": 0.5}, "validation_file": "file-v"}, "stoker.held_out"),
    ],
)
def test_what_cannot_be_asked_of_a_run_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    body = checked_body(FineTuningBody, ASKED | fields)
    with pytest.raises(Refused) as refused:
        body.record("ft-1", "team", 100, "base", 7)
    assert (refused.value.status, refused.value.param) == (400, param)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"rank": True}, "stoker.rank: true given; expected a number."),
        ({"targets": [None]}, "stoker.targets.0: null given; expected a text."),
        ({"schedule": "none"}, 'stoker.schedule: "none" given; expected "constant", "linear" or "cosine".'),
        ({"a b": 1}, 'stoker."a b": no such option.'),
    ],
)
def test_an_option_of_a_run_is_shown_as_json_spells_it(own: dict[str, Any], said: str) -> None:
    body = checked_body(FineTuningBody, ASKED | {"stoker": own})
    with pytest.raises(Refused) as refused:
        body.record("ft-1", "team", 100, "base", 7)
    assert refused.value.message.startswith(said)


def test_what_is_remembered_of_a_run_is_what_was_asked() -> None:
    body = checked_body(FineTuningBody, ASKED | {"suffix": "style", "seed": 3, "metadata": {"a": "b"}})
    found = body.record("ft-1", "team", 100, "base", 7)
    assert found == record(validation_file=None, multiplier=1.0, seed=3)
    plain = checked_body(FineTuningBody, ASKED | {"stoker": {"steps": 9, "promote": False}})
    other = plain.record("ft-1", "team", 100, "base", 7)
    assert (other.seed, other.steps, other.epochs, other.promote) == (7, 9, None, False)
    assert other.adapter.startswith("ft-")
    assert other.adapter == plain.record("ft-1", "x", 1, "base", 8).adapter
    assert other.adapter != plain.record("ft-2", "team", 100, "base", 7).adapter


# What a key is counted for


def asked(settings: Settings, ask: Callable[[Keyed], Any], *, required: bool = True) -> Any:
    async def run() -> Any:
        client = AsyncClient(settings=settings)
        try:
            return await ask(Keyed(client, required=required))
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_caller_is_who_its_key_says_in_either_vendors_header(broker: Settings) -> None:
    redis = connect(broker)
    secret = api_keys.create(redis, ApiKey(client="team", created=1.0, models=("m",), tokens=60))
    for headers in (
        {"authorization": f"Bearer {secret}"},
        {"authorization": f"bearer   {secret} "},
        {"x-api-key": secret},
        {"authorization": "Basic x", "x-api-key": secret},
        {"authorization": "Bearer ", "x-api-key": secret},
    ):
        found = asked(broker, lambda access: access.caller(headers))  # noqa: B023
        assert found == Caller("team", frozenset({"m"}), secret, 60)
    of_none = api_keys.create(redis, ApiKey(client="team", created=1.0, models=()))
    found = asked(broker, lambda access: access.caller({"x-api-key": of_none}))
    assert found == Caller("team", frozenset(), of_none), "an empty list is no model, and not all of them"
    for headers in (
        {},
        {"authorization": secret},
        {"authorization": f"Bearer {secret}", "x-api-key": "x"} | {"authorization": "Bearer other"},
    ):
        with pytest.raises(Refused) as refused:
            asked(broker, lambda access: access.caller(headers))  # noqa: B023
        assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
    redis.flushall()
    assert asked(broker, lambda access: access.caller({}), required=False) == Caller()
    assert asked(broker, lambda access: access.caller({"x-api-key": "any"}), required=False) == Caller()
    for headers, required in (({}, True), ({"x-api-key": secret}, False)):
        with pytest.raises(Refused):
            asked(broker, lambda access: access.caller(headers), required=required)  # noqa: B023
    redis.close()


def test_tokens_are_counted_for_a_key_that_has_a_limit_and_an_answer_outlives_their_count(
    broker: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    redis = connect(broker)
    secret = f"{api_keys.BEGINNING}x"
    bucket = keys.rate(api_keys.digest(secret)[: api_keys.ID])
    for caller, tokens in ((Caller("team", None, secret, 60), 0), (Caller("team", None, secret), 5), (Caller(), 5)):
        asked(broker, lambda access: access.spend(caller, tokens))  # noqa: B023
        assert not redis.exists(bucket)
    assert not caplog.records, "nothing is asked of the broker that it would refuse"
    asked(broker, lambda access: access.spend(Caller("team", None, secret, 60), 5))
    assert 55 <= float(redis.hget(bucket, "tokens")) < 56
    redis.close()
    away = Settings(url="redis://127.0.0.1:1/0", patience=0.1)
    asked(away, lambda access: access.spend(Caller("team", None, secret, 60), 5))
    assert "5 tokens of client team are not counted: no answer from the broker" in caplog.text

"""`/v1/fine_tuning/jobs`, asked by OpenAI's own package."""

from __future__ import annotations

import json
import runpy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from stoker import AsyncClient, Client
from stoker.broker import keys, policy, registry
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.outcome import JobStatus, result_as
from stoker.client._async.jobs import AsyncTrainJob
from stoker.client._sync.jobs import TrainJob
from stoker.contract import ModelCard, TrainReport, TrainRequest, TrainResult, Usage
from stoker.contract.codec import read
from stoker.errors import BrokerUnavailable, JobCancelled, JobDead, JobFailed, JobTimeout, QueueFull, StokerError
from stoker.gateway.fine_tuning_body import FineTuningBody
from stoker.local.stack import Stack
from stoker.settings import Settings
from tests.conftest import GENERATE_MODEL
from tests.docs.pages import ROOT, code, rows
from tests.gateway.machinery import Served, gateway_of, gateway_over
from tests.gateway.test_keys import made

CARD = ModelCard(model="m", architecture="x", kinds=("generate", "train"), context=64, parameters=1)
LINE = b'{"prompt": "Q: coal?\\nA:", "completion": " Old wood."}'
LINES, HELD_OUT = LINE + b"\n\n" + LINE, LINE.replace(b"coal", b"ash")


@pytest.fixture
def redis(broker: Settings) -> Iterator[Any]:
    found = connect(broker)
    found.hset(keys.MODELS, "m/1", CARD.model_copy(update={"seen": time.time()}).model_dump_json())
    found.expire(keys.MODELS, 60)
    yield found
    found.close()


@pytest.fixture(scope="module")
def pooled(running: Served) -> Served:
    return running


@pytest.fixture
def served(pooled: Served, broker: Settings, redis: Any) -> Iterator[Served]:
    gateway = gateway_over(broker)
    pooled.over(gateway)
    yield pooled
    pooled.closing(gateway.client)


def client_of(served: Served, secret: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=secret, max_retries=0, timeout=20)


@pytest.fixture
def api(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served, "none") as client:
        yield client


def uploaded(api: openai.OpenAI, data: bytes = LINES, purpose: Any = "fine-tune") -> str:
    return api.files.create(file=("style.jsonl", data), purpose=purpose).id


def started(api: openai.OpenAI, **fields: Any) -> FineTuningJob:
    job = api.fine_tuning.jobs.create(**{"model": "m", "training_file": uploaded(api), **fields})
    assert isinstance(job, FineTuningJob)
    return job


def sent(redis: Any, job_id: str) -> TrainRequest:
    return read(TrainRequest, redis.hget(keys.job(job_id), Field.REQUEST).decode())


def reported(redis: Any, job_id: str, steps: int) -> None:
    """As a worker's publisher does it."""
    for index in range(steps):
        report = TrainReport(
            index=index, step=index + 1, steps=steps, loss=2.0 - index, learning_rate=0.1, gradient_norm=1.0, tokens=9,
            tokens_per_second=1.0, published=1000.0 + index, note="diverged; rolled back" if index == 1 else "",
            held_out_loss=1.5 if index + 1 == steps else None, last=index + 1 == steps,
        )  # fmt: skip
        redis.xadd(keys.stream(job_id), {"entry": report.model_dump_json()}, id=keys.entry_id(index))
    redis.expire(keys.stream(job_id), 60)


def ended(redis: Any, job_id: str, **fields: Any) -> None:
    redis.set(keys.result(job_id), json.dumps(fields), ex=60)


def succeeded(redis: Any, job_id: str, adapter: str) -> None:
    known = {"job": job_id, "time": 5000.5, "steps": 2, "loss": 0.5, "held_out_loss": 1.5}
    registry.register(redis, "m", adapter, 4, known, promote=True)
    result = TrainResult(
        model="m", adapter=adapter, version=4, steps=3, first_loss=2.0, last_loss=0.5, best_step=2, held_out_loss=1.5,
        tokens=27, usage=Usage(),
    )  # fmt: skip
    ended(redis, job_id, status="SUCCESS", result=result.model_dump(mode="json"))


@contextmanager
def training_of(broker: Settings, client: str) -> Iterator[TrainJob]:
    """A job that a client has sent without the gateway."""
    with Client(settings=broker.model_copy(update={"client_key": client})) as sender:
        yield sender.train("secret", [{"prompt": "Q", "completion": "A"}], model="m", job_id="nightly")


def forget(redis: Any, job_id: str) -> None:
    """What a day does."""
    redis.delete(keys.result(job_id), keys.stream(job_id), keys.job(job_id))


def test_what_is_asked_for_is_what_the_run_is(api: openai.OpenAI, redis: Any) -> None:
    training, validation = uploaded(api), uploaded(api, HELD_OUT)
    job = started(
        api, training_file=training, validation_file=validation, suffix="house-style", seed=7, metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 2, "batch_size": 1, "learning_rate_multiplier": 5}}},
        extra_body={"stoker": {"rank": 4, "max_length": 64, "priority": 2}},
    )  # fmt: skip
    asked = sent(redis, job.id)
    assert (asked.model, asked.name, asked.epochs, asked.batch_size, asked.seed) == ("m", "house-style", 2, 1, 7)
    assert (asked.held_out_lines, asked.rank, asked.max_length, asked.priority) == (1, 4, 64, 2)
    assert asked.learning_rate == pytest.approx(1e-3)
    data = redis.get(keys.blob(asked.dataset)).splitlines()
    assert [json.loads(line)["prompt"] for line in data] == ["Q: coal?\nA:", "Q: coal?\nA:", "Q: ash?\nA:"]
    assert (job.status, job.model, job.training_file, job.validation_file) == ("queued", "m", training, validation)
    assert (job.seed, job.metadata, job.fine_tuned_model, job.error) == (7, {"team": "a"}, None, None)
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == job.hyperparameters.n_epochs == 2
    assert job.hyperparameters.learning_rate_multiplier == pytest.approx(5)
    assert api.fine_tuning.jobs.retrieve(job.id) == job
    assert [event.message for event in api.fine_tuning.jobs.list_events(job.id)] == [
        f"Created fine-tuning job: {job.id}"
    ]


def test_files_of_a_run_may_each_begin_with_a_byte_order_mark(api: openai.OpenAI, redis: Any) -> None:
    """As editors on Windows write them."""
    training, validation = (uploaded(api, b"\xef\xbb\xbf" + lines) for lines in (LINES, HELD_OUT))
    asked = sent(redis, started(api, training_file=training, validation_file=validation).id)
    data = redis.get(keys.blob(asked.dataset)).splitlines()
    assert [json.loads(line)["prompt"] for line in data] == ["Q: coal?\nA:", "Q: coal?\nA:", "Q: ash?\nA:"]


def test_without_hyperparameters_a_run_has_the_defaults_and_a_name_of_its_own(api: openai.OpenAI, redis: Any) -> None:
    for fields in (
        {},
        {"hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}},
        {"method": {"type": "supervised"}},
    ):
        asked = sent(redis, started(api, **fields).id)
        assert (asked.epochs, asked.batch_size, asked.learning_rate, asked.held_out_lines) == (3, 4, 2e-4, 0)
        assert asked.name.startswith("ft-")
    asked = sent(redis, started(api, extra_body={"stoker": {"steps": 5, "promote": False}}).id)
    assert (asked.epochs, asked.steps, asked.promote) == (None, 5, False)
    assert len({job.id for job in api.fine_tuning.jobs.list()}) == 4


def test_a_run_that_has_ended_has_its_model_its_events_and_its_checkpoint(api: openai.OpenAI, redis: Any) -> None:
    job = started(api, suffix="house-style")
    reported(redis, job.id, 3)
    succeeded(redis, job.id, "house-style")
    done = api.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.finished_at) == ("succeeded", "m:house-style", 5000)
    assert (done.trained_tokens, done.error) == (27, None)
    events = list(api.fine_tuning.jobs.list_events(job.id, limit=2))
    assert [event.created_at for event in events] == [5000, 1002, 1001, 1000, job.created_at], "page by page"
    assert [event.level for event in events] == ["info", "info", "warn", "info", "info"]
    assert [event.type for event in events[:3]] == ["message", "metrics", "message"]
    assert "m:house-style" in events[0].message
    assert events[1].message == "Step 3/3: training loss=0.0000, validation loss=1.5000"
    numbers: Any = events[1].data
    assert (numbers["step"], numbers["train_loss"], numbers["valid_loss"]) == (3, 0.0, 1.5)
    (checkpoint,) = api.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == "m:house-style@4"
    assert (checkpoint.step_number, checkpoint.metrics.full_valid_loss) == (2, 1.5)
    assert (checkpoint.metrics.step, checkpoint.metrics.train_loss) == (2, 0.5), "of the weights that it has"
    # A day later.
    forget(redis, job.id)
    assert api.fine_tuning.jobs.retrieve(job.id) == done
    assert len(list(api.fine_tuning.jobs.list_events(job.id))) == 2


def test_a_run_that_nobody_asked_for_within_a_day_is_found_by_what_it_made(api: openai.OpenAI, redis: Any) -> None:
    job = started(api, suffix="house-style", extra_body={"stoker": {"promote": False}})
    succeeded(redis, job.id, "house-style")
    forget(redis, job.id)
    done = api.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.finished_at) == ("succeeded", "m:house-style@4", 5000)


def test_what_another_job_has_made_of_the_adapter_is_no_end_of_the_run(api: openai.OpenAI, redis: Any) -> None:
    job = started(api, suffix="house-style")
    registry.register(redis, "m", "house-style", 4, {"job": "another", "time": 5000.5, "steps": 3}, promote=True)
    forget(redis, job.id)
    assert api.fine_tuning.jobs.retrieve(job.id).status == "validating_files"


def test_a_run_whose_job_is_gone_has_failed_once_it_must_have_been_sent(api: openai.OpenAI, redis: Any) -> None:
    job = started(api)
    forget(redis, job.id)
    assert api.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
    record = json.loads(redis.get(keys.fine_tune(job.id)))
    redis.set(keys.fine_tune(job.id), json.dumps({**record, "created": record["created"] - 601}), ex=60)
    failed = api.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "job_not_found"
    assert failed.finished_at == record["created"] - 601 + 600, "and always so"


@pytest.mark.parametrize("kind", [JobFailed, JobDead])
def test_a_run_that_failed_says_why_and_a_dead_one_may_go_on(api: openai.OpenAI, redis: Any, kind: type) -> None:
    job = started(api)
    ended(redis, job.id, status="FAILURE", result={"exc_type": kind.__name__, "exc_message": ["training diverged."]})
    failed = api.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.fine_tuned_model) == ("failed", None)
    assert failed.error is not None
    assert failed.error.message == "training diverged."
    event = next(iter(api.fine_tuning.jobs.list_events(job.id)))
    assert (event.level, "training diverged" in event.message) == ("error", True)
    assert list(api.fine_tuning.jobs.checkpoints.list(job.id)) == []
    redis.delete(keys.result(job.id))
    assert api.fine_tuning.jobs.retrieve(job.id).status == "queued"


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "REVOKED"])
def test_how_a_run_ended_is_written_down_once_however_often_it_is_looked_at(
    api: openai.OpenAI, redis: Any, status: str
) -> None:
    def written() -> int:
        return int(redis.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"])

    job = started(api)
    if status == "SUCCESS":
        succeeded(redis, job.id, job.fine_tuned_model or json.loads(redis.get(keys.fine_tune(job.id)))["adapter"])
    else:
        ended(redis, job.id, status=status, result={"exc_type": "JobFailed", "exc_message": ["it failed."]})
    first = api.fine_tuning.jobs.retrieve(job.id)
    before = written()
    assert [api.fine_tuning.jobs.retrieve(job.id) for _ in range(2)] == [first] * 2
    assert first.finished_at
    assert written() == before
    if status != "SUCCESS":
        # An hour later.
        record = json.loads(redis.get(keys.fine_tune(job.id)))
        record["ending"]["finished"] -= 3600
        redis.set(keys.fine_tune(job.id), json.dumps(record), keepttl=True)
        assert api.fine_tuning.jobs.retrieve(job.id).finished_at == first.finished_at - 3600


@pytest.mark.parametrize("died", [7000.5, None])
def test_a_dead_run_has_ended_when_its_last_worker_went_silent(
    api: openai.OpenAI, redis: Any, died: float | None
) -> None:
    job = started(api)
    history = [{"worker": "a@h/1", "time": 6000.5}, {"worker": "b@h/2", "time": died}]
    letter = {"kind": "train", "model": "m", "request": "{}", "client": "default", "history": history}
    redis.hset(keys.DEAD, job.id, json.dumps(letter))
    redis.expire(keys.DEAD, 60)
    ended(redis, job.id, status="FAILURE", result={"exc_type": "JobDead", "exc_message": ["it crashed."]})
    failed = api.fine_tuning.jobs.retrieve(job.id)
    assert failed.status == "failed"
    assert failed.finished_at == 7000 if died else (failed.finished_at or 0) > 7000
    if died:
        assert next(iter(api.fine_tuning.jobs.list_events(job.id))).created_at == 7000


def test_a_dead_run_whose_letter_is_gone_is_sent_anew_under_its_id(api: openai.OpenAI, redis: Any) -> None:
    job = started(api, extra_headers={"idempotency-key": "run-1"})
    ended(redis, job.id, status="FAILURE", result={"exc_type": "JobDead", "exc_message": ["it crashed."]})
    assert api.fine_tuning.jobs.retrieve(job.id).status == "failed"
    forget(redis, job.id)
    assert started(api, extra_headers={"idempotency-key": "run-1"}).status == "queued"
    assert sent(redis, job.id).model == "m"


@pytest.mark.parametrize("error", [BrokerUnavailable("away."), JobTimeout("slow.")])
def test_a_result_that_cannot_be_read_for_now_is_no_end_of_the_run(
    api: openai.OpenAI, redis: Any, monkeypatch: pytest.MonkeyPatch, error: StokerError
) -> None:
    async def raising(job: AsyncTrainJob, timeout: float) -> None:
        raise error

    job = started(api)
    succeeded(redis, job.id, "style")
    with monkeypatch.context() as away:
        away.setattr(AsyncTrainJob, "result", raising)
        with pytest.raises(openai.InternalServerError):
            api.fine_tuning.jobs.retrieve(job.id)
    assert api.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


def test_a_run_that_is_there_stays_when_it_is_asked_for_again_in_vain(
    api: openai.OpenAI, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*arguments: Any, **fields: Any) -> None:
        raise QueueFull("full.")

    kept = started(api, seed=1, extra_headers={"idempotency-key": "run-1"})
    # The broker knows its job no longer: it ended long ago.
    redis.delete(keys.job("run-1"))
    monkeypatch.setattr(AsyncClient, "train", full)
    for name in ("run-1", "run-2"):
        with pytest.raises(openai.RateLimitError):
            started(api, extra_headers={"idempotency-key": name})
    assert [job.id for job in api.fine_tuning.jobs.list()] == [kept.id]


@pytest.mark.parametrize("sent_first", [True, False])
def test_a_run_whose_job_came_to_the_broker_is_known_also_where_the_answer_is_lost(
    api: openai.OpenAI, redis: Any, monkeypatch: pytest.MonkeyPatch, sent_first: bool
) -> None:
    train = AsyncClient.train

    async def cut_off(*arguments: Any, **fields: Any) -> None:
        if sent_first:
            await train(*arguments, **fields)
        raise BrokerUnavailable("away.")

    monkeypatch.setattr(AsyncClient, "train", cut_off)
    with pytest.raises(openai.InternalServerError):
        started(api)
    assert [job.status for job in api.fine_tuning.jobs.list()] == (["queued"] if sent_first else [])


def test_a_run_stays_where_nobody_can_say_whether_its_job_came(
    api: openai.OpenAI, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None])

    async def away(*arguments: Any, **fields: Any) -> None:
        raise BrokerUnavailable("away.")

    async def once(client: AsyncClient, job_id: str) -> str | None:
        for answer in answers:
            return answer
        raise BrokerUnavailable("away.")

    with monkeypatch.context() as broken:
        broken.setattr(AsyncClient, "train", away)
        broken.setattr(AsyncClient, "sender", once)
        with pytest.raises(openai.InternalServerError) as refused:
            started(api)
    assert refused.value.status_code == 503
    assert [job.status for job in api.fine_tuning.jobs.list()] == ["validating_files"]


def test_a_run_that_is_sent_again_has_the_seed_that_it_had(
    api: openai.OpenAI, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that names no seed gets one, and the record of the first time says which."""
    seeds = list[int]()
    train = AsyncClient.train

    async def noted(*arguments: Any, **fields: Any) -> Any:
        seeds.append(fields["seed"])
        return await train(*arguments, **fields)

    monkeypatch.setattr(AsyncClient, "train", noted)
    name = {"idempotency-key": "run-1"}
    found = [started(api, extra_headers=name).seed for _ in range(2)]
    assert seeds == found
    assert len(set(found)) == 1
    assert sent(redis, "run-1").seed == found[0]
    assert started(api).seed != found[0]


def test_a_run_can_be_cancelled_once_and_for_all(api: openai.OpenAI, broker: Settings, redis: Any) -> None:
    job = started(api)
    cancelled = api.fine_tuning.jobs.cancel(job.id)
    assert (cancelled.status, cancelled.error) == ("cancelled", None)
    with Client(settings=broker) as client, pytest.raises(JobCancelled):
        client.job(job.id).result(5)
    forget(redis, job.id)
    assert api.fine_tuning.jobs.cancel(job.id) == cancelled == api.fine_tuning.jobs.retrieve(job.id)
    assert next(iter(api.fine_tuning.jobs.list_events(job.id))).message == "The job was cancelled"


def test_runs_of_one_client_are_not_there_for_another(served: Served, redis: Any) -> None:
    with client_of(served, made(redis)) as team, client_of(served, made(redis, client="other", created=2.0)) as other:
        job = started(team, extra_headers={"idempotency-key": "run-1"})
        assert job.id == "run-1"
        assert list(other.fine_tuning.jobs.list()) == []
        for ask in (other.fine_tuning.jobs.retrieve, other.fine_tuning.jobs.cancel, other.fine_tuning.jobs.list_events):
            with pytest.raises(openai.NotFoundError, match="you have no run of that id"):
                ask(job.id)
        with pytest.raises(openai.NotFoundError, match="training_file"):
            other.fine_tuning.jobs.create(model="m", training_file=job.training_file)
        with pytest.raises(openai.ConflictError, match="id is taken"):
            started(other, extra_headers={"idempotency-key": "run-1"})
        # Sent twice it is one run.
        again = team.fine_tuning.jobs.create(
            model="m", training_file=job.training_file, extra_headers={"idempotency-key": "run-1"}
        )
        assert again == job
        assert [found.id for found in team.fine_tuning.jobs.list()] == ["run-1"]


def test_a_job_that_another_client_has_sent_makes_no_run(
    served: Served, broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(AsyncClient, "train")
    with training_of(broker, "victim"), client_of(served, made(redis)) as team:
        with pytest.raises(openai.ConflictError, match="id is taken"):
            started(team, extra_headers={"idempotency-key": "nightly"})
        with pytest.raises(openai.NotFoundError):
            team.fine_tuning.jobs.cancel("nightly")
        assert list(team.fine_tuning.jobs.list()) == []


def test_a_job_that_another_client_sends_meanwhile_makes_no_run(
    served: Served, broker: Settings, redis: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*arguments: Any, **fields: Any) -> Any:
        with training_of(broker, "victim"):
            return await train(*arguments, **fields)

    train = AsyncClient.train
    monkeypatch.setattr(AsyncClient, "train", late)
    with client_of(served, made(redis)) as team:
        with pytest.raises(openai.ConflictError, match="id is taken"):
            started(team, extra_headers={"idempotency-key": "nightly"})
        assert list(team.fine_tuning.jobs.list()) == []


def test_a_run_whose_id_is_anothers_job_by_now_shows_and_cancels_nothing_of_it(
    served: Served, broker: Settings, redis: Any
) -> None:
    with client_of(served, made(redis)) as team:
        started(team, extra_headers={"idempotency-key": "nightly"})
        forget(redis, "nightly")
        with training_of(broker, "victim") as job:
            reported(redis, "nightly", 2)
            events = [event.message for event in team.fine_tuning.jobs.list_events("nightly")]
            assert events == ["Created fine-tuning job: nightly"]
            assert team.fine_tuning.jobs.cancel("nightly").status == "validating_files"
            assert job.status() is JobStatus.QUEUED


def test_lists_come_page_by_page_the_newest_first(api: openai.OpenAI, redis: Any) -> None:
    file = uploaded(api)
    ids = [api.fine_tuning.jobs.create(model="m", training_file=file).id for _ in range(4)]
    for age, job_id in enumerate(ids):
        redis.zadd(keys.fine_tunes("default"), {job_id: time.time() + age})
    assert [job.id for job in api.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in api.fine_tuning.jobs.list(limit=2).data] == ids[:1:-1]
    assert [job.id for job in api.fine_tuning.jobs.list(limit=1, after=ids[2]).data] == [ids[1]]
    assert [job.id for job in api.fine_tuning.jobs.list(after=ids[1])] == ids[:1]
    # What another program wrote there is no run.
    redis.set(keys.fine_tune(ids[0]), "{", ex=60)
    assert [job.id for job in api.fine_tuning.jobs.list()] == ids[:0:-1]
    for query in ({"limit": 0}, {"after": "unknown"}, {"order": "asc"}, {"metadata[a]": "b"}):
        with pytest.raises(openai.BadRequestError) as caught:
            api.fine_tuning.jobs.list(extra_query=query)
        assert caught.value.param == next(iter(query))


HYPER = "method.supervised.hyperparameters"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "m:house-style"}, "model"),
    ({"model": "other"}, "model"),
    ({"suffix": "House Style"}, "suffix"),
    ({"seed": -1}, "seed"),
    ({"method": {"type": "dpo"}}, "method.type"),
    ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters"),
    ({"hyperparameters": {"n_epochs": 0}}, f"{HYPER}.n_epochs"),
    ({"hyperparameters": {"n_epochs": "all"}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 1000}}, f"{HYPER}.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, f"{HYPER}.learning_rate_multiplier"),
    ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"integrations": [{"type": "wandb"}]}, "integrations"),
    ({"stoker": {"rank": 0}}, "stoker.rank"),
    ({"stoker": {"ranks": 4}}, "stoker"),
    ({"stoker": {"seed": 4}}, "stoker.seed"),
    ({"stoker": {"steps": 4}, "hyperparameters": {"n_epochs": 1}}, "stoker.steps"),
    ({"stoker": {"steps": "many"}}, "stoker.steps"),
    ({"stoker": {"held_out": 0.1}, "validation_file": "file-1"}, "stoker.held_out"),
    ({"training_file": "file-1"}, "training_file"),
    ({"validation_file": "file-1"}, "validation_file"),
    ({"n_epochs": 3}, "n_epochs"),
]


def test_what_cannot_be_done_is_refused_by_name_and_leaves_no_run(api: openai.OpenAI, redis: Any) -> None:
    file = uploaded(api)
    for fields, param in REFUSED:
        body = {"model": "m", "training_file": file, **fields}
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as caught:
            api.post("/fine_tuning/jobs", body=body, cast_to=FineTuningJob)
        assert caught.value.param == param, fields
    assert list(api.fine_tuning.jobs.list()) == []
    assert not redis.keys(keys.job("*"))


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_wrong_line_is_named_with_its_file(api: openai.OpenAI, field: str) -> None:
    for data, where in (
        (LINE + b'\n{"prompt": "x"}', "line 2"),
        (b"\n", ""),
        (b"\xff\xfe", ""),
        (b'{"text": ""}', "line 1"),
    ):
        with pytest.raises(openai.BadRequestError, match=f"{field}: style.jsonl.*{where}") as caught:
            started(api, **{field: uploaded(api, data)})
        assert caught.value.param == field


def test_a_file_for_something_else_is_refused(api: openai.OpenAI) -> None:
    other, mine = uploaded(api, purpose="batch"), uploaded(api)
    for field, files in (("training_file", (other, None)), ("validation_file", (mine, other))):
        with pytest.raises(openai.BadRequestError) as refused:
            started(api, training_file=files[0], **({} if files[1] is None else {"validation_file": files[1]}))
        said: Any = refused.value.body
        assert said["message"] == f"{field}: {other} was uploaded for batch; upload it for fine-tune."
        assert said["param"] == field


def test_a_full_queue_takes_no_run_and_the_same_id_may_come_again(api: openai.OpenAI, redis: Any) -> None:
    policy.decide(redis, "client_limit", 1)
    first = started(api)
    with pytest.raises(openai.RateLimitError):
        started(api, extra_headers={"idempotency-key": "run-2"})
    assert [job.id for job in api.fine_tuning.jobs.list()] == [first.id]
    policy.decide(redis, "client_limit", None)
    assert started(api, extra_headers={"idempotency-key": "run-2"}).id == "run-2"


def test_a_page_of_a_browser_cancels_nothing(api: openai.OpenAI) -> None:
    job = started(api)
    with pytest.raises(openai.PermissionDeniedError):
        api.fine_tuning.jobs.cancel(job.id, extra_headers={"origin": "https://elsewhere.example"})
    assert api.fine_tuning.jobs.retrieve(job.id).status == "queued"


@pytest.mark.integration
def test_a_real_run_makes_a_model_that_answers_at_once(
    stack: Stack, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gateway_of(stack.settings) as api:
        monkeypatch.setenv("OPENAI_BASE_URL", str(api.base_url))
        said = runpy.run_path(str(ROOT / "examples" / "fine_tuning.py"), run_name="__main__")
        run, answer = said["run"], said["answer"]
        assert (run.status, run.fine_tuned_model) == ("succeeded", f"{GENERATE_MODEL}:fireside")
        assert (answer.model, answer.usage.completion_tokens > 0) == (run.fine_tuned_model, True)
        events = list(api.fine_tuning.jobs.list_events(run.id))
        assert [event.type for event in events] == ["message", "metrics", "message"]
        times = [event.created_at for event in events]
        assert times == sorted(times, reverse=True)
        assert times[-1] == run.created_at
        assert run.fine_tuned_model in {model.id for model in api.models.list()}
        assert result_as(TrainResult, client.link.value(run.id, 10)).steps == 1


def test_each_field_is_in_the_table_of_the_page() -> None:
    said = {code(row[0])[0]: row[1] for row in rows("docs/gateway.md", "field of a run")}
    assert {name for name, cell in said.items() if cell == "refused"} == set(FineTuningBody.REFUSED)
    assert {name for name, cell in said.items() if cell != "refused"} == set(FineTuningBody.model_fields)


def test_a_wrong_type_of_body_is_refused(served: Served) -> None:
    answer = httpx2.post(f"{served.url}/v1/fine_tuning/jobs", content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415

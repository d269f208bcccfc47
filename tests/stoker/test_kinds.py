"""One table of job kinds: what clients, workers and the engine hold for each kind, they hold for every kind."""

from __future__ import annotations

import json

import pytest

from stoker.broker.envelope import envelope
from stoker.broker.keys import queue
from stoker.client._async.jobs import JOBS as ASYNC_JOBS
from stoker.client._sync.jobs import JOBS
from stoker.contract.kinds import ADAPTERS, EMBED, GENERATE, KINDS, TRAIN, JobKind, of_queue, of_request, of_task
from stoker.local.stack import worker_command
from stoker.settings import Settings


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_kind_is_found_by_its_name_its_task_and_its_request(kind: JobKind) -> None:
    assert all(of_queue(queue(model, kind.name)) is kind for model in ("m", "a.train", "train.generate.v2"))
    assert of_queue(f"stoker.m.{kind.name}.v12") is kind
    assert KINDS[kind.name] is of_task(kind.task) is of_request(kind.request) is kind
    assert json.loads(envelope("job", kind.name, "m", f"stoker.m.{kind.name}"))["headers"]["task"] == kind.task


@pytest.mark.parametrize("queue", ["", "garbage", "stoker.m.evil", "stoker.embed.m"])
def test_a_queue_of_no_kind_is_of_none(queue: str) -> None:
    assert of_queue(queue) is None


def test_the_names_of_the_kinds_are_those_of_queues_that_exist() -> None:
    """Jobs wait under these names while clients and workers are updated."""
    assert list(KINDS) == ["embed", "generate", "train", "adapters"]


def test_clients_have_a_job_and_workers_have_room_for_each_kind() -> None:
    assert JOBS.keys() == ASYNC_JOBS.keys() == Settings().slots.keys() == KINDS.keys()
    assert all(slots > 0 for slots in Settings().slots.values())


def test_a_worker_has_a_thread_for_each_job_that_it_may_hold() -> None:
    settings = Settings(generate_slots=5, embed_jobs=7, train_runs=3)
    assert {GENERATE.name: 5, EMBED.name: 7, TRAIN.name: 3}.items() <= settings.slots.items()
    assert f"--concurrency={15 + settings.slots[ADAPTERS.name] + settings.extra_slots}" in worker_command(settings, "w")


def test_a_reader_waits_for_each_token_of_generation_alone() -> None:
    assert [kind for kind in KINDS.values() if kind.urgent] == [GENERATE]
    assert [kind for kind in KINDS.values() if kind.weight is None] == [TRAIN], "its share is a setting"


def test_training_alone_goes_back_at_once_and_has_a_short_ready_list() -> None:
    assert [kind for kind in KINDS.values() if not kind.grace] == [TRAIN]
    assert TRAIN.ready == 1 < min(kind.ready for kind in KINDS.values() if kind is not TRAIN)

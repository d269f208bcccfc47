"""The monitor with a real worker: what Flower says of jobs that run."""

from __future__ import annotations

import re

import pytest

from stoker import Client, JobStatus
from stoker.broker import keys
from stoker.contract.presence import node_of
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import EMBED_MODEL, wait_until
from tests.integration.test_training import ROWS
from tests.monitor.conftest import Running

pytestmark = pytest.mark.integration


def test_a_run_says_how_far_it_is_and_ends_when_flower_terminates_it(monitor: Running, client: Client) -> None:
    run = client.train("watched", ROWS, model=endless.MODEL, steps=5000, batch_size=1, max_length=32)

    def progress() -> str:
        return str(monitor.ask(f"/api/task/info/{run.id}").json["progress"])

    wait_until(lambda: monitor.state(run.id) == "STARTED", "it runs", 60)
    wait_until(lambda: re.fullmatch(r"step \d+/5000 · loss \d+\.\d\d · \d+ tokens/s", progress()), "its progress", 60)
    wait_until(lambda: len(monitor.seen()["runs"][0]["points"]) >= 3, "its curve", 60)
    assert monitor.state(run.id) == "STARTED"
    page = monitor.ask(f"/task/{run.id}").text
    assert 'id="task-terminate"' in page
    assert "step " in page
    assert monitor.ask(f"/api/task/revoke/{run.id}", {"terminate": "true"}).status == 200
    wait_until(lambda: monitor.state(run.id) == "REVOKED", "it has ended", 30)
    assert run.status() == JobStatus.CANCELLED
    task = monitor.ask(f"/api/task/info/{run.id}").json
    (worker,) = client.workers()
    assert (task["name"], node_of(worker.worker) in task["worker"]) == ("stoker.train", True)
    wait_until(lambda: not monitor.seen()["runs"][0]["running"], "the page says so too")


def test_short_jobs_are_all_there_with_their_arguments_and_without_their_texts(
    monitor: Running, client: Client
) -> None:
    wait_until(lambda: _hears_of(monitor, client), "events come", 30)
    sent = [client.embed([f"a secret {number}"], model=EMBED_MODEL) for number in range(20)]
    spoken = client.generate("Once upon a secret", model=endless.MODEL, max_tokens=4)
    for job in sent:
        job.result(60)
    text = spoken.result(60).text
    ids = [job.id for job in sent] + [spoken.id]
    wait_until(lambda: all(monitor.state(job_id) == "SUCCESS" for job_id in ids), "all have ended", 30)
    tasks = [monitor.ask(f"/api/task/info/{job_id}") for job_id in ids]
    wait_until(lambda: all(monitor.ask(f"/api/task/info/{job_id}").json["sent"] for job_id in ids), "all are described")
    tasks = [monitor.ask(f"/api/task/info/{job_id}") for job_id in ids]
    assert all("'client': 'default'" in task.json["kwargs"] for task in tasks)
    assert not any("secret" in task.text or text in task.text for task in tasks)


def test_queues_are_right_though_a_lane_is_full(monitor: Running, client: Client, stack: Stack) -> None:
    slots = stack.settings.generate_slots
    jobs = [
        client.generate("Once upon a time", model=endless.MODEL, max_tokens=2000, ignore_eos=True)
        for _ in range(slots + 12)
    ]
    name = keys.queue(endless.MODEL, "generate")

    def queue() -> dict[str, int]:
        (found,) = [queue for queue in monitor.seen()["queues"] if queue["name"] == name]
        return {"waiting": found["waiting"], "running": found["running"]}

    try:
        wait_until(lambda: queue() == {"waiting": 12, "running": slots}, "the lane is full", 60)
        lengths = {each["name"]: each["messages"] for each in monitor.ask("/api/queues/length").json["active_queues"]}
        assert lengths[name] == 12
        assert all(job["worker"] for job in monitor.seen()["running"])
    finally:
        for job in jobs:
            job.cancel()
    wait_until(lambda: {monitor.state(job.id) for job in jobs} == {"REVOKED"}, "each ends as revoked", 60)


def _hears_of(monitor: Running, client: Client) -> bool:
    """Whether the worker was asked by now to send events of its jobs: else the shortest ones pass unseen."""
    job = client.embed(["probe"], model=EMBED_MODEL)
    job.result(60)
    return monitor.state(job.id) != ""

"""Nothing lost, nothing twice: ids, deadlines, priorities, zombies, orphans, dead letters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from stoker import Client, GenerateJob, JobStatus
from stoker.broker import keys, ledger
from stoker.broker.ledger.record import Field
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.errors import DeadlineExceeded, InvalidRequest, JobCancelled, JobDead, JobLost
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import GENERATE_MODEL, alive, wait_until
from tests.gateway.machinery import gateway_of
from tests.integration.machinery import (
    GOLDENS,
    TINY,
    TINY_MODEL,
    FragileBroker,
    endless_in,
    long_answer,
    owner_in_the_middle,
    patient_client,
    two_workers_on,
    worker_on,
)
from workers.machine import device_here
from workers.neighbours import StreamLocks, neighbours_of

pytestmark = pytest.mark.integration

GOLDEN = GOLDENS[0]


def test_the_same_id_twice_is_one_job(client: Client) -> None:
    first = client.generate("One", model=endless.MODEL, max_tokens=8, job_id="order-66")
    second = client.generate("Another", model=endless.MODEL, max_tokens=8, job_id="order-66")
    assert first.result(30) == second.result(30)
    third = client.generate("Yet another", model=endless.MODEL, max_tokens=8, job_id="order-66")
    assert third.result(30) == first.result(30)


def test_an_id_that_could_be_a_key_of_something_else_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="job_id"):
        client.generate("x", model=endless.MODEL, job_id="a:b")


def test_a_deadline_ends_a_running_job(client: Client) -> None:
    job = client.generate("x", model=endless.MODEL, max_tokens=4000, deadline=0.5)
    with pytest.raises(DeadlineExceeded):
        job.result(30)
    assert job.status() == JobStatus.FAILED


def test_a_deadline_that_passes_in_the_queue_ends_the_job_before_it_runs(client: Client) -> None:
    blocker = client.train("blocker", [{"text": "a b"}], model=endless.MODEL, steps=100_000, max_length=16)
    next(iter(blocker.progress(timeout=60)))
    late = client.train("late", [{"text": "a b"}], model=endless.MODEL, steps=1, max_length=16, deadline=0.2)
    wait_until(lambda: client.jobs()[late.id]["age"] > 0.3, "the deadline has passed")
    blocker.cancel()
    with pytest.raises(DeadlineExceeded, match=r"past its deadline of 0\.2 s"):
        late.result(30)


def test_a_job_of_higher_priority_is_served_first(client: Client) -> None:
    blocker = client.train("blocker", [{"text": "a b"}], model=endless.MODEL, steps=100_000, max_length=16)
    next(iter(blocker.progress(timeout=60)))
    low = client.train("low", [{"text": "a b"}], model=endless.MODEL, priority=9, steps=1, max_length=16)
    high = client.train("high", [{"text": "a b"}], model=endless.MODEL, priority=0, steps=1, max_length=16)
    blocker.cancel()
    assert high.result(30).usage.queued_seconds < low.result(30).usage.queued_seconds


def test_a_full_lane_asks_for_nothing_and_each_other_lane_waits_by_itself(client: Client) -> None:
    """No lane waits for the end of another one's wait: `tests/workers/test_consumer.py` shows it in steps."""

    def waits() -> int:
        return sum("b" in each["flags"] and each["cmd"] == "brpop" for each in client.redis.client_list())

    # One for each lane, and one in which the worker waits for commands about its models.
    every = len(client.workers()[0].lanes) + 1
    wait_until(lambda: waits() == every, "each lane asks for jobs")
    rows = [{"text": "a b"}]
    blocker = client.train("blocker", rows, model=endless.MODEL, max_length=16, steps=100_000)
    next(iter(blocker.progress(timeout=60)))
    following = client.train("following", rows, model=endless.MODEL, max_length=16, steps=1)
    wait_until(lambda: waits() == every - 1, "the lane that trains asks for no more")
    assert following.status() == JobStatus.QUEUED
    blocker.cancel()
    following.result(30)
    wait_until(lambda: waits() == every, "each lane asks for jobs again")


@pytest.mark.slow
def test_a_stream_has_a_slot_at_once_where_bulk_has_them_all(fragile: FragileBroker, tmp_path: Path) -> None:
    """`tests/workers/test_overtaking.py` has the rule, `tests/engine/test_priorities.py` who makes way."""
    slots = worker_on(fragile, tmp_path / "worker", models=(TINY,), generate_slots=2)
    with slots, patient_client(fragile.url, 30) as client:
        long = {"max_tokens": 120, "n": 16, "ignore_eos": True, "priority": 9}
        bulk = [client.generate("x", model=TINY_MODEL, **long) for _ in range(3)]  # type: ignore[arg-type]
        running = [JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.QUEUED]
        wait_until(lambda: [job.status() for job in bulk] == running, "bulk has all slots")
        answer = client.generate("x", model=TINY_MODEL, max_tokens=4, ignore_eos=True).result(30)
        assert [job.status() for job in bulk] == running, "it waited for none of them"
        assert answer.usage.completion_tokens == 4
        for job in bulk:
            job.cancel()


def test_bulk_makes_way_for_streams_of_another_worker_and_goes_on_behind_them(stack: Stack, client: Client) -> None:
    """Here this process is the other one. `tests/engine/test_making_way.py` has how long it rests."""
    neighbour = neighbours_of(stack.settings, device_here())
    assert isinstance(neighbour, StreamLocks)
    with closing(neighbour):
        neighbour.announce(5)
        bulk = client.generate("x", model=endless.MODEL, max_tokens=40, ignore_eos=True, priority=9)
        wait_until(lambda: "runs streams" in client.workers()[0].held_back.get("generate", ""), "it makes way", 30)
        stream = client.generate("x", model=endless.MODEL, max_tokens=4, ignore_eos=True)
        assert stream.result(30).usage.completion_tokens == 4
        assert bulk.status() == JobStatus.RUNNING
    assert bulk.result(30).usage.completion_tokens == 40
    wait_until(lambda: not client.workers()[0].held_back, "it takes what comes", 30)


@pytest.mark.slow
def test_a_waiting_job_is_cancelled_though_no_worker_is_up(fragile: FragileBroker, tmp_path: Path) -> None:
    with patient_client(fragile.url, 30) as client:
        with worker_on(fragile, tmp_path / "worker", models=(TINY,)):
            pass
        job = client.generate("x", model=TINY_MODEL, max_tokens=8, ignore_eos=True)
        assert job.status() == JobStatus.QUEUED
        job.cancel()
        with pytest.raises(JobCancelled):
            job.result(5)
        with worker_on(fragile, tmp_path / "worker", models=(TINY,)):
            after = client.generate("x", model=TINY_MODEL, max_tokens=2, ignore_eos=True)
            assert after.result(30).usage.completion_tokens == 2
        assert job.status() == JobStatus.CANCELLED
        assert client.redis.xlen(keys.stream(job.id)) == 0, "it never ran"


@pytest.fixture(scope="module")
def shared_by_two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FragileBroker]:
    """The broker of two workers. The last test that uses it kills one."""
    folder = tmp_path_factory.mktemp("two")
    broker = FragileBroker(folder / "fragile")
    try:
        with two_workers_on(broker, folder, endless_in(folder)):
            yield broker
    finally:
        broker.close()


def test_a_worker_that_was_frozen_past_its_lease_leaves_no_trace(shared_by_two: FragileBroker) -> None:
    with patient_client(shared_by_two.url, 30) as client:
        wanted, job = long_answer(client).result(60), long_answer(client)
        stream = job.stream(timeout=60)
        heard = [next(stream)]
        frozen = owner_in_the_middle(client, job)
        os.kill(frozen, signal.SIGSTOP)
        try:
            heard += stream
            first = job.result(30)
        finally:
            os.kill(frozen, signal.SIGCONT)
        wait_until(lambda: any(worker.pid == frozen for worker in client.workers()), "the frozen one is back")
        wait_until(lambda: all(worker.lanes["generate"][0] == 0 for worker in client.workers()), "both have let go")
        wait_until(lambda: client.redis.hlen("stoker:unacked") == 0, "nothing is left unacknowledged")
        assert job.result(5) == first
        assert alive(frozen)
    assert tuple(token.token_id for token in heard) == wanted.token_ids


def test_a_job_whose_worker_is_killed_goes_on_at_another_one_with_the_same_tokens(
    shared_by_two: FragileBroker,
) -> None:
    with patient_client(shared_by_two.url, 60) as client, gateway_of(client.settings) as gateway:
        wanted = long_answer(client).result(60)
        job = long_answer(client)
        stream = job.stream(timeout=60)
        heard = [next(stream)]
        owner = owner_in_the_middle(client, job)
        # It stays in the middle for as long as the gateway needs.
        os.kill(owner, signal.SIGSTOP)
        # Under the job's id the gateway follows this very job.
        over_http = gateway.completions.create(
            model=endless.MODEL, prompt="x", stream=True, extra_headers={"idempotency-key": job.id}
        )
        text = next(iter(over_http)).choices[0].text
        os.kill(owner, signal.SIGKILL)
        heard += stream
        assert tuple(token.token_id for token in heard) == wanted.token_ids
        assert text + "".join(chunk.choices[0].text for chunk in over_http) == wanted.text


def test_a_job_whose_message_was_lost_is_sent_again(fragile: FragileBroker, tmp_path: Path) -> None:
    with patient_client(fragile.url, 30) as client:
        request = generate_request(TINY_MODEL, "x", 0, {"max_tokens": 3, "ignore_eos": True})
        ledger.submit(client.redis, "orphan", job_record(request, "orphan"))
        # What a worker leaves that dies between taking the message and writing it down.
        client.redis.delete(keys.ready(keys.queue(TINY_MODEL, "generate")))
        with worker_on(fragile, tmp_path / "worker", models=(TINY,)):
            orphan = client.job("orphan")
            assert isinstance(orphan, GenerateJob)
            assert orphan.result(60).usage.completion_tokens == 3


@pytest.mark.slow
def test_a_job_that_crashes_its_workers_is_a_dead_letter_and_can_be_retried(
    fragile: FragileBroker, tmp_path: Path
) -> None:
    with patient_client(fragile.url, 60) as client, worker_on(fragile, tmp_path / "worker") as stack:
        job = client.generate(GOLDEN["prompt"], model=GENERATE_MODEL, max_tokens=2000)
        for _ in range(ledger.MAX_CRASHES):
            wait_until(lambda: job.status() == JobStatus.RUNNING, "it runs", 60)
            pid = wait_until(
                lambda: next((w.pid for w in client.workers() if w.worker == stack.worker_name), None), "who runs it"
            )
            os.kill(pid, signal.SIGKILL)
            wait_until(partial(_is_gone, pid), "it is dead")
            stack.start_worker()
            stack.wait_until_warm()
            wait_until(lambda: _owner(client, job.id) == stack.worker_name or _ended(job), "it went on", 60)
        with pytest.raises(JobDead, match="stoker jobs retry"):
            job.result(60)
        assert len(client.dead()[job.id]["history"]) == ledger.MAX_CRASHES
        again = client.retry(job.id)
        assert not client.dead()
        assert isinstance(again, GenerateJob)
        stream = again.stream(timeout=60)
        assert [next(stream).token_id for _ in range(20)] == GOLDEN["token_ids"][:20]
        stream.close()
        with pytest.raises(JobLost, match="no dead letter"):
            client.retry("nobody")


def _is_gone(pid: int) -> bool:
    return not alive(pid)


def _owner(client: Client, job_id: str) -> str:
    name = client.redis.hget(keys.job(job_id), Field.WORKER)
    return name.decode() if isinstance(name, bytes) else ""


def _ended(job) -> bool:  # type: ignore[no-untyped-def]
    return job.status() in (JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_text_on_the_terminal_goes_on_when_the_worker_is_killed(fragile: FragileBroker, tmp_path: Path) -> None:
    """`kill -9` in the middle of `stoker generate --max-tokens 400`, with a second worker up."""
    options = ["--model", GENERATE_MODEL, "--max-tokens", "400", "--seed", "1", "--temperature", "0.8", "--raw"]
    command = [str(Path(sys.executable).parent / "stoker"), "generate", GOLDEN["prompt"], *options]
    env = {**os.environ, "STOKER_URL": fragile.url}
    with patient_client(fragile.url, 60) as client, worker_on(fragile, tmp_path / "one"):
        undisturbed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
        assert undisturbed.returncode == 0, undisturbed.stderr
        with worker_on(fragile, tmp_path / "two"):
            # With a buffer, `communicate` would not see what came with the text that was read before.
            terminal = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
            assert terminal.stdout is not None
            owner = wait_until(
                lambda: next((job["worker"] for job in client.jobs().values() if "worker" in job), None), "it runs"
            )
            seen = b""
            while len(seen) < 200 and (more := terminal.stdout.read(200)):
                seen += more
            pid = next(worker.pid for worker in client.workers() if worker.worker == owner)
            os.kill(pid, signal.SIGKILL)
            rest, errors = terminal.communicate(timeout=400)
    assert terminal.returncode == 0, errors.decode()
    assert (seen + rest).decode() == undisturbed.stdout
    assert len(undisturbed.stdout) > 1000

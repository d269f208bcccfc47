"""What is scraped after a load is what the load was."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from stoker import Client, TrainJob
from stoker.broker import keys, ledger
from stoker.broker.ledger.record import Field
from stoker.broker.outcome import Outcome
from stoker.contract import TrainResult
from stoker.errors import InvalidRequest, JobCancelled, JobDead
from stoker.local.stack import Stack
from stoker.monitor import metrics
from tests import endless
from tests.conftest import EMBED_MODEL, wait_until
from tests.integration.test_training import ROWS
from tests.monitor.conftest import Running
from tests.monitor.scraped import Scrape

pytestmark = pytest.mark.integration

#: Long enough for its beginning to be kept.
PROMPT = "Once upon a time there was a stoker who kept the furnace hot. " * 4
#: Steps of the run that ends.
STEPS = 3
#: Tokens that the cancelled job asks for, and never gets.
UNFINISHED = 4000


@dataclass
class Load:
    """What was sent, by what its clients got of it."""

    texts: int = 0
    embedded_tokens: int = 0
    prompt_tokens: int = 0
    cached: list[int] = field(default_factory=list)
    generated: int = 0
    completions: int = 0
    #: The job that was cancelled. Its last tokens may come to the broker a moment after its end.
    stopped: str = ""
    run: TrainResult | None = None


def test_what_is_scraped_after_a_mixed_load_is_what_the_load_was(
    monitor: Running, client: Client, stack: Stack
) -> None:
    # A worker reports every few seconds: what other tests did a moment ago must not count as part of this load.
    wait_until(lambda: same_counts(own_port(stack), scrape(monitor)), "what was before is reported")
    before, load = scrape(monitor), Load()
    embed(client, load)
    answer(client, load)
    train(client, load, monitor)

    def done() -> Scrape | None:
        now = scrape(monitor)
        ended = delta(before, now, "stoker_jobs_total")
        return now if ended >= 10 and now.value("stoker_lane_jobs") == 0 else None

    after = wait_until(done, "all that ended is counted")
    # Each run since has waited until what was made before it was in the broker.
    load.generated += client.redis.xlen(keys.stream(load.stopped))
    missing = [metric.name for metric in (*metrics.FLEET, *metrics.WORKER) if not after.has(metric)]
    assert not missing, "declared, and never scraped"
    compare(before, after, load)
    own = wait_until(lambda: same_counts(own_port(stack), after), "the worker's own port says the same")
    assert set(own.samples["stoker_jobs_total"]) == set(after.samples["stoker_jobs_total"])


def embed(client: Client, load: Load) -> None:
    for texts in (["one"], ["two", "three"], ["four"] * 5):
        job = client.embed(texts, model=EMBED_MODEL)
        job.result(60)
        redis: Any = client.redis
        outcome = Outcome.parse(redis.get(keys.result(job.id)))
        assert outcome is not None
        load.texts += len(texts)
        load.embedded_tokens += outcome.value["usage"]["prompt_tokens"]
    with pytest.raises(InvalidRequest):
        client.embed(["x"], model=EMBED_MODEL, dimensions=7).result(60)


def answer(client: Client, load: Load) -> None:
    """Two that end, the second with two completions, and one that is cancelled."""
    for n, tokens in ((1, 12), (2, 5)):
        job = client.generate(PROMPT, model=endless.MODEL, max_tokens=tokens, n=n, ignore_eos=True)
        streamed = sum(1 for _ in job.stream(timeout=60))
        usage = job.result(60).usage
        assert streamed == usage.completion_tokens == n * tokens
        load.prompt_tokens += usage.prompt_tokens
        load.cached.append(usage.cached_tokens)
        load.generated, load.completions = load.generated + streamed, load.completions + n
    stopped = client.generate("x", model=endless.MODEL, max_tokens=UNFINISHED, ignore_eos=True)
    next(stopped.stream(timeout=60))
    stopped.cancel()
    with pytest.raises(JobCancelled):
        stopped.result(60)
    load.stopped, load.completions = stopped.id, load.completions + 1


def train(client: Client, load: Load, monitor: Running) -> None:
    """A run that is cancelled while it runs; behind it one that is cancelled while it waits, one that has crashed its
    workers before, and one that ends."""
    blocker = start_run(client, "blocker", 100_000, 5)
    next(iter(blocker.progress(timeout=60)))
    waits, doomed = start_run(client, "waits", 2, 7), start_run(client, "doomed", 2, 7)
    crashes = json.dumps([{"worker": "gone@there/1", "time": time.time()}] * ledger.MAX_CRASHES)
    client.redis.hset(keys.job(doomed.id), Field.HISTORY, crashes)
    lane = {"model": endless.MODEL, "kind": "train"}
    seen = wait_until(
        lambda: found if (found := scrape(monitor)).value("stoker_jobs_waiting", **lane) == 2 else None, "both wait"
    )
    assert seen.value("stoker_jobs_waiting", **lane, priority="7") == 2
    assert seen.value("stoker_jobs_waiting", **lane, priority="5") == 0
    assert seen.value("stoker_oldest_wait_seconds", **lane, priority="7") > 0
    assert seen.value("stoker_jobs_running", **lane) == 1
    waits.cancel()
    blocker.cancel()
    with pytest.raises(JobDead):
        doomed.result(60)
    load.run = start_run(client, "counted", STEPS, 5).result(60)
    wait_until(lambda: scrape(monitor).value("stoker_dead_letters", **lane) == 1, "the letter is seen")
    client.redis.hdel(keys.DEAD, doomed.id)
    wait_until(lambda: scrape(monitor).value("stoker_jobs_running", **lane) == 0, "all have ended")


def start_run(client: Client, name: str, steps: int, priority: int) -> TrainJob:
    return client.train(name, ROWS, model=endless.MODEL, steps=steps, batch_size=1, max_length=32, priority=priority)


def compare(before: Scrape, after: Scrape, load: Load) -> None:
    def more(name: str, **labels: str) -> float:
        return delta(before, after, name, **labels)

    ended = {
        ("embed", "succeeded"): 3, ("embed", "failed"): 1, ("generate", "succeeded"): 2, ("generate", "cancelled"): 1,
        ("train", "cancelled"): 1, ("train", "dead"): 1, ("train", "succeeded"): 1,
    }  # fmt: skip
    for kind in ("embed", "generate", "train", "adapters"):
        for outcome in ("succeeded", "failed", "cancelled", "dead"):
            wanted = ended.get((kind, outcome), 0)
            assert more("stoker_jobs_total", kind=kind, outcome=outcome) == wanted, (kind, outcome)
    begun = {"embed": 4, "generate": 3, "train": 2}
    for kind, count in begun.items():
        assert more("stoker_job_attempts_total", kind=kind) == count, kind
        assert more("stoker_queue_wait_seconds_count", kind=kind) == count, kind
        assert more("stoker_job_duration_seconds_count", kind=kind) == count, kind
    assert more("stoker_job_resumes_total") == more("stoker_jobs_returned_total") == 0
    assert more("stoker_jobs_cancelled_waiting_total", kind="train") == 1
    compare_tokens(more, after, load)


def compare_tokens(more: Callable[..., float], after: Scrape, load: Load) -> None:
    assert load.run is not None
    assert more("stoker_input_tokens_total", kind="embed") == load.embedded_tokens
    assert more("stoker_input_tokens_total", kind="generate") == load.prompt_tokens
    assert more("stoker_input_tokens_total", kind="train") == load.run.tokens
    # The broker may refuse the last tokens of a job that was cancelled; the engine has generated them all the same.
    generated = more("stoker_generated_tokens_total")
    assert load.generated <= generated < load.generated + UNFINISHED // 2
    assert more("stoker_time_to_first_token_seconds_count") == 3
    assert more("stoker_inter_token_seconds_count") == generated - load.completions
    assert sum(load.cached) > 0
    assert more("stoker_prefix_hits_total") == sum(cached > 0 for cached in load.cached)
    assert more("stoker_prefix_hit_tokens_total") == sum(load.cached)
    assert more("stoker_batch_size_sum", kind="embed") == load.texts
    assert more("stoker_batch_size_count", kind="generate") > 0
    for kind in ("embed", "generate", "train"):
        assert more("stoker_engine_busy_seconds_total", kind=kind) > 0, kind
    assert after.value("stoker_training_step") == after.value("stoker_training_steps") == STEPS
    assert after.value("stoker_training_loss") == pytest.approx(load.run.last_loss)
    for name in ("stoker_adapters_held", "stoker_memory_bytes", "stoker_kv_cache_bytes", "stoker_broker_up"):
        assert after.value(name) > 0, name
    assert after.value("stoker_workers", model=endless.MODEL) == 1
    assert more("stoker_lease_renewals_total", result="ok") > 0
    assert more("stoker_publish_lag_seconds_count") > 0


def scrape(monitor: Running) -> Scrape:
    return Scrape.of(monitor.ask("/metrics", login=False).text)


def delta(before: Scrape, after: Scrape, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


def own_port(stack: Stack) -> str:
    assert stack.worker is not None
    found = re.findall(r"metrics are served at (http://[^\s\"]+)", stack.worker.output())
    return str(found[-1])


def same_counts(url: str, fleet: Scrape) -> Scrape | None:
    with urllib.request.urlopen(url, timeout=10) as reply:
        own = Scrape.of(reply.read().decode())
    counted = ("stoker_jobs_total", "stoker_generated_tokens_total", "stoker_input_tokens_total")
    idle = own.value("stoker_lane_jobs") == 0
    return own if idle and all(own.value(name) == fleet.value(name) for name in counted) else None


#: Times a second that an idle worker may wake. It is near 20, most of it kombu's; a loop that polls is far above.
WAKES = 60


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts wake-ups in Linux' /proc")
def test_an_idle_worker_sleeps(client: Client) -> None:
    """Its processor time depends on the machine; how often it wakes does not."""
    (worker,) = client.workers()
    began, before = time.monotonic(), wakes(worker.pid)
    wait_until(lambda: client.workers()[0].time - worker.time > 3, "two beats have passed")
    assert wakes(worker.pid) - before < WAKES * (time.monotonic() - began)


def wakes(pid: int) -> int:
    """How often threads of a process went to sleep."""
    said = "".join((thread / "status").read_text() for thread in Path(f"/proc/{pid}/task").iterdir())
    return sum(map(int, re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", said, re.MULTILINE)))

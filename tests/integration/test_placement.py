"""Two workers with disks of their own: a conversation goes on where its beginning is, and waits there for a moment at
most."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stoker import Client, GenerateResult
from stoker.broker import keys, ledger
from stoker.broker.ledger.record import Field
from stoker.errors import InvalidRequest
from stoker.local.stack import Stack
from stoker.monitor import metrics
from stoker.monitor.numbers import MetricsReport
from tests import endless
from tests.conftest import stack_settings, wait_until
from tests.integration.machinery import FragileBroker, endless_in, patient_client, two_workers_on
from workers.beginnings import BLOCK

pytestmark = pytest.mark.integration

#: Tokens whose text, as ids, is a block and a little more.
LONG = BLOCK // 2
QUEUE = keys.queue(endless.MODEL, "generate")
#: Seconds: longer than any worker here needs to take a job.
PATIENT = 4.0


def prompt(number: int, turns: int = 0) -> list[int]:
    """Of a conversation: its beginning, and what its turns brought."""
    return [*((place * number) % 19 + 3 for place in range(1, LONG)), *range(3, 3 + turns)]


def answer(client: Client, number: int, turns: int = 0) -> GenerateResult:
    return client.generate(prompt_ids=prompt(number, turns), model=endless.MODEL, max_tokens=2).result(60)


@pytest.mark.timeout(180)
def test_a_conversation_goes_on_where_its_beginning_is_and_elsewhere_where_that_worker_takes_nothing(
    fragile: FragileBroker, tmp_path: Path
) -> None:
    with (
        two_workers_on(fragile, tmp_path, endless_in(tmp_path), placement=PATIENT, lease=3),
        patient_client(fragile.url, 60) as client,
    ):
        # Of three, two are at one worker.
        homes = {number: answer(client, number).usage.worker for number in (2, 3, 5)}
        home = max(homes.values(), key=list(homes.values()).count)
        first, second, *_ = (number for number, worker in homes.items() if worker == home)
        for turns in range(1, 9):
            found = answer(client, first, turns)
            assert found.usage.worker == home, "by chance it would be in one of 256"
            assert found.usage.cached_tokens >= LONG - 1
        # Which of them is asked first is chance: on a busy machine the same one may be eight times.
        wait_until(
            lambda: answer(client, first, 8).usage.worker == home and passed_on(client) > 0,
            "the other one was asked first, now and then",
        )
        pid = next(presence.pid for presence in client.workers() if presence.worker == home)
        os.kill(pid, signal.SIGSTOP)
        # While its presence lasts the other one counts on it, on a slow machine too.
        client.redis.expire(keys.worker(home), 60)
        try:
            # One may come to the frozen worker, which was asking as it froze: its lease brings it back. The other one
            # is recalled.
            elsewhere = [answer(client, number, 9) for number in (first, second)]
            again = answer(client, second, 10)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert all(found.usage.worker != home for found in (*elsewhere, again)), "none waits for one that takes nothing"
        assert again.usage.cached_tokens >= LONG - 1, "now both have it"
        logs = [(tmp_path / name / "logs" / "worker.log").read_text() for name in ("one", "two")]
        assert any("is anyone's again" in log for log in logs)


@pytest.mark.timeout(180)
def test_a_prompt_that_the_memory_of_one_worker_does_not_hold_runs_where_another_ones_does(
    fragile: FragileBroker, tmp_path: Path
) -> None:
    model = endless_in(tmp_path)
    config = tmp_path / endless.MODEL / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 40_000}))
    with ExitStack() as leaving:
        for name, megabytes in (("small", 16), ("large", 32)):
            own: dict[str, Any] = {"home": tmp_path / name, "kv_cache": megabytes, "generate_slots": 1}
            settings = stack_settings(**own, url=fragile.url, grace=1.0, models=(model,))
            leaving.enter_context(Stack(settings, flower=False)).wait_until_warm()
        client = leaving.enter_context(patient_client(fragile.url, 60))
        small, large = sorted((presence.models[0].kv_tokens, presence.worker) for presence in client.workers())
        prompt = list(range(3, 23)) * (small[0] // 20 + 1)

        def worker_of(prompt: list[int]) -> str:
            return client.generate(prompt_ids=prompt, model=endless.MODEL, max_tokens=2).result(60).usage.worker

        wait_until(
            lambda: worker_of(prompt) == large[1] and passed_on(client) > 0, "the small one was asked first for one", 90
        )
        busy = client.generate(prompt_ids=prompt, model=endless.MODEL, max_tokens=small[0] // 2)
        next(busy.stream(timeout=60, cancel_on_close=False))
        waiting = client.generate(prompt_ids=prompt, model=endless.MODEL, max_tokens=2)
        placed = keys.placed(QUEUE, large[1])

        def waits_by_need() -> bool:
            """It may be passed on before for its beginning, and recalled."""
            return client.redis.llen(placed) == 1 and client.redis.hexists(keys.job(waiting.id), Field.NEEDS)

        wait_until(waits_by_need, "it waits for the large one, which has no room")
        assert ledger.recover(client.redis, QUEUE, 0) == (), "and is not lost, however long that takes"
        busy.cancel()
        assert waiting.result(60).usage.worker == large[1]
        with pytest.raises(InvalidRequest, match=f"(holds|has most:) {large[0]} "):
            worker_of(prompt * 3)


def passed_on(client: Client) -> float:
    """Jobs, by what the workers have reported."""
    names = [keys.metrics(presence.worker) for presence in client.workers()]
    reports = [MetricsReport.model_validate_json(text) for text in client.redis.mget(names) if text]
    return sum(sample.value for report in reports for sample in report.samples.get(metrics.PASSED_ON.name, ()))

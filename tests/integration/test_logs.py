"""The log of a real worker under a mixed load."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from stoker import Client
from stoker.errors import StokerError
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import EMBED_MODEL, wait_until
from tests.integration.machinery import logged

pytestmark = pytest.mark.integration

SECRET = "zebra-crossing-9341"


def test_no_text_of_a_mixed_load_is_in_the_log_and_each_job_has_its_two_lines(stack: Stack, client: Client) -> None:
    log = stack.settings.logs / "worker.log"
    long = client.generate(f"{SECRET} is", model=endless.MODEL, max_tokens=2000, ignore_eos=True)
    next(long.stream(timeout=60, cancel_on_close=False))
    long.cancel()
    rows = [{"prompt": f"{SECRET}?", "completion": f" {SECRET}!"}] * 2
    jobs: dict[str, Any] = {
        "generate": client.generate(f"Say {SECRET}", model=endless.MODEL, max_tokens=4),
        "embed": client.embed([SECRET, f"{SECRET} again"], model=EMBED_MODEL),
        "train": client.train("secretive", rows, model=endless.MODEL, steps=2, batch_size=1, max_length=64),
        "too long": client.embed([f"{SECRET} " * 2000], model=EMBED_MODEL),
        "no dataset": client.train("secretive", f"worker:{SECRET}.jsonl", model=endless.MODEL, steps=2),
        "grammar": client.generate(SECRET, model=endless.MODEL, max_tokens=4, json_schema={"type": SECRET}),
    }
    for job in (*jobs.values(), long):
        with suppress(StokerError):
            job.result(60)
    ids = {job.id: name for name, job in jobs.items()} | {long.id: "cancelled"}

    def ends() -> dict[str, dict[str, Any]]:
        return {ids[line["job"]]: line for line in logged(log) if line.get("event") == "ended" and line["job"] in ids}

    wait_until(lambda: len(ends()) == len(ids), "each job has its last line")
    ended, begun = ends(), [line["job"] for line in logged(log) if line.get("event") == "begun" and line["job"] in ids]
    assert sorted(begun) == sorted(ids)
    assert {name: line["outcome"] for name, line in ended.items()} == {
        **dict.fromkeys(("generate", "embed", "train"), "succeeded"),
        **dict.fromkeys(("too long", "no dataset", "grammar"), "failed"),
        "cancelled": "cancelled",
    }
    assert ended["generate"]["tokens"] == 4
    assert all(ended[name]["tokens"] > 0 and ended[name]["duration"] > 0 for name in ("embed", "train"))
    assert ended["too long"]["error"] == "TextTooLong"
    assert SECRET not in log.read_text()
    celerys = [line for line in logged(log) if line["logger"].startswith("celery") and line["level"] == "info"]
    assert not celerys

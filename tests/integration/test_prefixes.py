"""A worker that is killed has its prefixes on disk: the next one of the machine does not prefill them again, and has
ready what is pinned."""

from __future__ import annotations

import os
import signal

import pytest

from stoker import Client, GenerateResult
from stoker.broker import keys
from stoker.errors import InvalidRequest
from stoker.local.stack import Stack
from stoker.monitor import metrics
from stoker.monitor.numbers import MetricsReport
from tests import endless
from tests.conftest import replace_worker, wait_until

pytestmark = pytest.mark.integration

#: A system prompt, as token ids.
SYSTEM = [number % 19 + 3 for number in range(150)]


#: One that several requests had, and nobody pinned.
SHARED = [number % 17 + 4 for number in range(150)]


def answer(client: Client, prompt: list[int], end: int) -> GenerateResult:
    return client.generate(prompt_ids=[*prompt, end], model=endless.MODEL, max_tokens=4).result(60)


def test_what_a_killed_worker_had_prefilled_the_next_one_has_and_what_is_pinned_is_ready(own_stack: Stack) -> None:
    with Client(settings=own_stack.settings) as client:
        kept = own_stack.settings.prefixes
        assert [answer(client, SHARED, end).usage.cached_tokens for end in (3, 4)] == [0, len(SHARED)]
        wait_until(lambda: len(list(kept.glob("*/*.safetensors"))) == 1, "what was shared is on the disk")
        client.prefixes.pin("system", SYSTEM, model=endless.MODEL)
        wait_until(lambda: ready(client), "it is prefilled")
        wanted = [answer(client, prompt, 5) for prompt in (SYSTEM, SHARED)]
        assert wanted[0].usage.cached_tokens == len(SYSTEM)
        wait_until(lambda: len(list(kept.glob("*/*.safetensors"))) == 2, "both are on the disk")
        os.kill(client.workers()[0].pid, signal.SIGKILL)
        replace_worker(own_stack)
        own_stack.wait_until_warm()
        for prompt, before in zip((SYSTEM, SHARED), wanted, strict=True):
            found = answer(client, prompt, 5)
            assert [found.usage.cached_tokens, found.token_ids] == [len(prompt), before.token_ids]
        wait_until(lambda: disk_hits(client, own_stack.worker_name) >= 1, "what the disk had is counted")
        wait_until(lambda: ready(client), "the new worker has what is pinned")
        client.prefixes.unpin("system", endless.MODEL)
        wait_until(lambda: not list(own_stack.settings.prefixes.glob("*.pins")), "its files may go")
        with pytest.raises(InvalidRequest, match=r"prefix 'short': 3 tokens given .* at least"):
            client.prefixes.pin("short", SYSTEM[:3], model=endless.MODEL)
        assert client.prefixes.list(endless.MODEL) == []


def ready(client: Client) -> bool:
    """Whether the worker says that it is, with all of its tokens."""
    (entry,) = client.prefixes.list(endless.MODEL)
    return [(state.state, state.tokens, state.why) for state in entry.workers.values()] == [("ready", len(SYSTEM), "")]


def disk_hits(client: Client, worker: str) -> float:
    """As the worker has reported."""
    raw = client.redis.get(keys.metrics(worker))
    samples = {} if raw is None else MetricsReport.model_validate_json(raw).samples
    return sum(sample.value for sample in samples.get(metrics.PREFIX_DISK_HITS.name, ()))

"""`stoker.testing`: the client in memory answers what a test laid down, and refuses what the real client refuses."""

from __future__ import annotations

import asyncio
import inspect
import pickle  # noqa: TID251 -- what a user might try
import runpy
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker import AsyncClient, Client, JobStatus, StreamToken
from stoker.broker import keys, registry
from stoker.broker.registry import AdapterEntry, Verb
from stoker.client._async.broker_link import AsyncBrokerLink
from stoker.client._async.link import AsyncLink
from stoker.client._async.memory_link import AsyncMemoryLink
from stoker.client._sync import memory_link
from stoker.client._sync.broker_link import BrokerLink
from stoker.client._sync.memory_link import MemoryLink
from stoker.client.in_memory.adapters import Registry
from stoker.contract import bundle
from stoker.contract.vectors import Int8Vectors
from stoker.errors import (
    BrokerUnavailable,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobLost,
    JobTimeout,
    QueueFull,
    StokerError,
    TextTooLong,
    UnknownAdapter,
    UnknownModel,
)
from stoker.testing import AsyncFakeClient, FakeClient, NotScripted
from tests.conftest import wait_until
from tests.docs.pages import ROOT
from tests.stoker.test_client_core import server

__all__ = ["server"]

LLM = "smollm2-135m-instruct"


def test_a_text_is_streamed_word_by_word_and_is_the_result() -> None:
    client = FakeClient()
    client.script.generate("It was  a\ndark night. ")
    job = client.generate("Begin:", max_tokens=16)
    tokens = list(job.stream())
    assert [token.text for token in tokens] == ["It", " was", "  a", "\ndark", " night.", " "]
    assert [token.index for token in tokens] == list(range(6))
    assert [token.is_last for token in tokens] == [False] * 5 + [True]
    result = job.result()
    assert (result.text, result.finish_reason, result.model) == ("It was  a\ndark night. ", "stop", LLM)
    assert list(job.stream()) == tokens, "a stream can be read again"
    assert job.status() == JobStatus.DONE


def test_what_was_sent_is_there_as_a_worker_would_read_it() -> None:
    client = FakeClient(key="alice")
    client.script.generate("a b")
    client.script.train([2.0])
    job = client.generate("x", max_tokens=7, stop="\n", seed=3)
    client.train("style", [{"text": "one"}], steps=5)
    client.embed(["a", "b"])
    (asked,) = client.sent.generate
    assert (asked.max_tokens, asked.stop, asked.seed) == (7, ("\n",), 3)
    assert client.sent.embed[0].texts == ("a", "b")
    assert (client.sent.train[0].steps, client.sent.load) == (5, ())
    assert [sent.request.kind for sent in client.sent.jobs] == ["generate", "train", "embed"]
    first, second, _ = client.sent.jobs
    assert (first.job_id, first.client, first.data, second.data) == (job.id, "alice", b"", b'{"text": "one"}')


@pytest.mark.parametrize(
    ("answer", "texts"),
    [
        (["so", "me", ""], ["so", "me", ""]),
        (lambda request: request.prompt.upper(), ["X"]),
        ("one two three four five", ["one", " two", " three"]),
        ("", []),
        (
            [StreamToken(index=0, token_id=9, text="t", logit=1.0, logprob=-1.0, probability=0.5)],
            ["t"],
        ),
    ],
)
def test_every_form_of_a_text_becomes_tokens_and_max_tokens_cuts_it(answer: Any, texts: list[str]) -> None:
    client = FakeClient()
    client.script.generate(answer, times=2)
    job = client.generate("x", max_tokens=3)
    assert [token.text for token in job.stream()] == texts
    result = client.generate("x", max_tokens=3).result()
    assert result.text == "".join(texts)
    assert result.finish_reason == ("length" if answer == "one two three four five" else "stop")


def test_each_of_several_completions_has_the_text() -> None:
    client = FakeClient()
    client.script.generate("a b")
    job = client.generate("x", n=3)
    assert [(token.index, token.completion) for token in job.stream()] == [(i, i // 2) for i in range(6)]
    assert [completion.text for completion in job.result().completions] == ["a b"] * 3


def test_answers_are_used_in_order_for_as_many_jobs_as_they_say() -> None:
    client = FakeClient()
    client.script.generate("a", times=2)
    client.script.generate("b")
    assert [client.generate("x").result().text for _ in range(3)] == ["a", "a", "b"]
    with pytest.raises(NotScripted, match=r"no answer is left for it\. Say which: client\.script\.generate"):
        client.generate("x")
    client.script.generate("c", times=None)
    assert {client.generate("x").result().text for _ in range(5)} == {"c"}
    assert not issubclass(NotScripted, StokerError), "the code under test must not handle it"
    with pytest.raises(ValueError, match="times: 0 given"):
        client.script.generate("d", times=0)


def test_an_error_comes_behind_the_tokens_as_its_own_class() -> None:
    client = FakeClient()
    client.script.generate("a b", error=TextTooLong("9000 tokens"))
    job = client.generate("x")
    seen: list[tuple[str, bool]] = []
    with pytest.raises(TextTooLong, match="9000 tokens"):
        seen.extend((token.text, token.is_last) for token in job.stream())
    assert (seen, job.status()) == ([("a", False), (" b", False)], JobStatus.FAILED)
    with pytest.raises(TextTooLong, match="9000 tokens"):
        job.result()


def test_a_refused_job_is_not_sent() -> None:
    client = FakeClient()
    client.script.generate("a")
    client.script.refuse(QueueFull("full", depth=3))
    client.script.refuse(BrokerUnavailable("gone"))
    for error in (QueueFull, BrokerUnavailable):
        with pytest.raises(error):
            client.generate("x")
    assert client.sent.jobs == []
    assert client.generate("x").result().text == "a"


def test_a_job_is_queued_runs_as_it_is_read_and_ends() -> None:
    client = FakeClient()
    client.script.generate("a b c")
    job = client.generate("x")
    assert (job.status(), list(client.jobs())) == (JobStatus.QUEUED, [job.id])
    stream = job.stream()
    next(stream)
    assert (job.status(), client.jobs()[job.id]["worker"]) == (JobStatus.RUNNING, "in-memory")
    assert len(list(stream)) == 2
    assert (job.status(), client.jobs()) == (JobStatus.DONE, {})
    job.cancel()
    assert job.status() == JobStatus.DONE, "what is done cannot be cancelled"


def test_leaving_a_stream_cancels_the_job_unless_it_shall_go_on() -> None:
    client = FakeClient()
    client.script.generate("a b c", times=2)
    for go_on, status in ((False, JobStatus.CANCELLED), (True, JobStatus.RUNNING)):
        job = client.generate("x")
        stream = job.stream(cancel_on_close=not go_on)
        assert next(stream).text == "a"
        stream.close()
        assert job.status() == status
    assert job.result().text == "a b c"


def test_a_cancelled_job_replays_what_it_made_and_raises() -> None:
    client = FakeClient()
    client.script.generate("a b c")
    job = client.generate("x")
    stream = job.stream(cancel_on_close=False)
    assert [next(stream).text, next(stream).text] == ["a", " b"]
    client.job(job.id).cancel()
    with pytest.raises(JobCancelled, match=job.id):
        next(stream)
    seen: list[str] = []
    with pytest.raises(JobCancelled):
        seen.extend(token.text for token in job.stream())
    with pytest.raises(JobCancelled):
        job.result()
    assert len(client.sent.jobs) == 1


def test_a_job_that_hangs_meets_the_callers_time_limit() -> None:
    client = FakeClient()
    client.script.generate("a", hangs=True)
    client.script.embed(hangs=True)
    job = client.generate("x")
    stream = job.stream(timeout=0.01)
    assert next(stream).text == "a"
    with pytest.raises(JobTimeout, match=r"nothing came within 0\.01 s"):
        next(stream)
    assert job.status() == JobStatus.RUNNING
    with pytest.raises(JobTimeout):
        client.embed(["a"]).result(timeout=0.01)


def test_waiting_without_a_limit_for_a_job_that_hangs_ends_with_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_link, "HANGS", 0.02)
    client = FakeClient()
    client.script.generate(hangs=True)
    with pytest.raises(NotScripted, match=r"nothing cancelled it, and it has no deadline\. Give it one, cancel it, or"):
        client.generate("x").result()


def test_a_job_that_hangs_is_waited_for_until_its_deadline_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_link, "HANGS", 0.02)
    client = FakeClient()
    client.script.generate("a", hangs=True, times=None)
    with pytest.raises(DeadlineExceeded):
        client.generate("x", deadline=0.1).result()
    with pytest.raises(DeadlineExceeded):
        list(client.generate("x", deadline=0.1).stream())
    with pytest.raises(JobTimeout):
        client.generate("x", deadline=5).result(timeout=0.05)


class Time:
    """The clock of a test: each look at it takes `step` seconds."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 100.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_deadline_passes_by_the_clock_of_the_test() -> None:
    clock = Time()
    client = FakeClient(clock=clock)
    client.script.generate("a", hangs=True, times=None)
    late, later = client.generate("x", deadline=3600), client.generate("x", deadline=7200)
    clock.now += 3599
    assert late.status() is JobStatus.QUEUED
    clock.now += 1
    with pytest.raises(DeadlineExceeded, match="stopped at its deadline"):
        late.result(timeout=5)
    assert client.jobs()[later.id]["age"] == 3600
    clock.step = 60.0
    with pytest.raises(DeadlineExceeded):
        list(later.stream())


def test_a_clock_that_stands_still_before_a_deadline_ends_the_wait_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_link, "HANGS", 0.02)
    client = FakeClient(clock=Time())
    client.script.generate(hangs=True)
    with pytest.raises(NotScripted, match=r"which stands still, its deadline is 3600 s away\. Let that clock go on"):
        client.generate("x", deadline=3600).result()


def test_a_job_that_hangs_ends_at_its_deadline_behind_what_it_has_made() -> None:
    client = FakeClient()
    client.script.generate("a b", hangs=True)
    job = client.generate("x", deadline=0.05)
    seen: list[str] = []
    with pytest.raises(DeadlineExceeded, match=rf"job {job.id} was stopped at its deadline\."):
        seen.extend(token.text for token in job.stream())
    assert "".join(seen) == "a b"
    assert job.status() is JobStatus.FAILED
    client.script.embed(hangs=True)
    with pytest.raises(DeadlineExceeded):
        client.embed(["a"], deadline=0.01).result()


def test_a_job_that_hangs_is_over_at_its_deadline_for_all_who_look_and_not_before() -> None:
    client = FakeClient()
    client.script.generate(hangs=True, times=None)
    late, running, free = client.generate("x", deadline=0.001), client.generate("x", deadline=600), client.generate("x")
    wait_until(lambda: late.status() is JobStatus.FAILED, "nobody has waited for it")
    assert set(client.jobs()) == {running.id, free.id}
    late.cancel()
    assert late.status() is JobStatus.FAILED
    assert client.models.unload("smollm2-135m-instruct").phase == "done", "no job runs there"
    for job in (running, free):
        with pytest.raises(UnknownModel):
            job.result()
    with pytest.raises(DeadlineExceeded):
        late.result()


def test_a_job_that_does_not_hang_takes_no_time_and_meets_no_deadline() -> None:
    client = FakeClient()
    client.script.generate("a")
    job, first = client.generate("x", deadline=1e-6), time.monotonic()
    wait_until(lambda: time.monotonic() - first > 1e-6, "it is past that")
    assert job.result().text == "a"


def test_vectors_depend_on_the_text_alone_and_travel_as_asked() -> None:
    client = FakeClient()
    vectors = client.embed(["a", "b", "a"]).result()
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])
    assert client.embed(["b"], dimensions=3).result().shape == (1, 3)
    assert client.embed(["b"], dtype="float16").result().dtype == np.float16
    assert isinstance(client.embed(["b"], dtype="int8").encoded(), Int8Vectors)
    many = list(client.embed_many(("a", "b", "a"), batch=1))
    assert np.array_equal(np.stack(many), vectors)


def test_vectors_that_a_test_laid_down_are_the_result_until_they_are_discarded() -> None:
    client = FakeClient()
    client.script.embed([[1.0, 0.0], [0.0, 2.0]])
    client.script.embed(lambda request: [[float(len(text))] for text in request.texts])
    job = client.embed(["a", "b"])
    assert job.result().tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert client.embed(["abc", "de"]).result().tolist() == [[3.0], [2.0]]
    job.discard()
    with pytest.raises(JobLost, match="took what it made out of the broker"):
        job.result()
    client.script.embed([[1.0]])
    with pytest.raises(InvalidRequest, match=r"shape \(1, 1\) given for 2 texts"):
        client.embed(["a", "b"])


def test_what_a_job_has_made_is_discarded_when_it_is_done_and_no_earlier() -> None:
    client = FakeClient()
    client.script.generate("one two")
    client.script.generate(error=TextTooLong("too long"))
    job, failed = client.generate("x"), client.generate("y")
    assert next(job.stream(cancel_on_close=False)).text == "one"
    job.discard()
    assert [token.text for token in job.stream()] == ["one", " two"], "it runs yet"
    assert job.result().text == "one two"
    job.discard()
    for read in (job.result, lambda: list(job.stream())):
        with pytest.raises(JobLost, match="took what it made out of the broker"):
            read()
    for _ in range(2):
        with pytest.raises(TextTooLong):
            failed.result()
        failed.discard()


def test_a_training_run_reports_and_makes_the_next_version() -> None:
    client = FakeClient()
    client.script.train([2.0, 1.5], times=2)
    run = client.train("style", [{"text": "x"}], steps=9, rank=4)
    assert [(report.step, report.steps, report.loss, report.is_last) for report in run.progress()] == [
        (1, 9, 2.0, False),
        (2, 9, 1.5, True),
    ]
    result = run.result()
    assert (result.adapter, result.version, result.first_loss, result.last_loss) == ("style", 1, 2.0, 1.5)
    assert client.train("style", [{"text": "x"}], promote=False).result().version == 2
    entry = client.adapters.get("style")
    assert (entry.serving, sorted(entry.versions)) == (1, [1, 2])
    client.adapters.promote("style@2")
    assert [entry.serving for entry in client.adapters.list()] == [2]
    assert client.adapters.rollback("style").serving == 1
    with pytest.raises(ValueError, match="losses: none given"):
        client.script.train([])


def test_an_adapter_is_loaded_without_an_answer(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    client = FakeClient()
    assert client.adapters.load("style", tmp_path).result().version == 1
    client.script.load(error=InvalidRequest("rank 7"))
    with pytest.raises(InvalidRequest, match="rank 7"):
        client.adapters.load("style", tmp_path).result()
    assert client.sent.load[0].name == "style"
    assert bundle.source(client.sent.jobs[0].data, "nowhere") == str(tmp_path), "the registry says where it comes from"


def test_generation_with_an_adapter_that_is_not_there_fails_as_at_a_worker() -> None:
    client = FakeClient(adapters=["style"])
    client.script.generate("a", times=None)
    assert client.generate("x", adapter="style").result().adapter == "style"
    job = client.generate("x", adapter="none")
    with pytest.raises(UnknownAdapter, match="none"):
        next(job.stream())
    with pytest.raises(UnknownAdapter, match="the versions of style: 1"):
        client.generate("x", adapter="style@2").result()


def test_a_version_that_there_is_not_is_neither_promoted_nor_unloaded_in_memory() -> None:
    client = FakeClient(adapters=["style"])
    for change in (client.adapters.promote, client.adapters.unload):
        with pytest.raises(UnknownAdapter, match="'style@9' given; the versions of style: 1"):
            change("style@9")
    with pytest.raises(InvalidRequest, match="serves now"):
        client.adapters.unload("style@1")
    entry = client.adapters.get("style")
    assert (entry.serving, list(entry.versions)) == (1, [1])
    assert client.adapters.deactivate("style").serving is None
    assert not client.adapters.unload("style@1").versions


def test_an_id_that_is_sent_twice_is_one_job_and_belongs_to_one_kind() -> None:
    client = FakeClient()
    client.script.generate("a")
    first, second = client.generate("x", job_id="one"), client.generate("x", job_id="one")
    assert (first.result(), len(client.sent.jobs)) == (second.result(), 1)
    with pytest.raises(InvalidRequest, match="it is that of a job of kind generate"):
        client.embed(["a"], job_id="one")


def test_a_dead_job_is_listed_and_can_be_sent_again() -> None:
    client = FakeClient(key="alice")
    client.script.generate(error=JobDead("it crashed three workers"))
    client.script.generate("a")
    job = client.generate("x")
    with pytest.raises(JobDead):
        job.result()
    assert client.dead()[job.id]["client"] == "alice"
    other = client.with_key("operator")
    assert other.retry(job.id).id == job.id
    assert [sent.client for sent in client.sent.jobs] == ["alice", "alice"], "it is its sender's"
    assert (client.dead(), job.result().text) == ({}, "a")
    with pytest.raises(JobLost):
        client.retry(job.id)


def test_a_run_that_is_sent_again_has_its_dataset() -> None:
    client = FakeClient()
    client.script.train(error=JobDead("it crashed three workers"))
    client.script.train()
    job = client.train("style", [{"text": "x"}])
    with pytest.raises(JobDead):
        job.result()
    client.retry(job.id)
    first, second = client.sent.jobs
    assert first.data == second.data != b""
    assert job.result().version == 1


@pytest.mark.parametrize("call", ["status", "cancel", "result", "job"])
def test_a_job_that_nobody_sent_is_lost(call: str) -> None:
    client = FakeClient()
    client.script.generate("a")
    job = client.generate("x")
    job.id = "other"
    with pytest.raises(JobLost, match="knows nothing of job other"):
        client.job("other") if call == "job" else getattr(job, call)()


#: Wrong input of every kind that a client finds before it sends.
WRONG: dict[str, Callable[[Any], Any]] = {
    "a misspelt option": lambda client: client.generate("x", max_token=3, model="smol"),
    "an option out of range": lambda client: client.generate("x", max_tokens=0, model="smol"),
    "an option of another type": lambda client: client.generate("x", temperature="hot", model="smol"),
    "no prompt": lambda client: client.generate(model="smol"),
    "two prompts": lambda client: client.generate("x", prompt_ids=[1], model="smol"),
    "one text": lambda client: client.embed("x", model="mini"),
    "no texts": lambda client: client.embed([], model="mini"),
    "a model that nobody serves": lambda client: client.embed(["x"], model="nope"),
    "a model that cannot": lambda client: client.embed(["x"], model="smol"),
    "an id that is none": lambda client: client.embed(["x"], model="mini", job_id="a b"),
    "a bad dataset": lambda client: client.train("style", [{"nothing": 1}], model="smol"),
    "a path as a name": lambda client: client.train("../style", [{"text": "x"}], model="smol"),
    "an adapter that is not there": lambda client: client.adapters.get("style", model="smol"),
    "a version too little": lambda client: client.adapters.promote("style", model="smol"),
    "a letter that is not there": lambda client: client.retry("nothing"),
    "a job that is not there": lambda client: client.job("nothing"),
}


def said(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(StokerError) as caught:
        call()
    return caught.type, str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_gets_the_same_error_as_from_the_real_client(case: str, server: Any) -> None:
    models = {"mini": ["embed"], "smol": ["generate", "train", "adapters"]}
    double, awaited = FakeClient(models=models), AsyncFakeClient(models=models)

    async def wait() -> None:
        reply = WRONG[case](awaited)
        if isinstance(reply, Awaitable):
            await reply

    for name, card in double.models().items():
        server.hset(keys.MODELS, name, card.model_dump_json())
    server.expire(keys.MODELS, 60)
    for worker in double.workers():
        server.zadd(keys.WORKERS, {worker.worker: time.time()})
        server.expire(keys.WORKERS, 60)
        server.set(keys.worker(worker.worker), worker.model_dump_json(), ex=keys.PRESENCE_TTL)
    with Client() as real:
        expected = said(lambda: WRONG[case](real))
    assert said(lambda: WRONG[case](double)) == expected
    assert said(lambda: asyncio.run(wait())) == expected
    assert double.sent.jobs == awaited.sent.jobs == []


def test_the_asyncio_double_awaits_streams_cancels_and_lets_others_run() -> None:
    async def program(client: AsyncClient) -> tuple[list[str], JobStatus]:
        job = await client.generate("x")
        seen = []
        async with aclosing(job.stream()) as stream:
            async for token in stream:
                seen.append(token.text)
                if len(seen) == 2:
                    break
        return seen, await job.status()

    async def main() -> None:
        client = AsyncFakeClient()
        client.script.generate("a b c")
        assert await program(client) == (["a", " b"], JobStatus.CANCELLED)
        client.script.generate(hangs=True)
        job = await client.generate("x")
        waiting = asyncio.create_task(job.result())
        await asyncio.sleep(0)
        assert not waiting.done()
        await job.cancel()
        with pytest.raises(JobCancelled):
            await waiting
        client.script.generate(hangs=True)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for((await client.generate("x")).result(), 0.01)
        assert len(client.sent.generate) == 3
        assert [len(vector) async for vector in client.embed_many(["a", "b"])] == [8, 8]

    asyncio.run(main())


def test_the_models_are_those_that_a_test_names() -> None:
    client = FakeClient(models={"mine": ["generate"]})
    client.script.generate("a")
    assert client.generate("x").result().model == "mine"
    assert list(client.models()) == ["mine"]
    assert [card.model for worker in client.workers() for card in worker.models] == ["mine"]
    with pytest.raises(ConfigError, match="'paint' given for mine; the kinds of jobs are embed, generate"):
        FakeClient(models={"mine": ["paint"]})
    with pytest.raises(InvalidRequest, match="models"):
        FakeClient(models={"a/b": ["embed"]})


def test_a_double_has_a_short_repr_no_connections_and_cannot_be_pickled() -> None:
    client = FakeClient()
    assert repr(client) == "<FakeClient, 0 jobs sent>"
    assert repr(client.embed(["a"], job_id="j")) == "<EmbedJob j>"
    assert repr(client.sent) == "<Sent: 1 jobs>"
    with pytest.raises(ConfigError, match="works in memory"):
        _ = client.redis
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(client)
    with client as same:
        assert same is client


def test_a_double_has_every_call_of_the_link() -> None:
    wanted = {name: inspect.signature(member) for name, member in vars(AsyncLink).items() if inspect.isfunction(member)}
    wanted = {name: signature for name, signature in wanted.items() if not name.startswith("_")}
    assert len(wanted) > 10
    for kind in (AsyncBrokerLink, AsyncMemoryLink):
        assert {name: inspect.signature(vars(kind)[name]) for name in wanted} == wanted
    for other in (BrokerLink, MemoryLink):
        assert wanted.keys() <= set(dir(other))


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("register"), st.booleans()),
        st.tuples(st.sampled_from(["promote", "rollback", "deactivate", "unload"]), st.integers(1, 4)),
    ),
    max_size=14,
)


@pytest.mark.integration
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
def test_the_registry_in_memory_does_what_the_brokers_does(server: Any, changes: list[tuple[Any, Any]]) -> None:
    redis, memory, number = server, Registry(), 0
    redis.delete(keys.adapter("m", "a"))
    for what, value in changes:
        if what == "register":
            number += 1
            registry.register(redis, "m", "a", number, {"rank": 8}, promote=value)
            assert memory.register("m", "a", {"rank": 8}, promote=value) == number
        elif number:
            verb: Verb = what
            version = value if verb in ("promote", "unload") else None
            done = registry.change(redis, "m", verb, "a", version) is not None
            assert memory.change("m", verb, "a", version) == done, (verb, version)
        assert shown(memory.get("m", "a")) == shown(registry.parse("m", "a", redis.hgetall(keys.adapter("m", "a"))))


def shown(entry: AdapterEntry) -> tuple[object, ...]:
    return entry.serving, entry.history, dict(entry.versions)


def test_the_example_runs_without_a_broker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STOKER_URL", "redis://127.0.0.1:1/0")
    runpy.run_path(str(ROOT / "examples/testing_a_program.py"), run_name="__main__")
    assert capsys.readouterr().out.count(": passed") == 3


def test_an_adapter_whose_last_version_goes_has_none() -> None:
    async def unloaded() -> AdapterEntry:
        async with AsyncFakeClient(adapters=["house-style"]) as client:
            await client.adapters.deactivate("house-style")
            return await client.adapters.unload("house-style@1")

    entry = asyncio.run(unloaded())
    assert (entry.serving, dict(entry.versions)) == (None, {})

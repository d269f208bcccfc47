"""What both clients share: which model a job goes to, what a result record means, what is sent."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from stoker import AsyncClient, Client, EmbedJob, GenerateJob, JobStatus, TrainJob
from stoker.broker import keys, ledger, policy
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.ledger.replies import Submitted
from stoker.broker.outcome import Outcome, announced, read_vectors, result_as, spoiled
from stoker.broker.trouble import broker_unavailable
from stoker.client import following
from stoker.client.chunks import checked_texts
from stoker.client.model_choice import Choices, choose_model, is_served, parse_cards, parse_presences
from stoker.client.requests import embed_request, generate_request, known_kind, read_dataset
from stoker.client.submission import Submission, job_record
from stoker.contract import EmbedReply, GenerateRequest, GenerateResult, ModelCard, Presence, TrainRequest, Usage
from stoker.contract.codec import build
from stoker.contract.vectors import plain
from stoker.errors import (
    DatasetError,
    DeadlineExceeded,
    InvalidRequest,
    JobCancelled,
    JobDead,
    JobFailed,
    JobLost,
    JobTimeout,
    QueueFull,
    TextTooLong,
    UnknownModel,
)
from stoker.settings import Settings


def card(model: str, *kinds: str) -> ModelCard:
    return ModelCard(model=model, architecture="x", kinds=kinds, context=8, parameters=1, seen=time.time())


def worker(*cards: ModelCard) -> Presence:
    return Presence(
        worker="w", host="h", pid=1, device="cpu", started=0.0, time=0.0, models=cards, adapters={}, lanes={},
        memory_bytes=0,
    )  # fmt: skip


MINI, SMOL, BIG = card("mini", "embed"), card("smol", "generate", "train"), card("big", "generate")


def choose(model: str | None, kind: str, *cards: ModelCard, lately: tuple[ModelCard, ...] = ()) -> str:
    known = {card.model: card for card in (*cards, *lately)}
    return choose_model(model, kind, known, [worker(*cards)] if cards else [])


def test_without_a_name_the_only_warm_model_of_the_kind_is_taken() -> None:
    assert choose(None, "embed", MINI, SMOL) == "mini"
    assert choose(None, "train", MINI, SMOL, BIG) == "smol"


def test_workers_of_another_generation_are_no_choice_and_a_refusal_names_both_versions() -> None:
    new = MINI.model_copy(update={"contract": 7})
    with pytest.raises(UnknownModel, match=r"speak version 7.*this client speaks version 1"):
        choose("mini", "embed", new)
    with pytest.raises(UnknownModel, match="no model that is warm now"):
        choose(None, "embed", new)
    raw = {b"mini/1": MINI.model_dump_json().encode(), b"mini/7": new.model_dump_json().encode()}
    assert parse_cards(raw)["mini"].contract == 1
    raw = dict(reversed(raw.items()))
    assert parse_cards(raw)["mini"].contract == 1


def test_a_model_whose_workers_were_all_upgraded_is_refused_and_not_waited_for() -> None:
    new = MINI.model_copy(update={"contract": 7})
    with pytest.raises(UnknownModel, match=r"speak version 7.*this client speaks version 1"):
        choose("mini", "embed", new, lately=(MINI,))
    assert choose("mini", "embed", new, MINI) == "mini"


def test_a_model_is_served_by_workers_of_this_generation_and_of_that_kind_alone() -> None:
    new = MINI.model_copy(update={"contract": 7})
    assert is_served("mini", "embed", [worker(SMOL), worker(MINI)])
    assert not is_served("mini", "embed", [worker(new)])
    assert not is_served("mini", "generate", [worker(MINI), worker(SMOL)])
    assert not is_served("mini", "embed", [])


def test_what_a_newer_release_says_of_itself_is_read_as_far_as_it_is_understood() -> None:
    more = json.loads(worker(MINI).model_dump_json()) | {"mood": "sunny"}
    other = json.dumps({"names": ["x"]}).encode()
    assert parse_presences([json.dumps(more).encode(), other, None]) == [worker(MINI)]


def test_without_a_name_a_choice_between_two_is_refused_with_both() -> None:
    with pytest.raises(UnknownModel, match="no model given, and of the models warm now big, smol can generate"):
        choose(None, "generate", SMOL, BIG)


def test_without_a_name_and_without_a_worker_the_error_says_to_start_one() -> None:
    with pytest.raises(UnknownModel, match=r"no model that is warm now can embed\. Start a worker with `stoker up`"):
        choose(None, "embed", lately=(MINI,))


def test_without_a_name_and_with_workers_that_cannot_the_error_says_how_they_could() -> None:
    remedy = r"can rerank\. Give a worker one that can: `stoker models load MODEL`, or `stoker worker --model MODEL`\."
    with pytest.raises(UnknownModel, match=remedy):
        choose(None, "rerank", MINI, SMOL)


def test_a_model_that_was_served_lately_is_accepted() -> None:
    assert choose("mini", "embed", lately=(MINI,)) == "mini"


def test_a_model_that_a_worker_has_warm_is_accepted_whatever_the_list_of_models_says() -> None:
    assert choose_model("a", "generate", {}, [worker(card("a", "generate"))]) == "a"


def test_a_path_stands_for_the_name_that_a_worker_started_with_it_gives_it() -> None:
    assert choose("/models/mini", "embed", MINI) == "mini"
    assert choose("hf:org/Mini", "embed", lately=(MINI,)) == "mini"


def test_a_model_that_nobody_served_for_long_is_unknown_again() -> None:
    old = MINI.model_copy(update={"seen": time.time() - keys.MODEL_TTL - 1})
    raw = {card.model.encode(): card.model_dump_json().encode() for card in (old, SMOL)}
    assert parse_cards(raw) == {"smol": SMOL}


def test_an_unknown_model_is_refused_with_those_that_can() -> None:
    with pytest.raises(UnknownModel, match=r"'nope' given; of the models warm now mini can embed.*--model nope"):
        choose("nope", "embed", MINI, SMOL)


@pytest.mark.parametrize(("near", "meant"), [("minni", "mini"), ("smollm-135m-instruct", "smollm2-135m-instruct")])
def test_a_model_that_is_misspelt_gets_the_name_that_was_meant(near: str, meant: str) -> None:
    with pytest.raises(UnknownModel, match=rf"Did you mean {meant}\? Else .*--model {near}=SOURCE"):
        choose(near, "embed", MINI, SMOL)


def test_a_worker_is_named_without_a_source_for_a_model_of_the_catalogue_alone() -> None:
    with pytest.raises(UnknownModel, match=r"`stoker worker --model smollm2-135m-instruct`"):
        choose("smollm2-135m-instruct", "generate", MINI)
    with pytest.raises(UnknownModel, match=r"`stoker worker --model nope=SOURCE`"):
        choose("nope", "generate", MINI)


def test_a_model_that_cannot_do_the_job_is_refused() -> None:
    with pytest.raises(UnknownModel, match=r"'smol' cannot embed: it can generate, train; .* mini can embed"):
        choose("smol", "embed", MINI, SMOL)
    with pytest.raises(UnknownModel, match=r"'smol' cannot embed: it can generate, train; no model that is warm"):
        choose("smol", "embed", lately=(SMOL,))


@pytest.mark.parametrize(
    ("celery", "status"),
    [("SUCCESS", JobStatus.DONE), ("FAILURE", JobStatus.FAILED), ("REVOKED", JobStatus.CANCELLED)],
)
def test_celerys_final_states_become_ours(celery: str, status: JobStatus) -> None:
    outcome = Outcome.parse(json.dumps({"status": celery, "result": None}).encode())
    assert outcome is not None
    assert outcome.status == status


@pytest.mark.parametrize("celery", ["PENDING", "RETRY", "STARTED"])
def test_a_record_of_a_job_that_has_not_ended_is_no_outcome(celery: str) -> None:
    assert Outcome.parse(json.dumps({"status": celery, "result": None}).encode()) is None


def test_a_job_without_a_record_has_no_outcome() -> None:
    assert Outcome.parse(None) is None


@pytest.mark.parametrize("message", ["too long", ["too long"], ["too", "long"]])
def test_a_failed_job_raises_the_workers_error(message: object) -> None:
    record = {"status": "FAILURE", "result": {"exc_type": "TextTooLong", "exc_message": message, "exc_module": "x"}}
    outcome = Outcome.parse(json.dumps(record).encode())
    assert outcome is not None
    with pytest.raises(TextTooLong, match=r"^too long$"):
        outcome.unwrap("j")


def test_a_failure_of_an_unknown_class_is_a_failed_job() -> None:
    with pytest.raises(JobFailed, match="WorkerLostError: gone"):
        Outcome(JobStatus.FAILED, {"exc_type": "WorkerLostError", "exc_message": ["gone"]}).unwrap("j")


def test_a_cancelled_job_raises_that_it_was() -> None:
    with pytest.raises(JobCancelled, match="job j was cancelled"):
        Outcome(JobStatus.CANCELLED).unwrap("j")
    assert Outcome(JobStatus.DONE, 3).unwrap("j") == 3


def test_one_text_in_place_of_a_list_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="one text given; expected a list"):
        embed_request("m", "a text", {})


@pytest.mark.parametrize("texts", [None, 3, {"a": "a text"}])
def test_what_is_no_list_of_texts_is_refused(texts: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"texts: a \w+ given; expected a list of texts"):
        embed_request("m", texts, {})
    with pytest.raises(InvalidRequest, match=r"texts: a \w+ given; expected an iterable of texts"):
        checked_texts(texts)


@pytest.mark.parametrize("dataset", [None, 3])
def test_what_is_no_dataset_is_refused(dataset: Any) -> None:
    with pytest.raises(DatasetError, match="dataset"):
        read_dataset(dataset)


def test_a_seed_is_drawn_once_by_the_client() -> None:
    seeds = {generate_request("m", "p", None, {}).seed for _ in range(4)}
    assert len(seeds) == 4
    assert generate_request("m", "p", 0, {}).seed == 0


def test_a_prompt_may_be_token_ids_or_the_messages_of_a_conversation() -> None:
    assert generate_request("m", [3, 1], 0, {}).prompt_ids == (3, 1)
    (message,) = generate_request("m", [{"role": "user", "content": "Hello"}], 0, {}).messages or ()
    assert message.content == "Hello"


def test_ids_of_a_tokenizer_that_makes_arrays_are_token_ids() -> None:
    ids: Any = np.array([3, 1])
    for prompt in (ids, list(ids)):
        assert generate_request("m", prompt, 0, {}).prompt_ids == (3, 1)


NO_PROMPTS = [b"text", bytearray(b"text"), memoryview(b"text"), {"role": "user", "content": "a"}, 5]


@pytest.mark.parametrize("prompt", NO_PROMPTS)
def test_what_is_no_prompt_though_it_has_numbers_or_names_in_it_is_refused(prompt: Any) -> None:
    said = f"^prompt: a {type(prompt).__name__} given; expected a text, a list of token ids, or a list of messages"
    with pytest.raises(InvalidRequest, match=said):
        generate_request("m", prompt, 0, {})


def test_vectors_come_back_as_they_were_and_are_lost_when_expired() -> None:
    reply = EmbedReply(blob="b", rows=2, dim=3, usage=Usage())
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = read_vectors(reply, safetensors.numpy.save({"vectors": vectors}))
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert np.array_equal(found, vectors)
    with pytest.raises(JobLost, match="kept 24 hours"):
        read_vectors(reply, None)


@pytest.fixture
def server(broker: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A connection to the broker that clients find by their settings."""
    monkeypatch.setenv("STOKER_URL", broker.address.redis)
    connection = connect(broker)
    yield connection
    connection.close()


@pytest.fixture
def fake(server: Any) -> Callable[[], Client]:
    """Clients on a broker where two models were served lately."""
    for entry in (MINI, SMOL):
        seen = entry.model_copy(update={"seen": time.time()})
        server.hset(keys.MODELS, entry.model, seen.model_dump_json())
    server.expire(keys.MODELS, keys.MODEL_TTL)
    return Client


def asked(server: Any, job_id: str) -> dict[str, Any]:
    """The request, as a worker will get it."""
    return dict(json.loads(server.hget(keys.job(job_id), Field.REQUEST)))


def test_a_sent_job_is_known_to_every_client_by_its_id(fake: Callable[[], Client], server: Any) -> None:
    with fake() as first, fake() as second:
        job = first.embed(["a"], model="mini")
        assert asked(server, job.id)["texts"] == ["a"]
        message = json.loads(server.lindex(keys.ready(keys.queue("mini", "embed")), 0))
        assert (message["headers"]["task"], message["headers"]["id"]) == ("stoker.embed", job.id)
        found = second.job(job.id)
        assert isinstance(found, EmbedJob)
        assert found.status() == JobStatus.QUEUED


def test_a_refused_request_leaves_nothing_behind(fake: Callable[[], Client], server: Any) -> None:
    with fake() as sender:
        with pytest.raises(InvalidRequest):
            sender.generate("x", model="smol", max_tokens=0)
        with pytest.raises(DatasetError):
            sender.train("x", [{"text": ""}], model="smol")
    assert server.keys() == [keys.MODELS.encode()]


def test_a_dataset_is_uploaded_with_its_job(fake: Callable[[], Client], server: Any) -> None:
    with fake() as sender:
        job = sender.train("style", [{"text": "learn"}], model="smol", steps=3)
        assert isinstance(sender.job(job.id), TrainJob)
    request = asked(server, job.id)
    assert request["steps"] == 3
    assert server.get(keys.blob(request["dataset"])) == b'{"text": "learn"}'


def test_a_large_dataset_goes_in_parts_before_its_job_and_once(
    fake: Callable[[], Client], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "PART", 50)
    rows = [{"text": f"line {number}"} for number in range(20)]
    with fake() as sender:
        sender.train("style", rows, model="smol", job_id="large")
        blob = keys.blob(asked(server, "large")["dataset"])
        assert [json.loads(line) for line in server.get(blob).splitlines()] == rows
        assert server.ttl(blob) > keys.RESULT_TTL, "it stays as long as its job may wait"
        sender.train("style", rows[:10], model="smol", job_id="large")
        assert server.get(blob).count(b"line") == 20, "a known job's input is never written over"


def test_a_large_dataset_goes_in_parts_from_asyncio_too(
    fake: Callable[[], Client], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.setattr(keys, "PART", 50)
    rows = [{"text": f"line {number}"} for number in range(20)]

    async def send() -> None:
        async with AsyncClient() as sender:
            await sender.train("style", rows, model="smol", job_id="large")

    asyncio.run(send())
    assert server.get(keys.blob(asked(server, "large")["dataset"])).count(b"line") == 20


def test_a_cancel_is_marked_and_announced(fake: Callable[[], Client], server: Any) -> None:
    with fake() as sender, server.pubsub(ignore_subscribe_messages=True) as heard:
        heard.subscribe(keys.CANCELS)
        heard.get_message(timeout=1)
        job = sender.generate("x", model="smol")
        server.set(keys.worker("worker"), "{}", ex=keys.PRESENCE_TTL)
        ledger.claim(server, job.id, keys.queue("smol", "generate"), "token", "tag", "worker")
        job.cancel()
        assert server.exists(keys.cancel(job.id))
        assert 0 < server.ttl(keys.cancel(job.id)) <= keys.PENDING_TTL
        message = heard.get_message(timeout=5)
        assert message is not None
        assert message["data"].decode() == job.id


def test_a_job_whose_record_is_gone_is_lost(fake: Callable[[], Client], server: Any) -> None:
    with fake() as sender:
        job = sender.generate("x", model="smol")
        server.delete(keys.job(job.id))
        for ask in (job.status, job.result, lambda: list(job.stream()), lambda: sender.job(job.id)):
            with pytest.raises(JobLost, match=job.id):
                ask()


def test_a_limit_of_no_time_still_returns_what_is_there(fake: Callable[[], Client], server: Any) -> None:
    with fake() as sender:
        job = sender.generate("x", model="smol")
        with pytest.raises(JobTimeout):
            job.result(0)
        record = {"status": "FAILURE", "result": {"exc_type": "TextTooLong", "exc_message": ["x"]}}
        server.set(keys.result(job.id), json.dumps(record), ex=60)
        with pytest.raises(TextTooLong):
            job.result(0)


def test_the_asyncio_client_sends_the_same(fake: Callable[[], Client], server: Any) -> None:
    sent: list[Any] = []

    async def session() -> None:
        async with AsyncClient() as sender:
            sent.append(await sender.embed(["a"], model="mini"))
            sent.append(await sender.generate("x", model="smol", seed=4, max_tokens=5))
            job = await sender.train("style", [{"text": "learn"}], model="smol")
            assert await job.status() == JobStatus.QUEUED
            server.delete(keys.job(job.id))
            with pytest.raises(JobLost):
                await job.result()
            with pytest.raises(JobLost):
                await sender.job(job.id)

    asyncio.run(session())
    with fake() as sender:
        sent.append(sender.embed(["a"], model="mini"))
        sent.append(sender.generate("x", model="smol", seed=4, max_tokens=5))
    requests = [asked(server, job.id) for job in sent]
    assert requests[:2] == requests[2:]


def test_a_full_queue_names_its_depth_and_a_wait(fake: Callable[[], Client], server: Any) -> None:
    policy.decide(server, "queue_limit", 1)
    with fake() as sender:
        sender.embed(["a"], model="mini")
        with pytest.raises(QueueFull, match=r"1 jobs wait there and 1 may.*again in about") as refused:
            sender.embed(["b"], model="mini")
        assert (refused.value.depth, refused.value.limit) == (1, 1)
        assert refused.value.wait >= 1


@pytest.mark.usefixtures("fake")
def test_a_client_that_has_too_many_open_jobs_is_named(server: Any) -> None:
    policy.decide(server, "client_limit:alice", 1)
    with Client(key="alice") as alice, Client(key="bob") as bob:
        alice.embed(["a"], model="mini")
        with pytest.raises(QueueFull, match="client 'alice' has 1 open jobs there and may have 1"):
            alice.embed(["b"], model="mini")
        bob.embed(["b"], model="mini")


def test_a_client_may_wait_for_a_place(fake: Callable[[], Client], server: Any) -> None:
    policy.decide(server, "queue_limit", 1)
    with fake() as sender, Client(queue_wait=30) as patient:
        first = sender.embed(["a"], model="mini")
        cancels = threading.Timer(0.3, first.cancel)
        cancels.start()
        assert patient.embed(["b"], model="mini").status() == JobStatus.QUEUED
        cancels.join()


def test_a_policy_that_makes_no_sense_is_refused(server: Any) -> None:
    for name, value in (("queue_limits", 3), ("queue_limit", 0), ("client_limit:a/b", 3), ("ageing", 10**9)):
        with pytest.raises(InvalidRequest, match="allowed"):
            policy.decide(server, name, value)
    policy.decide(server, "ageing", 60)
    assert policy.read(server)["ageing"] == 60
    policy.decide(server, "ageing", None)
    assert policy.read(server)["ageing"] == ledger.AGEING


def test_vectors_are_fetched_also_when_the_broker_is_away_at_that_very_moment(
    fake: Callable[[], Client], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the chaos suite: the outcome had come, and the broker went before the vectors did."""
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    server.set(keys.blob("vectors:x"), safetensors.numpy.save({"vectors": vectors}), ex=60)
    with fake() as sender:
        job = sender.embed(["a", "b"], model="mini")
        evalsha, away = sender.redis.evalsha, iter([True, True])

        def unsteady(*command: Any) -> Any:
            if next(away, False):
                raise RedisConnectionError("gone")
            return evalsha(*command)

        monkeypatch.setattr(sender.redis, "evalsha", unsteady)
        reply = EmbedReply(blob="vectors:x", rows=2, dim=3, usage=Usage())
        assert np.array_equal(plain(job.link.vectors("x", reply)), vectors)


def test_vectors_that_a_client_fetches_are_kept_for_as_long_as_it_bears_a_broker_that_is_away(
    fake: Callable[[], Client], server: Any
) -> None:
    blob, reply = keys.blob("vectors:x"), EmbedReply(blob="vectors:x", rows=2, dim=3, usage=Usage())
    data = safetensors.numpy.save({"vectors": np.zeros((2, 3), np.float32)})
    with fake() as sender:
        settings = sender.settings.model_copy(update={"patience": 3600.0})

    async def fetch() -> None:
        async with AsyncClient(settings=settings) as client:
            await client.link.vectors("x", reply)

    for ask in (lambda: asyncio.run(fetch()), lambda: Client(settings=settings).link.vectors("x", reply)):
        server.set(blob, data, ex=keys.RESULT_TTL)
        ask()
        assert 3600 < server.ttl(blob) <= keys.FETCHED_TTL + 3600


SPOILED = [b"garbage", b"{}", b"[]", b"1", b"\xff", b"null", b"[" * 50_000]


@pytest.mark.parametrize(("size", "shown"), [(60, 60), (61, 60), (5000, 60)])
def test_of_what_another_program_wrote_the_beginning_is_shown_and_that_there_is_more(size: int, shown: int) -> None:
    quoted = repr(b"a" * shown + (b"..." if size > shown else b""))
    assert f"holds {quoted}, which" in str(spoiled("result", b"a" * size))


@pytest.mark.parametrize("raw", SPOILED, ids=lambda raw: repr(raw[:20]))
def test_a_result_that_no_worker_wrote_is_one_clear_error(raw: bytes) -> None:
    with pytest.raises(JobLost, match=r"result cannot be read: the broker holds b.*Stoker did not write"):
        Outcome.parse(raw)
    assert announced(raw) is None, "a channel may carry anything: the record decides"


@pytest.mark.parametrize("value", [1, None, [], {"exc_type": ["x"], "exc_message": {"a": 1}}])
def test_an_error_of_another_shape_is_an_error_all_the_same(value: object) -> None:
    outcome = Outcome.parse(json.dumps({"status": "FAILURE", "result": value}).encode())
    assert outcome is not None
    with pytest.raises(JobFailed):
        outcome.unwrap("job")


@pytest.mark.parametrize("value", [{"a": 1}, [], 1, None, "x"])
def test_a_result_of_another_shape_is_one_clear_error(value: object) -> None:
    with pytest.raises(JobLost, match="result cannot be read"):
        result_as(GenerateResult, value)


def test_a_kind_that_is_unknown_is_one_clear_error() -> None:
    with pytest.raises(JobLost, match="kind 'evil'"):
        known_kind("job", "evil")


def test_a_key_of_the_wrong_type_is_named_and_is_no_broker_that_does_not_answer() -> None:
    error = broker_unavailable(Settings(), ResponseError("WRONGTYPE Operation"), "stoker:job:x")
    assert "stoker:job:x holds something that Stoker did not write" in str(error)
    assert "no answer" not in str(error)


def test_a_model_is_known_until_its_time_is_over() -> None:
    lately = MINI.model_copy(update={"seen": time.time() - keys.MODEL_TTL + 60})
    assert parse_cards({b"mini": lately.model_dump_json().encode()}) == {"mini": lately}


@pytest.mark.parametrize(("wait", "pause"), [(4.0, 2.0), (1.0, 0.5), (60.0, 5.0)])
def test_a_client_that_waits_for_a_place_looks_again_after_half_the_wait(wait: float, pause: float) -> None:
    request = embed_request("m", ["a"], {})
    submission = Submission(Settings(queue_wait=60.0), request, "job")
    assert submission.pause(Submitted("full", 1, 1, wait)) == pause
    assert submission.pause(Submitted("client_full", 1, 1, wait)) == pause
    assert submission.pause(Submitted("new", 0, 1)) is None


def test_a_choice_is_kept_for_as_long_as_a_worker_is_silent_between_two_presences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("stoker.client.model_choice.time.monotonic", lambda: now)
    choices = Choices()
    assert choices.keep(None, "embed", "mini") == "mini"
    now += keys.PRESENCE_EVERY / 2
    assert choices.get(None, "embed") == "mini"
    assert choices.keep(None, "embed", "mini") == "mini", "asking again does not keep it for longer"
    now += keys.PRESENCE_EVERY / 2
    assert choices.get(None, "embed") is None


def kill_owners(server: Any, job_id: str, kind: str) -> None:
    """What workers do that die of a job, and the one that puts it aside after them."""
    queue = keys.queue("smol", kind)
    for number in range(ledger.MAX_CRASHES + 1):
        state = ledger.claim(server, job_id, queue, f"t{number}", "tag", f"w{number}").state
    assert state == "dead"
    ledger.dead_letter(server, job_id, queue, f"t{number}")
    assert ledger.complete(server, job_id, queue, f"t{number}", ledger.failure(job_id, JobDead("dead-lettered"))) == 1


def test_a_dead_letter_is_sent_again_once_with_its_input_and_without_its_crashes(
    fake: Callable[[], Client], server: Any
) -> None:
    """The quick form of `test_a_job_that_crashes_its_workers_is_a_dead_letter_and_can_be_retried`."""
    with fake() as sender:
        job = sender.train("style", [{"text": "learn"}], model="smol")
        before, blob = asked(server, job.id), server.hget(keys.job(job.id), Field.BLOB)
        kill_owners(server, job.id, "train")
        with pytest.raises(JobDead, match="dead-lettered"):
            job.result(0)
        letter = sender.dead()[job.id]
        assert [crash["worker"] for crash in letter["history"]] == [f"w{n}" for n in range(ledger.MAX_CRASHES)]
        assert server.get(blob) == b'{"text": "learn"}'
        again = sender.retry(job.id)
        assert (again.id, again.status(), sender.dead()) == (job.id, JobStatus.QUEUED, {})
        assert asked(server, job.id) == before
        assert (server.hget(keys.job(job.id), Field.BLOB), server.get(blob)) == (blob, b'{"text": "learn"}')
        claimed = ledger.claim(server, job.id, keys.queue("smol", "train"), "new", "tag", "w")
        assert (claimed.state, claimed.resumed) == ("run", False)
        for nobody in (job.id, "nobody"):
            with pytest.raises(JobLost, match="no dead letter"):
                sender.retry(nobody)


@pytest.mark.parametrize("reads", ["result", "stream", "again"])
def test_a_deadline_ends_a_job_that_no_worker_takes_for_who_waits_for_it(
    fake: Callable[[], Client], server: Any, reads: str
) -> None:
    with fake() as client, fake() as other:
        job = client.generate("x", model="smol", deadline=0.3)
        if reads == "again":
            found = other.job(job.id)
            assert isinstance(found, GenerateJob)
            job = found
        with pytest.raises(DeadlineExceeded, match=r"no worker took it, and it is past its deadline of 0\.3 s"):
            list(job.stream(timeout=30)) if reads == "stream" else job.result(30)
        assert job.status() == JobStatus.FAILED
        assert client.jobs() == {}


@pytest.mark.parametrize("model", ["smol", "mini"])
def test_who_waits_for_a_job_hears_once_if_no_worker_alive_serves_its_model(
    fake: Callable[[], Client],
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: str,
) -> None:
    monkeypatch.setattr(following, "UNOWNED", 0.0)
    report = worker(MINI).model_dump_json()
    server.set(keys.worker("w"), report, ex=keys.PRESENCE_TTL)
    server.zadd(keys.WORKERS, {"w": time.time()})
    server.expire(keys.WORKERS, keys.PRESENCE_TTL)
    with fake() as client:
        job = client.generate("x", model="smol") if model == "smol" else client.embed(["x"], model="mini")
        with pytest.raises(JobTimeout):
            job.result(timeout=1.3)
        job.cancel()
    seen = [record.getMessage() for record in caplog.records if record.name == "stoker.client"]
    assert seen == ([f"job {job.id} waits: no worker that is alive can generate with smol."] if model == "smol" else [])


def test_a_broker_that_is_away_as_a_reader_asks_for_workers_does_not_end_its_waiting(
    fake: Callable[[], Client], server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "UNOWNED", 0.0)
    asked_for: list[object] = []

    def is_away(redis: Any, *question: Any, **more: Any) -> None:
        """And then the job ends."""
        asked_for.append(question)
        result = GenerateResult(text="a", token_ids=(1,), finish_reason="stop", model="m", adapter=None, usage=Usage())
        server.set(keys.result(job.id), ledger.success(job.id, result.model_dump(mode="json")).text(), ex=60)
        raise RedisConnectionError("gone")

    with fake() as client:
        job = client.generate("Once", model="smol")
        monkeypatch.setattr(type(client.redis), "zrange", is_away)
        assert job.result(timeout=30).text == "a"
    assert asked_for


def test_a_client_that_waits_for_a_place_looks_again_for_the_last_time_when_its_wait_ends() -> None:
    submission = Submission(Settings(queue_wait=0.5), embed_request("m", ["a"], {}), "job")
    pause = submission.pause(Submitted("full", 1, 1, 60.0))
    assert pause is not None
    assert 0 < pause <= 0.5


def test_the_record_of_a_job_says_how_large_it_is() -> None:
    generate = build(GenerateRequest, {"model": "m", "prompt": "x", "max_tokens": 20, "n": 3})
    train = build(TrainRequest, {"model": "m", "name": "x", "dataset": "worker:d", "steps": 7})
    said = [job_record(request, "job").size for request in (generate, train, embed_request("m", ["a", "b"], {}))]
    assert said == ["60 tokens", "7 steps", "2 texts"]
    assert job_record(train, "job").blob == "", "its dataset is on a worker, and no key of the broker"

"""What each kind's handler does around the engine: the input that it loads, and what is registered of a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from engine.adapters.store import AdapterStore
from engine.generation.beyond import BeyondMemory
from engine.training.memory import RunMemory
from stoker.broker import keys, ledger, registry
from stoker.broker.connection import connect
from stoker.broker.ledger.record import Field
from stoker.broker.ledger.replies import Claim, Passing
from stoker.broker.ledger.vectors import Kept
from stoker.client.requests import generate_request
from stoker.contract import (
    AdapterRequest,
    AdapterResult,
    EmbedRequest,
    GenerateRequest,
    GenerateResult,
    StreamToken,
    TrainRequest,
    TrainResult,
    Usage,
    bundle,
    vectors,
)
from stoker.contract.bundle import AdapterInput
from stoker.contract.dataset import TrainInput
from stoker.contract.uploads import Kind, Upload
from stoker.contract.vectors import Embedded
from stoker.errors import InvalidRequest, JobLost, VectorsFull, WorkerUnavailable
from stoker.settings import Settings
from tasks import embed
from tasks.adapters import AdapterHandler
from tasks.embed import EmbedHandler
from tasks.generate import GenerateHandler
from tasks.train import TrainHandler
from workers import moving
from workers.beginnings import BLOCK, beginnings
from workers.capacity import DoesNotFit
from workers.job import Job
from workers.job_lease import JobLease, PassedOn
from workers.services import placing
from workers.services.placing import Memory, Placing

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "stoker.json": b"{}"}
LINES = b'{"text": "a"}\n{"text": "b"}'


class Worker:
    """Whose jobs are here: a broker, a disk, and an engine that does nothing."""

    def __init__(self, settings: Settings, root: Path) -> None:
        self.redis, self.store = connect(settings), AdapterStore(root / "adapters")
        self.run_memory = RunMemory(100)
        self.runtime: Any = SimpleNamespace(
            redis=self.redis,
            settings=settings,
            engine=SimpleNamespace(
                store=self.store,
                models={"m": None},
                run_memory=self.run_memory,
                kept_by=lambda request: 60,
                check_files=lambda *version: None,
            ),
            name="w@here",
            placing=Placing(settings, "w@here", self.redis),
            persist=lambda action: action(),
        )
        self.resources = ExitStack()
        #: Workers to which its job was passed on.
        self.passed: list[str] = []

    def job(self, *, resumed: bool = False) -> Job:
        self.redis.hset(keys.job("job"), Field.KIND, "train")
        self.redis.expire(keys.job("job"), 60)
        self.redis.hset(keys.job("job"), Field.TOKEN, "token")
        lease = JobLease(self.runtime, "job", keys.queue("m", "train"), "token", "tag")
        delivery: Any = SimpleNamespace(id="job", runtime=self.runtime, lease=lease)
        return Job(delivery, Claim("run", 2.5, resumed, submitted=1772924399.5), self.resources)

    def send(self, kind: Kind, data: bytes) -> str:
        name = str(Upload.of(kind, "job", data))
        self.redis.set(keys.blob(name), data, ex=60)
        return name

    def write(self) -> None:
        """The files of the version that the engine made."""

        def fill(draft: Path) -> None:
            for name, content in FILES.items():
                (draft / name).write_bytes(content)

        self.store.install("m", "style", fill, 1)

    @property
    def entry(self) -> registry.AdapterEntry:
        return registry.parse("m", "style", self.redis.hgetall(keys.adapter("m", "style")))


@pytest.fixture
def worker(broker: Settings, tmp_path: Path) -> Iterator[Worker]:
    made = Worker(broker, tmp_path)
    yield made
    made.resources.close()
    made.redis.flushall()
    made.redis.close()


def training(dataset: str, *, promote: bool = True) -> TrainRequest:
    return TrainRequest(model="m", name="style", dataset=dataset, rank=4, dora=True, promote=promote)


def trained(worker: Worker) -> TrainResult:
    worker.write()
    return TrainResult(
        model="m", adapter="style", version=1, steps=3, first_loss=2.0, last_loss=1.0, best_step=2,
        held_out_loss=1.5, tokens=30, usage=Usage(run_seconds=4.0),
    )  # fmt: skip


@pytest.mark.parametrize("promote", [True, False])
def test_what_was_trained_is_registered_with_what_made_it_and_serves_if_that_was_asked(
    worker: Worker, promote: bool
) -> None:
    reply = TrainHandler().finish(worker.job(), training("x", promote=promote), trained(worker))
    assert (reply.usage.worker, reply.usage.queued_seconds, reply.usage.run_seconds) == ("w@here", 2.5, 4.0)
    entry = worker.entry
    assert entry.serving == (1 if promote else None)
    known = entry.versions[1]
    assert {name: known[name] for name in ("rank", "method", "source", "steps", "loss", "held_out_loss")} == {
        "rank": 4, "method": "dora", "source": "trained", "steps": 3, "loss": 1.0, "held_out_loss": 1.5,
    }  # fmt: skip


def test_a_run_that_is_finished_twice_registers_one_version(worker: Worker) -> None:
    """The broker may go away between the registry and the result."""
    for _ in range(2):
        TrainHandler().finish(worker.job(), training("x"), trained(worker))
        assert list(worker.entry.versions) == [1]


def test_a_run_has_its_dataset_and_the_same_version_however_often_it_begins(worker: Worker) -> None:
    request = training(worker.send("dataset", LINES))
    first, second = (TrainHandler().load_input(worker.job(), request) for _ in range(2))
    assert first == second == TrainInput(LINES, 1)


def test_a_run_that_does_not_fit_next_to_another_goes_back_before_it_takes_anything(worker: Worker) -> None:
    """One that is alone always fits."""
    request, job = training(worker.send("dataset", LINES)), worker.job()
    worker.run_memory.reserve("another's token", 300)
    with pytest.raises(DoesNotFit, match=r"does not fit next to 1 that keep .*STOKER_TRAIN_MEMORY") as refused:
        TrainHandler().load_input(job, request)
    assert refused.value.others == 1
    assert worker.redis.hget(keys.job("job"), Field.VERSION) is None
    worker.run_memory.release("another's token")
    assert TrainHandler().load_input(job, request) is not None
    assert worker.run_memory.kept == 60
    worker.resources.close()
    assert worker.run_memory.kept == 0


def test_a_run_on_a_model_that_has_just_been_unloaded_is_left_to_the_engine_to_refuse(worker: Worker) -> None:
    del worker.runtime.engine.models["m"]
    assert TrainHandler().load_input(worker.job(), training(worker.send("dataset", LINES))) is not None
    assert worker.run_memory.kept == 0


def test_a_run_whose_dataset_has_expired_has_no_input_and_takes_no_version(worker: Worker) -> None:
    """The engine goes on from a checkpoint, or says what is missing."""
    request = training(str(Upload.of("dataset", "job", LINES)))
    assert TrainHandler().load_input(worker.job(), request) is None
    assert worker.redis.hget(keys.job("job"), Field.VERSION) is None


def test_a_run_goes_on_where_the_store_has_it_before_its_own_checkpoints_are_sent(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    def enter(mirror: moving.RunMirror) -> moving.RunMirror:
        did.append("mirrored")
        return mirror

    monkeypatch.setattr(moving, "resume", lambda job, request: did.append("resumed"))
    monkeypatch.setattr(moving.RunMirror, "__enter__", enter)
    monkeypatch.setattr(moving.RunMirror, "__exit__", lambda *_: None)
    assert TrainHandler().load_input(worker.job(), training(str(Upload.of("dataset", "job", LINES)))) is None
    assert did == []
    data = TrainHandler().load_input(worker.job(), training(worker.send("dataset", LINES)))
    assert did == ["resumed", "mirrored"]
    assert data is not None
    assert data.kept.__name__ == "kept"


def loading(upload: str, *, promote: bool = True) -> AdapterRequest:
    return AdapterRequest(model="m", name="style", upload=upload, promote=promote)


def test_an_adapter_that_was_sent_lies_in_a_folder_until_its_job_is_done(worker: Worker) -> None:
    upload = worker.send("adapter", bundle.pack(FILES, "/data/style"))
    data = AdapterHandler().load_input(worker.job(), loading(upload))
    assert data == AdapterInput(data.folder, "/data/style", 1)
    assert {file.name: file.read_bytes() for file in data.folder.iterdir()} == FILES
    worker.resources.close()
    assert not data.folder.exists()


def test_an_adapter_whose_files_have_expired_is_an_error_that_says_what_to_do(worker: Worker) -> None:
    upload = str(Upload.of("adapter", "job", bundle.pack(FILES)))
    with pytest.raises(JobLost, match="Send them again"):
        AdapterHandler().load_input(worker.job(), loading(upload))


def test_an_adapter_that_was_loaded_is_registered_as_one_that_was_not_trained_here(worker: Worker) -> None:
    worker.write()
    made = AdapterResult(model="m", adapter="style", version=1, rank=8, method="lora", usage=Usage())
    reply = AdapterHandler().finish(worker.job(), loading("x"), made)
    assert reply.usage.worker == "w@here"
    known = worker.entry.versions[1]
    assert (worker.entry.serving, known["source"], known["rank"], known["method"]) == (1, "loaded", 8, "lora")


def test_an_adapter_that_was_loaded_serves_only_if_that_was_asked(worker: Worker) -> None:
    worker.write()
    made = AdapterResult(model="m", adapter="style", version=1, rank=8, method="lora", usage=Usage())
    AdapterHandler().finish(worker.job(), loading("x", promote=False), made)
    assert (worker.entry.serving, list(worker.entry.versions)) == (None, [1])


def token(index: int) -> StreamToken:
    return StreamToken(index=index, token_id=index + 5, text="a", logit=1.0, logprob=-0.5, probability=0.6)


@pytest.mark.parametrize("resumed", [True, False])
def test_a_job_that_had_an_owner_goes_on_behind_its_tokens_and_a_new_one_reads_none(
    worker: Worker, resumed: bool
) -> None:
    """A stream of another job under the same id, of before, is none of the new job's."""
    published = [token(index) for index in range(3)]
    for one in published:
        worker.redis.xadd(keys.stream("job"), {"entry": one.model_dump_json()}, id=f"{one.index + 1}-0")
    worker.redis.expire(keys.stream("job"), 60)
    request = generate_request("m", "x", 0, {})
    assert GenerateHandler().load_input(worker.job(resumed=resumed), request) == (published if resumed else [])


def test_the_engine_hears_when_a_generation_was_sent(worker: Worker) -> None:
    """Its template writes that date for each owner."""
    worker.runtime.engine.submit = Mock()
    GenerateHandler().submit(worker.job(resumed=True))("job", generate_request("m", "x", 0, {}), [], deadline=None)
    assert worker.runtime.engine.submit.call_args.kwargs["sent"] == 1772924399.5


@pytest.fixture
def too_long(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Submits a prompt of 5,000 tokens, for which this worker's memory is too small; `others`: what theirs holds."""

    def submit(*others: Memory, state: str = "passed") -> Any:
        def passed(*given: Any, needed: bool) -> Passing:
            assert needed
            worker.passed.append(given[-1])
            return Passing(state)

        worker.runtime.engine.submit = Mock(side_effect=BeyondMemory("5000 tokens given, 4000 here.", 5000))
        monkeypatch.setattr(worker.runtime.placing, "memories", lambda model: list(others))
        monkeypatch.setattr(ledger, "pass_on", passed)
        return GenerateHandler().submit(worker.job())("job", generate_request("m", "x", 0, {}), [], deadline=None)

    return submit


def test_a_prompt_that_memory_here_does_not_hold_goes_to_the_worker_with_most_room_of_those_whose_memory_does(
    worker: Worker, too_long: Callable[..., Any]
) -> None:
    small, exact = Memory("small", 4999, 9), Memory("exact", 5000, 9)
    with pytest.raises(PassedOn, match="large has memory for its prompt of 5000 tokens"):
        too_long(small, exact, Memory("full", 9000, 0), Memory("large", 5001, 3))
    with pytest.raises(PassedOn):
        too_long(Memory("full", 9000, 0), small)
    assert worker.passed == ["large", "full"], "one that is full takes it later"


def test_a_prompt_that_no_workers_memory_holds_is_refused_with_the_largest(
    worker: Worker, too_long: Callable[..., Any]
) -> None:
    for others, more in (
        ((), ""),
        ((Memory("old/1", 0, 1),), ""),
        ((Memory("a/1", 30, 4), Memory("b/2", 5000, 1)), " Of the other workers b has most: 5000 tokens."),
    ):
        with pytest.raises(InvalidRequest) as refused:
            too_long(*others)
        assert type(refused.value) is InvalidRequest, "which each release knows"
        assert str(refused.value) == f"5000 tokens given, 4000 here.{more}"
    assert not worker.passed


def test_a_prompt_beyond_memory_that_cannot_be_passed_on_is_refused(
    worker: Worker, too_long: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidRequest, match="5000 tokens given"):
        too_long(Memory("large", 9000, 1), state="stays")


def test_a_job_keeps_the_version_of_its_adapter_that_it_began_with(worker: Worker) -> None:
    """Another version serves before its next owner begins."""
    TrainHandler().finish(worker.job(), training("x"), trained(worker))
    worker.redis.delete(keys.job("job"))
    request = generate_request("m", "x", 0, {"adapter": "style"})
    assert GenerateHandler().prepare(worker.job(), request).adapter == "style@1"
    registry.change(worker.redis, "m", "deactivate", "style", None)
    assert GenerateHandler().prepare(worker.job(resumed=True), request).adapter == "style@1"


@pytest.mark.parametrize(("left", "expected"), [((0, 1, 2), [0, 1, 2]), ((0, 1, 3, 4), [0, 1]), ((2, 3), []), ((), [])])
def test_a_job_goes_on_behind_the_tokens_before_those_that_the_broker_has_lost(
    worker: Worker, left: tuple[int, ...], expected: list[int]
) -> None:
    for index in left:
        token = StreamToken(index=index, token_id=1, text="a", logit=0.0, logprob=-1.0, probability=1.0)
        worker.redis.xadd(keys.stream("job"), {"entry": token.model_dump_json()}, id=keys.entry_id(index))
    worker.redis.expire(keys.stream("job"), 60)
    request = generate_request("m", "x", 0, {})
    tokens = GenerateHandler().load_input(worker.job(resumed=True), request)
    assert [token.index for token in tokens] == expected


def test_a_job_without_an_adapter_is_prepared_as_it_is(worker: Worker) -> None:
    request = generate_request("m", "x", 0, {})
    assert GenerateHandler().prepare(worker.job(), request) is request


def test_a_long_prompt_goes_where_its_beginning_is_and_where_it_ran_is_noted(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, request = GenerateHandler(), generate_request("m", "x" * 2 * BLOCK, 0, {})
    result = GenerateResult(text="y", token_ids=(1,), finish_reason="stop", usage=Usage(), model="m", adapter=None)
    asked: list[tuple[str, list[str]]] = []
    named: list[GenerateRequest] = []

    def names(of: GenerateRequest) -> list[str]:
        named.append(of)
        return beginnings(of)

    monkeypatch.setattr(placing, "beginnings_of", names)
    monkeypatch.setattr(worker.runtime.placing, "better", lambda *prompt: asked.append(prompt))
    job = worker.job()
    handler.prepare(job, request)
    assert asked == [("m", beginnings(request))]
    handler.finish(job, request, result)
    assert [worker.redis.scard(keys.beginning(name)) for name in beginnings(request)] == [1, 1]
    assert named == [request], "a long prompt is hashed once"


def test_a_job_that_waits_for_room_gives_up_after_a_while(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = iter(range(0, 1000, 10)), list[float]()

    def wait(seconds: float) -> bool:
        looks.append(seconds)
        return len(looks) > 10

    worker.runtime.stopped = SimpleNamespace(wait=wait)
    monkeypatch.setattr(embed, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(embed, "keep", lambda *_: Kept(False, 90, 100))
    made = Embedded(np.zeros((1, 3), dtype=np.float32), tokens=7, run_seconds=2.0)
    with pytest.raises(VectorsFull, match=r"vectors that wait to be fetched have 90 bytes and may have 100.*discard"):
        EmbedHandler().finish(worker.job(), EmbedRequest(model="m", texts=("a",)), made)
    assert looks == [embed.LOOK_EVERY] * round(embed.ROOM_LIMIT / 10 - 1)


def test_a_job_that_waits_for_room_goes_to_another_worker_when_this_one_stops(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False, True])
    worker.runtime.stopped = SimpleNamespace(wait=lambda seconds: next(looks))
    monkeypatch.setattr(embed, "keep", lambda *_: Kept(False, 90, 100))
    made = Embedded(np.zeros((1, 3), dtype=np.float32), tokens=7, run_seconds=2.0)
    with pytest.raises(WorkerUnavailable, match="is stopping"):
        EmbedHandler().finish(worker.job(), EmbedRequest(model="m", texts=("a",)), made)


def test_vectors_are_kept_in_a_blob_and_the_reply_says_what_they_are_and_took(worker: Worker) -> None:
    made = np.array([[1.0, 0.0, 0.5], [0.0, -1.0, 0.5]], dtype=np.float32)
    request = EmbedRequest(model="m", texts=("a", "b"), dtype="float16")
    reply = EmbedHandler().finish(worker.job(), request, Embedded(made, tokens=7, run_seconds=2.0))
    assert (reply.blob, reply.rows, reply.dim, reply.dtype) == (keys.vectors("job"), 2, 3, "float16")
    assert (reply.usage.prompt_tokens, reply.usage.run_seconds) == (7, 2.0)
    assert (reply.usage.worker, reply.usage.queued_seconds) == ("w@here", 2.5)
    data = worker.redis.get(keys.blob(reply.blob))
    kept = vectors.load(data)
    assert isinstance(kept, np.ndarray)
    assert np.array_equal(kept, made.astype(np.float16))
    assert 0 < worker.redis.ttl(keys.blob(reply.blob)) <= keys.RESULT_TTL

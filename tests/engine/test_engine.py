"""The engine as its worker uses it: one thread, many jobs at once; real weights where it matters what they say."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.generation.limits import LaneLimits
from engine.ticket import Entry, StepOutput, Ticket
from stoker.catalogue import CATALOGUE
from stoker.contract import EmbedRequest, GenerateRequest, TrainRequest
from stoker.contract.dataset import TrainInput
from stoker.errors import JobCancelled, JobFailed, ModelError, UnknownModel, WorkerUnavailable
from tests import endless
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, wait_until

GOLDENS = Path(__file__).parent.parent / "goldens"
PROMPTS = json.loads((GOLDENS / "smollm2.json").read_text())["prompts"]
MINILM = json.loads((GOLDENS / "minilm.json").read_text())
DATASET = TrainInput(b'{"prompt": "Q: coal?\\nA:", "completion": " Aye!"}')


class Running:
    """An engine and what it published, by job."""

    def __init__(self, adapters: Path, tiny: Path) -> None:
        self.entries: defaultdict[str, list[Any]] = defaultdict(list)
        models = {name: CATALOGUE[name] for name in (EMBED_MODEL, GENERATE_MODEL)} | {endless.MODEL: (str(tiny),)}
        self.engine = Engine(
            models,
            adapters=adapters,
            publish=lambda entries: self.publish(entries),
            limits=LaneLimits(slots=9, lookup=False),
        )

    def publish(self, entries: list[Entry]) -> None:
        for job_id, entry in entries:
            self.entries[job_id].append(entry)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless.write(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("adapters"), tiny)
    made.engine.start()
    yield made
    made.engine.stop()


def generate(prompt: str, model: str = GENERATE_MODEL, **options: Any) -> GenerateRequest:
    return GenerateRequest(model=model, prompt=prompt, **options)


def stream(max_tokens: int, **options: Any) -> GenerateRequest:
    """So many tokens of any kind, next to nothing each."""
    return generate("x", endless.MODEL, max_tokens=max_tokens, **options)


def end(running: Running, ticket: Ticket[Any]) -> None:
    """Wait until a job has ended: cancelled, unless it was done."""
    ticket.cancel()
    running.engine.wake()
    with suppress(JobCancelled):
        ticket.result(60)


@pytest.mark.slow
def test_greedy_texts_of_one_batch_equal_those_of_transformers(running: Running) -> None:
    most = 12
    jobs = [
        (prompt, running.engine.submit(prompt["name"], generate(prompt["prompt"], max_tokens=most)))
        for prompt in PROMPTS
    ]
    for prompt, ticket in jobs:
        result, wanted = ticket.result(120), prompt["token_ids"][:most]
        assert list(result.token_ids) == wanted, prompt["name"]
        assert len(result.text) >= len(wanted), prompt["name"]
        assert prompt["text"].startswith(result.text), prompt["name"]
        assert result.finish_reason == ("length" if len(wanted) == most else prompt["finish_reason"]), prompt["name"]
        published = running.entries[prompt["name"]]
        assert [token.index for token in published] == list(range(len(wanted)))
        assert published[-1].is_eos == (result.finish_reason == "stop")


def test_a_ticket_has_the_priority_of_its_request(running: Running) -> None:
    tickets = [running.engine.submit("x", generate("x", max_tokens=1, priority=priority)) for priority in (9, 0)]
    assert [ticket.priority for ticket in tickets] == [9, 0]
    assert all(ticket.result(60) for ticket in tickets)


def test_a_greedy_token_has_the_logit_and_logprob_of_the_raw_model(running: Running) -> None:
    golden = np.load(GOLDENS / "smollm2.npz")
    running.engine.submit("logit", generate(PROMPTS[0]["prompt"], max_tokens=1)).result(60)
    token = running.entries["logit"][0]
    logit = golden["top_logits_0"][-1, 0]
    assert token.logit == pytest.approx(logit, abs=2e-4)
    assert token.logprob == pytest.approx(logit - golden["logsumexp_0"][-1], abs=5e-4)
    assert token.probability == 1.0


def test_vectors_alone_and_padded_in_a_batch_equal_those_of_sentence_transformers(running: Running) -> None:
    golden = np.load(GOLDENS / "minilm.npz")
    texts = tuple(text["text"] for text in MINILM["texts"])
    batch = running.engine.submit("batch", EmbedRequest(model=EMBED_MODEL, texts=texts, truncation="end")).result(60)
    assert np.abs(batch.vectors - golden["batch"]).max() < 1e-4
    for number, text in enumerate(texts):
        request = EmbedRequest(model=EMBED_MODEL, texts=(text,), truncation="end")
        alone = running.engine.submit("alone", request).result(60)
        assert np.abs(alone.vectors[0] - golden["alone"][number]).max() < 1e-4


@pytest.mark.parametrize(
    ("prompt", "text"),
    [("query", "query: how hot is it?"), ("Topic: ", "Topic: how hot is it?"), (None, "how hot is it?")],
)
def test_a_prompt_goes_before_each_text(running: Running, prompt: str | None, text: str) -> None:
    asked = EmbedRequest(model=EMBED_MODEL, texts=("how hot is it?",), prompt=prompt)
    whole = EmbedRequest(model=EMBED_MODEL, texts=(text,))
    first, second = (running.engine.submit("x", request).result(60).vectors for request in (asked, whole))
    assert np.array_equal(first, second)


def test_a_stream_goes_on_behind_what_was_published(running: Running) -> None:
    request = generate("The stoker said", max_tokens=8, temperature=0.8, seed=5)
    whole = running.engine.submit("whole", request).result(60)
    for split in (1, 7, 8):
        job = f"split-{split}"
        result = running.engine.submit(job, request, running.entries["whole"][:split]).result(60)
        assert result.token_ids == whole.token_ids
        assert result.text == whole.text
        assert [token.index for token in running.entries[job]] == list(range(split, 8))


def test_a_seed_decides_the_text_in_every_batch(running: Running) -> None:
    request = generate("The stoker said", max_tokens=8, temperature=0.9, top_p=0.95, top_k=40, seed=11)
    alone = running.engine.submit("alone", request).result(60)
    noise = [
        running.engine.submit(f"noise-{seed}", generate("Noise", max_tokens=9, temperature=1.5, seed=seed))
        for seed in range(5)
    ]
    crowded = running.engine.submit("crowded", request).result(60)
    others = [ticket.result(60).text for ticket in noise]
    assert crowded.token_ids == alone.token_ids
    assert len(set(others)) > 1


def test_more_requests_than_slots_all_end(running: Running) -> None:
    tickets = [running.engine.submit(f"many-{n}", stream(2)) for n in range(20)]
    assert all(ticket.result(60).usage.completion_tokens == 2 for ticket in tickets)


def test_a_cancelled_job_frees_its_slot_at_once(running: Running) -> None:
    tickets = [running.engine.submit(f"long-{n}", stream(4000)) for n in range(9)]
    wait_until(lambda: all(running.entries[f"long-{n}"] for n in range(9)), "all of them run")
    waiting = running.engine.submit("waiting", stream(1))
    tickets[4].cancel()
    running.engine.wake()
    assert waiting.result(60).usage.completion_tokens == 1
    for ticket in tickets:
        ticket.cancel()
    running.engine.wake()
    for ticket in tickets:
        with pytest.raises(JobCancelled):
            ticket.result(30)


def test_streams_go_on_while_a_run_trains(running: Running) -> None:
    request = TrainRequest(model=endless.MODEL, name="slow", dataset="d", steps=100_000, max_length=32)
    run = running.engine.submit("run", request, DATASET)
    wait_until(lambda: running.entries["run"], "the run has begun")
    text = running.engine.submit("text", stream(8)).result(60)
    steps = len(running.entries["run"])
    assert text.usage.completion_tokens == 8
    wait_until(lambda: len(running.entries["run"]) > steps, "the run goes on")
    run.cancel()
    running.engine.wake()
    with pytest.raises(JobCancelled):
        run.result(30)


def test_a_prompt_longer_than_a_chunk_does_not_stop_running_streams(running: Running) -> None:
    streaming = running.engine.submit("stream", generate("x", max_tokens=60))
    wait_until(lambda: running.entries["stream"], "the stream runs")
    long = running.engine.submit("long", generate("word " * 320, max_tokens=1))
    wait_until(lambda: long.started is not None, "the long prompt is in")
    before = len(running.entries["stream"])
    long.result(60)
    assert len(running.entries["stream"]) >= before + 3, "a token between two chunks"
    end(running, streaming)


def test_another_threads_request_for_a_model_that_is_not_here_names_those_that_are(running: Running) -> None:
    found: list[BaseException] = []

    def ask() -> None:
        try:
            running.engine.submit("x", GenerateRequest(model="nope", prompt="x"))
        except UnknownModel as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert GENERATE_MODEL in str(found[0])


def test_a_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path) -> None:
    engine = Engine({"gone": (str(tmp_path / "nowhere"),)}, adapters=tmp_path, publish=lambda entries: None)
    with pytest.raises(ModelError, match="nowhere"):
        engine.start()
    engine.stop()


def test_jobs_that_run_when_the_engine_stops_are_given_back(tmp_path: Path, tiny: Path) -> None:
    engine = Engine({endless.MODEL: (str(tiny),)}, adapters=tmp_path, publish=lambda entries: None)
    engine.start()
    ticket = engine.submit("x", stream(4000))
    wait_until(lambda: ticket.started, "it runs")
    engine.stop()
    with pytest.raises(WorkerUnavailable):
        ticket.result(10)
    late = engine.submit("late", stream(1))
    with pytest.raises(WorkerUnavailable):
        late.result(10)


def test_a_defect_in_the_loop_ends_every_job_and_is_reported(tmp_path: Path, tiny: Path) -> None:
    died = threading.Event()
    models = {endless.MODEL: (str(tiny),)}
    engine = Engine(models, adapters=tmp_path, publish=lambda entries: None, on_death=died.set)
    engine.start()

    def broken() -> None:
        raise RuntimeError("no way out")

    for card in engine.cards:
        for kind in card.kinds:
            engine.lane(card.model, kind).drop_stopped = broken  # type: ignore[method-assign]
    ticket = engine.submit("x", stream(1))
    with pytest.raises(WorkerUnavailable):
        ticket.result(30)
    assert died.wait(10)


def test_entries_that_cannot_be_published_end_their_own_job(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = running.publish

    def publish(entries: list[Entry]) -> None:
        if any(job_id == "unpublishable" for job_id, _ in entries):
            raise RuntimeError("this one not")
        whole(entries)

    monkeypatch.setattr(running, "publish", publish)
    before = running.engine.submit("published", stream(30))
    bad = running.engine.submit("unpublishable", stream(4000, n=2))
    last = running.engine.submit("unpublishable", stream(1))
    for ticket in (bad, last):
        with pytest.raises(RuntimeError, match="this one not"):
            ticket.result(15)
    assert before.result(60).usage.completion_tokens == 30
    assert [token.index for token in running.entries["published"]] == list(range(30))
    lane = running.engine.lane(endless.MODEL, "generate")
    wait_until(lambda: not lane.busy, "its rows are free again")


def test_a_pass_is_launched_ahead_only_while_no_other_lane_waits(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, other = running.engine.lane(endless.MODEL, "generate"), running.engine.lane(EMBED_MODEL, "embed")
    whole, seen = lane.run, []

    def run(*, lookahead: bool) -> StepOutput:
        seen.append((lookahead, other.busy))
        return whole(lookahead=lookahead)

    monkeypatch.setattr(lane, "run", run)
    streaming = running.engine.submit("streaming", stream(4000))
    wait_until(lambda: running.entries["streaming"], "it streams")
    running.engine.submit("texts", EmbedRequest(model=EMBED_MODEL, texts=("word " * 100,) * 8)).result(60)
    # What comes now is as it was before the texts.
    end(running, streaming)
    assert set(seen) == {(True, False), (False, True)}


def test_each_step_is_reported_with_its_lane_its_time_and_what_it_made(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[tuple[str, str, float, StepOutput]] = []
    monkeypatch.setattr(running.engine, "observe", lambda *step: reported.append(step))
    running.engine.submit("texts", EmbedRequest(model=EMBED_MODEL, texts=("one", "two"))).result(60)
    wait_until(lambda: any(output.ended for *_, output in reported), "the last step is reported")
    assert {(model, kind) for model, kind, *_ in reported} == {(EMBED_MODEL, "embed")}
    assert sum(output.rows for *_, output in reported) == 2
    assert all(seconds > 0 for _, _, seconds, _ in reported)


def test_work_that_cannot_be_admitted_ends_its_own_job(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = running.engine.lane(endless.MODEL, "generate")
    whole = lane.admit

    def admit(work: Any) -> None:
        if work.ticket.job_id == "inadmissible":
            raise RuntimeError("not in here")
        whole(work)

    monkeypatch.setattr(lane, "admit", admit)
    bad = running.engine.submit("inadmissible", stream(1))
    good = running.engine.submit("admissible", stream(3))
    with pytest.raises(RuntimeError, match="not in here"):
        bad.result(30)
    assert good.result(60).usage.completion_tokens == 3


def test_a_librarys_panic_while_a_job_is_prepared_is_that_jobs_error(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        pass

    def prepare(*_: Any) -> None:
        raise Panic("at index out of bounds")

    monkeypatch.setattr(running.engine.lane(GENERATE_MODEL, "generate"), "prepare", prepare)
    with pytest.raises(JobFailed, match="Panic: at index out of bounds"):
        running.engine.submit("panics", generate("x"))

"""A model is loaded and unloaded while the engine runs jobs of another."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.adapters.store import AdapterStore
from engine.engine import Engine
from engine.errand import Errand
from engine.generation.limits import LaneLimits
from engine.prefixes.memory import SHORTEST_ON_CPU
from engine.ticket import Entry
from stoker.contract import EmbedRequest, GenerateRequest
from stoker.errors import ModelError, UnknownModel, WorkerUnavailable
from tests.conftest import wait_until
from tests.engine import bridged, tiny

GOLDENS = Path(__file__).parent.parent / "goldens"
FIRST, SECOND = GOLDENS / "architectures" / "llama-linear", GOLDENS / "architectures" / "qwen3"
ENCODER = GOLDENS / "architectures" / "bert"


class Published:
    """How many tokens of each job were published."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __call__(self, entries: list[Entry]) -> None:
        for job_id, _ in entries:
            self.counts[job_id] = self.counts.get(job_id, 0) + 1


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def engine(tmp_path: Path, published: Published) -> Iterator[Engine]:
    limits = LaneLimits(lookup=False)  # the streams are to last
    made = Engine({"first": [str(FIRST)]}, adapters=tmp_path / "adapters", publish=published, limits=limits)
    made.start()
    yield made
    made.stop()


def asking(model: str, tokens: int) -> GenerateRequest:
    return GenerateRequest(model=model, prompt_ids=(5, 6, 7), max_tokens=tokens, ignore_eos=True, seed=3)


@pytest.mark.slow
def test_a_model_comes_and_goes_next_to_a_stream_which_gets_the_same_tokens(
    engine: Engine, published: Published
) -> None:
    alone = engine.submit("alone", asking("first", 100)).result(60)
    stream = engine.submit("stream", asking("first", 100))
    wait_until(lambda: published.counts.get("stream", 0) > 3, "the stream runs")
    engine.load("second", [str(SECOND)])
    engine.load("encoder", [str(ENCODER)])
    assert [card.model for card in engine.cards] == ["first", "second", "encoder"]
    once = engine.submit("once", asking("second", 5)).result(60)
    assert len(engine.submit("vectors", EmbedRequest(model="encoder", texts=("x",))).result(60).vectors) == 1
    assert engine.unload("second")
    assert engine.unload("encoder")
    assert stream.result(60).token_ids == alone.token_ids
    engine.load("second", [str(SECOND)])
    assert engine.submit("again", asking("second", 5)).result(60).token_ids == once.token_ids
    assert set(published.counts) == {"alone", "stream", "once", "again"}, "warming up is nobody's stream"


def test_a_decoder_of_mlx_lms_serves_the_engines_thread_though_another_has_read_it(
    engine: Engine, tmp_path: Path
) -> None:
    bridged.write_hub_folder(tmp_path / "gemma3_text", "gemma3_text")
    long = GenerateRequest(
        model="second", prompt_ids=tuple(range(3, 43)), max_tokens=30, ignore_eos=True, temperature=0
    )
    engine.load("second", [str(tmp_path / "gemma3_text")])
    found = engine.submit("job", long).result(60).token_ids
    started = Engine({"second": [str(tmp_path / "gemma3_text")]}, adapters=tmp_path / "a", publish=Published())
    started.start()
    assert started.submit("job", long).result(60).token_ids == found
    started.stop()


def test_what_a_model_took_is_given_back(engine: Engine) -> None:
    engine.submit("before", asking("first", 40)).result(60)
    # What other tests of this process have left in cycles counts for nobody here.
    gc.collect()
    before = engine.memory_bytes
    for _ in range(2):
        engine.load("second", [str(SECOND)])
        engine.submit("job", asking("second", 40)).result(60)
        assert engine.memory_bytes > before + engine.model("second").bytes
        assert engine.unload("second")
        assert engine.memory_bytes <= before + 1000


def test_a_model_with_a_job_is_not_unloaded_and_the_job_goes_on(engine: Engine, published: Published) -> None:
    job = engine.submit("job", asking("first", 100))
    wait_until(lambda: published.counts.get("job", 0) > 3, "the job runs")
    assert not engine.unload("first")
    assert len(job.result(60).token_ids) == 100
    assert engine.unload("first")


def test_a_job_of_a_model_that_has_left_goes_back_and_one_of_an_unknown_model_is_refused(engine: Engine) -> None:
    lane = engine.lane("first", "generate")
    assert engine.unload("first")
    with pytest.raises(WorkerUnavailable, match="unloaded"):
        engine.submit("late", asking("first", 1))
    with pytest.raises(UnknownModel):
        engine.submit("never", asking("nobody", 1))
    engine.load("first", [str(FIRST)])
    assert engine.lane("first", "generate") is not lane
    assert len(engine.submit("again", asking("first", 2)).result(60).token_ids) == 2


def test_a_job_that_was_submitted_when_its_model_left_is_not_lost(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = engine.lane("first", "generate")
    prepare = lane.prepare

    def leave_meanwhile(ticket: Any, request: Any, data: Any) -> Any:
        work = prepare(ticket, request, data)
        assert engine.unload("first")
        return work

    monkeypatch.setattr(lane, "prepare", leave_meanwhile)
    with pytest.raises(WorkerUnavailable, match="unloaded"):
        engine.submit("job", asking("first", 1)).result(15)


def test_a_model_that_cannot_be_loaded_hurts_no_other(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(SECOND, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    before = engine.memory_bytes
    for source in (tmp_path / "damaged", tmp_path / "missing"):
        with pytest.raises(ModelError, match=source.name):
            engine.load("second", [str(source)])
    assert engine.memory_bytes <= before
    assert len(engine.submit("job", asking("first", 3)).result(60).token_ids) == 3


def test_what_a_model_would_take_is_known_from_its_headers(engine: Engine) -> None:
    for name, path in (("second", SECOND), ("encoder", ENCODER)):
        found = engine.prospect(name, [str(path)])
        loaded = engine.load(name, [str(path)])
        (card,) = [each for each in engine.cards if each.model == name]
        assert (found.card.kinds, found.card.context, found.card.dim) == (card.kinds, card.context, card.dim)
        assert found.bytes == pytest.approx(loaded.bytes, rel=0.1)


def test_an_engine_that_has_ended_refuses_to_load_and_to_unload(engine: Engine) -> None:
    engine.stop()
    with pytest.raises(WorkerUnavailable):
        engine.load("second", [str(SECOND)])
    with pytest.raises(WorkerUnavailable):
        engine.unload("first")


def test_an_errand_hands_its_callers_errors_on() -> None:
    errand = Errand(lambda: 1 // 0)
    errand.run()
    with pytest.raises(ZeroDivisionError):
        errand.result()


def test_a_version_whose_files_became_others_is_read_again_once_the_engine_forgets_it(engine: Engine) -> None:
    def tokens(job: str, adapter: str) -> tuple[int, ...]:
        asked = asking("first", 12).model_copy(update={"adapter": adapter})
        return tuple(engine.submit(job, asked).result(60).token_ids)

    model, store = engine.model("first"), engine.store
    store.write("first", "style", tiny.adapter(model, 2, 1), {"job": "before"})
    before = tokens("one", "style@1")
    store.set_aside("first", "style", 1)
    for version in (1, 2):
        store.write("first", "style", tiny.adapter(model, 2, 5), {"job": "now"}, version)
    assert (store.maker("first", "style", 1), tokens("two", "style@1")) == ("now", before)
    engine.forget("first", "style", 1)
    engine.forget("another", "style", 1)
    assert tokens("three", "style@1") == tokens("four", "style@2") != before


def test_a_version_whose_files_another_process_has_replaced_is_read_again_once_they_are_checked(engine: Engine) -> None:
    def tokens(job: str, adapter: str) -> tuple[int, ...]:
        asked = asking("first", 12).model_copy(update={"adapter": adapter})
        engine.check_files("first", "style", 1)
        return tuple(engine.submit(job, asked).result(60).token_ids)

    model, store = engine.model("first"), engine.store
    engine.check_files("another", "style", 1)
    store.write("first", "style", tiny.adapter(model, 2, 1), {"job": "before"})
    before = tokens("one", "style@1")
    assert tokens("two", "style@1") == before
    assert engine.pool("first").loaded == ("style@1",)
    other = AdapterStore(store.folder("first", "style", 1).parents[2])
    other.set_aside("first", "style", 1)
    for version in (1, 2):
        other.write("first", "style", tiny.adapter(model, 2, 5), {"job": "now"}, version)
    assert tokens("three", "style@1") == tokens("four", "style@2") != before


def test_a_prompt_has_no_prefix_of_an_adapter_whose_files_became_others(engine: Engine) -> None:
    prompt = tuple(3 + number % 50 for number in range(2 * SHORTEST_ON_CPU))

    def answer(job: str, adapter: str) -> tuple[tuple[int, ...], int]:
        asked = asking("first", 12).model_copy(update={"adapter": adapter, "prompt": None, "prompt_ids": prompt})
        found = engine.submit(job, asked).result(60)
        return tuple(found.token_ids), found.usage.cached_tokens

    model, store = engine.model("first"), engine.store
    store.write("first", "style", tiny.adapter(model, 2, 1), {"job": "before"})
    for job in ("one", "two"):
        before, cached = answer(job, "style@1")
    assert cached
    store.set_aside("first", "style", 1)
    for version in (1, 2):
        store.write("first", "style", tiny.adapter(model, 2, 5), {"job": "now"}, version)
    engine.forget("first", "style", 1)
    assert answer("three", "style@1") == answer("four", "style@2") == (answer("five", "style@2")[0], 0)
    assert answer("six", "style@1")[0] != before

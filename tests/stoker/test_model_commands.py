"""Asking a worker about its models: which one is meant, what is waited for, and what the answer means."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from stoker.catalogue import asked_of_worker
from stoker.client.commands import LONGEST_LOOK, Waiting, command_of, worker_for
from stoker.client.model_choice import choose_model, is_served
from stoker.contract import ModelCard, Presence
from stoker.contract.control import ModelReport
from stoker.contract.presence import ModelState, describe_state
from stoker.errors import ConfigError, InvalidRequest, JobTimeout, ModelError, UnknownModel, WorkerUnavailable
from stoker.testing import FakeClient


def card(model: str, gone: str = "") -> ModelCard:
    return ModelCard(model=model, architecture="a", kinds=("generate",), context=1, parameters=1, gone=gone)


def worker(name: str, *models: str, offers: tuple[str, ...] = ()) -> Presence:
    return Presence(
        worker=name, host="h", pid=1, device="cpu", started=0, time=0, models=tuple(map(card, models)), adapters={},
        lanes={}, memory_bytes=0, offers=tuple(map(card, offers)),
    )  # fmt: skip


ONE, TWO = worker("one@h/1", "a", "b"), worker("two@h/2", "b")


@pytest.mark.parametrize("named", ["one", "one@h", "one@h/1", None])
def test_the_worker_that_is_named_or_the_only_one_that_holds_the_model_is_meant(named: str | None) -> None:
    assert worker_for(command_of("unload", "a"), named, [ONE, TWO]) == "one@h/1"


def test_a_model_is_loaded_by_the_only_worker_there_is() -> None:
    assert worker_for(command_of("load", "a=/a"), None, [TWO]) == "two@h/2"


@pytest.mark.parametrize(
    ("verb", "model", "named", "alive", "error", "said"),
    [
        ("load", "c=/c", None, [ONE, TWO], InvalidRequest, "name one of one@h/1, two@h/2"),
        ("unload", "b", None, [ONE, TWO], InvalidRequest, "2 may be meant"),
        ("unload", "c", None, [ONE, TWO], UnknownModel, "They hold a, b"),
        ("load", "c=/c", None, [], WorkerUnavailable, "no worker is alive"),
        ("pin", "a", "three", [ONE, TWO], WorkerUnavailable, "'three' given, which is not alive"),
        ("pin", "a", "one", [ONE, worker("one@g/3")], InvalidRequest, "several are called"),
    ],
)
def test_a_worker_that_cannot_be_told_is_one_error(
    verb: str, model: str, named: str | None, alive: list[Presence], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        worker_for(command_of(verb, model), named, alive)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["", "UPPER", "a b", None, 7])
def test_what_is_no_model_is_asked_of_no_worker(model: object) -> None:
    with pytest.raises((ConfigError, InvalidRequest)):
        command_of("load", model)  # type: ignore[arg-type]


def test_a_path_is_asked_for_by_its_whole_form_and_a_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Model").mkdir()
    assert asked_of_worker("My Model") == f"my-model={tmp_path}/My Model"
    assert asked_of_worker("x=./My Model") == f"x={tmp_path}/My Model"
    assert asked_of_worker("hf:org/Name") == "name=hf:org/Name"
    assert asked_of_worker("theirs") == "theirs", "the worker may know it"


def waiting(timeout: float | None = None) -> Waiting:
    return Waiting(command_of("load", "a=/a"), "one@h/1", timeout)


def report(phase: str, **fields: object) -> bytes:
    made = ModelReport(id="x", worker="one@h/1", verb="load", model="a=/a", phase=phase, **fields)  # type: ignore[arg-type]
    return made.model_dump_json().encode()


def test_an_answer_counts_though_its_worker_is_gone_by_now() -> None:
    done = waiting().heard(report("done", made_way=("b",)), alive=False)
    assert done is not None
    assert done.made_way == ("b",)


def test_a_worker_that_goes_away_ends_the_waiting_with_one_error() -> None:
    assert waiting().heard(None, alive=True) is None
    with pytest.raises(WorkerUnavailable, match="went away before it began: load a=/a"):
        waiting().heard(None, alive=False)
    with pytest.raises(WorkerUnavailable, match="went away in the middle of it"):
        waiting().heard(report("begun"), alive=False)


def test_a_command_that_failed_raises_what_it_failed_of() -> None:
    for alive in (True, False):
        with pytest.raises(ModelError, match="no such file"):
            waiting().heard(report("failed", error="ModelError", message="/a: no such file"), alive=alive)


def test_an_answer_of_another_form_is_an_error() -> None:
    with pytest.raises(WorkerUnavailable, match="same release"):
        waiting().heard(b"{}", alive=True)


def test_waiting_has_the_end_that_was_asked_for() -> None:
    assert waiting(0.0).pause() is None
    looks = waiting()
    pauses = [looks.pause() or 0.0 for _ in range(40)]
    assert sorted(pauses) == pauses
    assert (pauses[0] < 0.1, pauses[-1]) == (True, LONGEST_LOOK), "rarer and rarer, and no rarer than that"
    assert isinstance(waiting(0.0).over(taken_back=True), JobTimeout)
    assert "nothing was done" in str(waiting(0.0).over(taken_back=True))
    assert "it goes on" in str(waiting(0.0).over(taken_back=False))


@pytest.mark.parametrize("seconds", ["10", math.nan, [1]])
def test_a_command_whose_time_is_none_is_refused(seconds: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout: .* given; expected seconds"):
        waiting(seconds)


def test_a_command_is_waited_for_to_the_end_of_its_time_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    looks = waiting(10.0)
    over = {}
    for now in (100.0, 109.5, 109.999, 110.0, 111.0):
        clock[0] = now
        over[now] = looks.pause() is None
    assert over == {100.0: False, 109.5: False, 109.999: False, 110.0: True, 111.0: True}


# --- jobs ---


def test_a_job_for_a_model_that_a_worker_may_load_is_accepted() -> None:
    there = [worker("one@h/1", "a", offers=("later",))]
    assert choose_model("later", "generate", {}, there) == "later"
    assert choose_model(None, "generate", {}, there) == "a", "the one that is warm"
    assert choose_model(None, "generate", {}, [worker("one@h/1", offers=("later",))]) == "later"
    assert is_served("later", "generate", there)
    with pytest.raises(UnknownModel):
        choose_model("later", "embed", {}, there)


def test_a_job_for_a_model_that_was_unloaded_is_refused_and_says_why() -> None:
    known = {"a": card("a", gone="it was unloaded.")}
    with pytest.raises(UnknownModel, match=r"'a' given; .*it was unloaded\."):
        choose_model("a", "generate", known, [TWO])
    assert choose_model("a", "generate", known, [ONE]) == "a", "another worker holds it"
    assert choose_model("a", "generate", {"a": card("a")}, [TWO]) == "a", "its worker may be restarting"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (None, "warm"),
        (ModelState(model="a", state="warm", pinned=True), "warm, pinned"),
        (ModelState(model="a", state="warm", shared="layers"), "warm, its layers shared by the ranks"),
        (ModelState(model="a", state="offered"), "loaded when a job waits for it"),
        (ModelState(model="a", state="refused", why="no room"), "refused: no room"),
        (ModelState(model="a", state="loading"), "loading"),
    ],
)
def test_a_state_is_said_in_words(state: ModelState | None, said: str) -> None:
    assert describe_state(state) == said


def test_a_model_is_described_by_what_it_can_and_by_bits_that_are_fewer_than_usual() -> None:
    assert card("a").described == ", ".join(card("a").abilities)
    assert card("a").model_copy(update={"kv_bits": 8}).described.endswith(", keys and values in 8 bits")


# --- the client in memory ---


def test_models_come_and_go_in_memory() -> None:
    client = FakeClient(models={"a": ["generate"]}, may_load={"b": ["embed"]})
    with client:
        client.script.generate("x", times=None)
        assert client.models.load("b").phase == "done"
        assert set(client.models()) == {"a", "b"}
        client.embed(["x"], model="b").result()
        other = client.embed(["y"], model="b")
        waits = client.generate("x", model="a")
        client.models.pin("a")
        with pytest.raises(InvalidRequest, match="pinned"):
            client.models.unload("a")
        client.models.unpin("a")
        client.models.unload("a")
        with pytest.raises(UnknownModel, match="unloaded"):
            waits.result()
        assert len(other.result()) == 1, "a job of another model runs"
        with pytest.raises(UnknownModel, match="unloaded"):
            client.generate("x", model="a")
        with pytest.raises(UnknownModel, match="no worker holds it"):
            client.models.unload("a")
        with pytest.raises(ModelError, match="not there"):
            client.models.load("c=/c")


def test_a_model_whose_job_runs_stays_in_memory_too() -> None:
    client = FakeClient()
    with client:
        client.script.generate("one two three", times=None)
        job = client.generate("x")
        stream = job.stream()
        next(stream)
        with pytest.raises(InvalidRequest, match="in use: 1 job"):
            client.models.unload("smollm2-135m-instruct")
        list(stream)
        client.models.unload("smollm2-135m-instruct")

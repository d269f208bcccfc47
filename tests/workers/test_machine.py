"""What a worker's process takes from its surroundings is given to the engine and the kernels, which read nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoints.inspecting import inspect
from engine.checkpoints.sources import resolve
from engine.platform import blas
from engine.platform.blas import BlasReport
from kernels import backend, registry
from stoker.catalogue import parse_models
from stoker.errors import ConfigError
from stoker.settings import load_settings
from tests.conftest import GENERATE_MODEL
from workers import doctor, machine
from workers.machine import asked_cores, boot_blas


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(backend, "of_machine", lambda: "metal")
    yield
    registry.use("auto")


def _active() -> set[str]:
    return {name for name, kernel in registry.KERNELS.items() if kernel.active}


@pytest.mark.parametrize(("said", "cores"), [("3", 3), ("", None), ("0", None), ("-1", None), ("all", None)])
def test_cores_are_those_that_openblas_is_given(said: str, cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", said)
    assert asked_cores() == cores
    assert machine.limits_of(load_settings()).cores == cores


def test_the_blas_of_the_settings_is_booted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(blas, "boot", lambda threads, **rest: asked.append((threads, rest)))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    boot_blas(load_settings(blas="off", home=tmp_path))
    assert asked == [(2, {"cache": tmp_path / "cache", "library": "off"})]


def test_a_worker_uses_the_kernels_of_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_KERNELS", "lora,sample")
    machine.make_engine(load_settings(), lambda entries: None, lambda: None)
    assert _active() == {"lora", "sample"}
    with pytest.raises(ConfigError, match="there is no kernel lore"):
        machine.make_engine(load_settings(kernels="lore"), lambda entries: None, lambda: None)


def test_the_doctor_reports_the_kernels_of_the_settings() -> None:
    assert doctor.kernels_check("lore").ok is False
    found = doctor.kernels_check("attend")
    assert (found.ok, _active()) == (True, {"attend"})


def test_the_doctor_says_when_a_model_needs_more_memory_than_there_is() -> None:
    path = resolve(parse_models([GENERATE_MODEL])[GENERATE_MODEL])
    assert doctor.memory_check("m", path, "32 bit", 2**40).ok
    found = doctor.memory_check("m", path, "32 bit", 2**20)
    assert not found.ok
    assert "quantize" in found.remedy
    needed = inspect(path).weight_bytes["32 bit"]
    assert [doctor.memory_check("m", path, "32 bit", memory).ok for memory in (needed, needed + 1)] == [False, True]


ARCHITECTURES = Path(__file__).parents[1] / "goldens" / "architectures"
LARGE, OTHER = (f"{ARCHITECTURES / name}" for name in ("llama-linear", "bert"))


@pytest.mark.parametrize(
    ("drafts", "fault"),
    [
        ("large=/nowhere/small", "small cannot draft for large: /nowhere/small: no such file or folder"),
        ("large=hf:nobody/small", "small cannot draft for large: .*nobody/small is not in the local cache"),
        (f"large={OTHER}", "it makes embeddings, and only models that generate draft"),
        (f"large={GENERATE_MODEL}", "token 0 is .*Both need one vocabulary"),
        ("large=small", "small is no model of this worker or of the catalogue"),
        ("large", "write MODEL=DRAFT"),
        ("bert=large", "large cannot draft for bert: bert: large is to draft for it, and it makes embeddings"),
    ],
)
def test_the_doctor_says_why_a_model_cannot_draft(drafts: str, fault: str) -> None:
    settings = load_settings(models=(f"large={LARGE}", OTHER), draft_models=(drafts,))
    (check,) = doctor.draft_checks(settings)
    assert not check.ok
    assert re.search(fault, check.detail)
    assert "correct STOKER_DRAFT_MODELS" in check.remedy


def test_the_doctor_says_what_drafts_and_whether_both_models_fit() -> None:
    settings = load_settings(models=(f"large={LARGE}",), draft_models=(f"large={LARGE}", f"elsewhere={LARGE}"))
    here, elsewhere = doctor.draft_checks(settings)
    assert here.ok
    assert "llama-linear drafts for large" in here.detail
    assert elsewhere.detail == "llama-linear drafts for elsewhere, if this worker is asked to load it"
    both = 2 * inspect(Path(LARGE)).weight_bytes["32 bit"]
    assert [doctor.draft_checks(settings, memory)[0].ok for memory in (both, both + 1)] == [False, True]
    assert doctor.draft_checks(load_settings()) == []


def test_the_doctor_says_what_is_wrong_with_the_models_of_the_settings() -> None:
    settings = load_settings(models=("no-such",))
    (check,) = doctor.model_checks(settings)
    assert (check.ok, check.remedy) == (False, "correct STOKER_MODELS")
    assert "the catalogue has" in check.detail
    assert doctor.draft_checks(settings) == [], "it is said once"


def test_all_that_the_doctor_looks_at_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_MODELS", f"large={LARGE}")
    monkeypatch.setenv("STOKER_DRAFT_MODELS", f"large={OTHER}")
    monkeypatch.setattr(doctor, "boot_blas", lambda settings: BlasReport(False, "", "no OpenBLAS was found"))
    found = [(check.name, check.ok) for check in doctor.checks()]
    assert found == [("mlx", True), ("blas", True), ("kernels", True), ("model", True), ("draft", False)]


def test_the_doctor_downloads_nothing() -> None:
    (check,) = doctor.model_checks(load_settings(models=("far=hf:nobody/far",)))
    assert not check.ok
    assert "nobody/far is not in the local cache, and `stoker models pull hf:nobody/far` downloads it" in check.detail


def test_what_is_set_in_megabytes_is_held_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_KV_CACHE", "17")
    monkeypatch.setenv("STOKER_MODEL_MEMORY", "4096")
    assert machine.limits_of(load_settings()).kv_bytes == 17 * 2**20
    assert machine.model_limit(load_settings()) == 4096 * 2**20


def test_the_doctor_says_when_mlx_does_not_use_the_blas_that_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    report = BlasReport(True, "lib.so", "loaded")
    monkeypatch.setattr(blas, "verify", lambda: False)
    found = doctor.blas_check(report)
    assert not found.ok
    assert "STOKER_BLAS" in found.remedy
    assert doctor.blas_check(BlasReport(False, "", "no OpenBLAS was found")).ok

"""What the first texts would wait for is compiled before a worker is ready."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.adapters.store import AdapterStore
from engine.checkpoints.loading import LoadedModel, load
from engine.embedding import forward
from engine.embedding.forward import PackedForward, PaddedForward
from engine.embedding.lane import EmbedLane
from engine.generation.limits import LaneLimits
from engine.warm import WarmModels

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENS = 128


@pytest.fixture(scope="module")
def bert() -> LoadedModel:
    return load("bert", [str(GOLDENS / "architectures" / "bert")])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of which a graph was made."""
    shapes: list[tuple[int, int]] = []
    pooled = forward.pooled

    def noting(encoder: Any, pooling: str, rows: int, width: int) -> Any:
        shapes.append((rows, width))
        return pooled(encoder, pooling, rows, width)

    monkeypatch.setattr(forward, "pooled", noting)
    return shapes


def test_where_each_shape_is_planned_no_text_needs_a_new_one_behind_the_warming(
    bert: LoadedModel, made: list[tuple[int, int]]
) -> None:
    run = PaddedForward(bert, TOKENS, planned=True)
    slices = len(list(run.warming()))
    assert slices == len(made) == len(set(made))
    random = np.random.default_rng(3)
    for count in (1, 2, 7, 40):
        lengths = random.integers(1, forward.WARM_WIDTH // 8, count)
        run([random.integers(8, 60, length).astype(np.int32) for length in lengths])
    assert len(made) == slices


def test_a_full_batch_is_planned_as_one_with_padding_is(bert: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []

    def compiled(function: Any) -> Any:
        def run(*inputs: Any) -> Any:
            given.append(len(inputs))
            return function(*inputs)

        return run

    monkeypatch.setattr(mx, "compile", compiled)
    text = np.full(8, 9, np.int32)
    for planned, arrays in ((True, 3), (False, 2)):
        PaddedForward(bert, TOKENS, planned=planned)([text])
        assert given[-1] == arrays


def test_elsewhere_the_least_batch_compiles_the_kernels(bert: LoadedModel, made: list[tuple[int, int]]) -> None:
    assert len(list(PaddedForward(bert, TOKENS, planned=False).warming())) == 1
    assert made == [(1, 8)]
    assert list(PackedForward(bert, 1).warming()) == []


def test_an_embedding_model_is_warmed_where_it_is_read_and_in_the_engines_thread(
    bert: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EmbedLane, "warming", lambda _: iter((None, None)))
    warm = WarmModels(AdapterStore(tmp_path), tmp_path, LaneLimits(compiled="none"), 1 << 30, 0.2)
    assert len(list(warm.rehearsing(bert))) == 2
    assert len(list(warm.hold(bert))) == 2


def test_a_model_that_cannot_be_warmed_says_so_and_leaves_the_others_alone(
    bert: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(PackedForward):
        def warming(self) -> Iterator[None]:
            yield
            raise RuntimeError("out of memory")

    with caplog.at_level(logging.ERROR):
        assert len(list(EmbedLane(bert, forward=Failing(bert, 1)).warming())) == 1
    assert "model bert cannot embed: out of memory" in caplog.text

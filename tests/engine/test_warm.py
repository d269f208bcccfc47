"""What an engine does with a model that comes: its lanes' turns, and the process that tried its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import engine as engine_module
from engine import fair
from engine.adapters.store import AdapterStore
from engine.checkpoints import vocabulary
from engine.checkpoints.loading import LoadedModel, load
from engine.checkpoints.vocabulary import check_pair_types
from engine.engine import Engine
from engine.generation.lane import GenerateLane
from engine.generation.limits import LaneLimits
from engine.generation.step import Step
from engine.models.llama import Llama
from engine.warm import WarmModels
from stoker.contract.kinds import KINDS
from stoker.errors import ModelError, TextTooLong
from tests.engine import tiny

GOLDENS = Path(__file__).parents[1] / "goldens"


def test_lanes_whose_jobs_are_streams_are_urgent_and_a_model_that_comes_back_is_not_gone(
    tiny_llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerateLane, "warming", lambda _: iter(()))
    warm = WarmModels(AdapterStore(tmp_path), tmp_path, LaneLimits(compiled="none"), 1 << 30, 0.2)
    added: dict[str, bool] = {}
    plain = warm.share.add

    def add(lane: tuple[str, str], weight: float, *, urgent: bool) -> None:
        added[lane[1]] = urgent
        plain(lane, weight, urgent=urgent)

    monkeypatch.setattr(warm.share, "add", add)
    for model in (tiny.loaded(tiny_llama), load("bert", [str(GOLDENS / "architectures" / "bert")])):
        assert list(warm.hold(model)) == []
        assert model.name not in warm.gone
        assert warm.let_go(model.name)
        assert warm.gone >= {model.name}
        assert list(warm.hold(model)) == []
        assert model.name not in warm.gone
    assert added == {kind: KINDS[kind].urgent for kind in added}
    assert set(added) >= {"generate", "train", "embed"}
    assert set(added.values()) == {True, False}


def test_a_turn_of_a_load_has_one_new_pass_at_most(
    tiny_llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams wait for each."""
    new: list[str] = []

    def noting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            new.append(name)
            return plain(*given)

        return noted

    for name in ("_forward", "_layers"):
        monkeypatch.setattr(Step, name, noting(name, getattr(Step, name)))
    warm = WarmModels(AdapterStore(tmp_path), tmp_path, LaneLimits(compiled="decode"), 1 << 30, 0.2)
    turns = []
    for _ in warm.hold(tiny.loaded(tiny_llama)):
        turns.append(list(new))
        new.clear()
    assert sorted(filter(None, turns)) == [["_forward"], ["_layers"]]


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_training_next_to_a_models_streams_has_the_share_that_the_worker_was_given(
    tiny_llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(fair, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(GenerateLane, "warming", lambda _: iter(()))
    warm = WarmModels(AdapterStore(tmp_path), tmp_path, LaneLimits(compiled="none", stall=1e9), 1 << 30, share)
    assert list(warm.hold(tiny.loaded(tiny_llama))) == []
    used = {("tiny", "generate"): 0.0, ("tiny", "train"): 0.0}
    for _ in range(200):
        lane = warm.share.choose(used)
        assert lane is not None
        with warm.share.charge(lane):
            clock.now += 0.01
        used[lane] += 0.01
    assert used["tiny", "train"] / sum(used.values()) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("sound", [True, False])
def test_the_process_that_tries_tokenizers_ends_with_the_loading_also_where_it_fails(
    tiny_llama: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sound: bool
) -> None:
    ended: list[bool] = []
    engine: Any = Engine({}, adapters=tmp_path, publish=lambda *_: None, limits=LaneLimits(compiled="none"))

    def loading(name: str, sources: object, *_: object, **__: Any) -> LoadedModel:
        if not sound:
            raise ModelError("damaged")
        return tiny.loaded(tiny_llama)

    monkeypatch.setattr(engine_module, "trial", SimpleNamespace(end=lambda: ended.append(True)))
    monkeypatch.setattr(engine_module, "load", loading)
    monkeypatch.setattr(WarmModels, "rehearsing", lambda *_: iter(()))
    monkeypatch.setattr(WarmModels, "hold", lambda *_: iter(()))
    engine.start()
    try:
        assert ended == [True]
        if sound:
            engine.load("tiny", ["tiny"])
        else:
            with pytest.raises(ModelError, match="damaged"):
                engine.load("tiny", ["tiny"])
        assert ended == [True, True]
    finally:
        engine.stop()


@pytest.mark.parametrize(
    ("types", "given", "taken"), [(1, 0, True), (1, 1, False), (2, 1, True), (2, 2, False), (3, 2, False), (9, 1, True)]
)
def test_a_pair_has_no_token_type_that_the_table_or_the_form_of_the_ids_has_not(
    monkeypatch: pytest.MonkeyPatch, types: int, given: int, taken: bool
) -> None:
    monkeypatch.setattr(vocabulary, "encode_pairs", lambda *_: [([5, 6], [0, given])])
    nothing: Any = None
    if taken:
        check_pair_types(Path("m"), nothing, types)
        return
    with pytest.raises(ModelError, match=f"gives a pair the token type {given}; the model has {types}"):
        check_pair_types(Path("m"), nothing, types)


def test_a_query_leaves_a_text_one_token_at_least() -> None:
    pairing = load("judge", [str(GOLDENS / "rerankers" / "qwen3-judge")]).pairing
    assert pairing is not None
    with pytest.raises(TextTooLong) as refused:
        pairing.cut("the worker", "of the engine", None, 1)
    around = int(str(refused.value).split()[1])
    with pytest.raises(TextTooLong, match=f"{around} tokens given .* the model takes {around}, and leaves no room"):
        pairing.cut("the worker", "of the engine", None, around)
    assert len(pairing.cut("the worker", "of the engine", None, around + 1)) == around + 1

"""Checkpoints: half of one is never taken for one, even if a process dies while it makes or deletes one."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from engine.checkpoints.loading import LoadedModel
from engine.training.checkpoint import Checkpoints
from engine.training.optimizer import Moments
from engine.training.state import TrainState
from stoker.errors import ModelError
from stoker.files import durable
from tests import powercut
from tests.engine import tiny
from tests.powercut import Cut

MADE_OF = {"model": "tiny"}


def state(step: int, **fields: float) -> TrainState:
    array = mx.array([float(step)])
    options: dict[str, object] = {"step": step, "micro": step, "reports": step, **fields}
    return TrainState(weights=array, moments=Moments(array + 1, array + 2), **options)  # type: ignore[arg-type]


def newest(cut: Cut, tmp_path: Path) -> int:
    """The step of the newest checkpoint that the next process finds, whole; 0: none."""
    with cut.restored(tmp_path / "after") as after:
        found, anchor = Checkpoints(after / "run/checkpoints", MADE_OF).newest()
        if found is None:
            return 0
        assert found.weights.item() == found.step
        assert found.moments.second.item() == found.step + 2
        assert anchor is not None or found.gradient is not None
        return found.step


def test_a_process_that_dies_while_it_deletes_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the chaos suite: a folder without its notes was read, and ended the run."""
    checkpoints = Checkpoints(tmp_path, {"model": "m"})
    old = tmp_path / "step-00000040"
    old.mkdir()
    (old / "trainer.safetensors").write_bytes(b"x")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            durable.remove_folder(old)
    assert checkpoints.newest() == (None, None)
    durable.remove_folder(old)
    assert list(tmp_path.iterdir()) == [], "nor does a grave stay"


def test_power_that_fails_at_any_moment_leaves_the_last_checkpoint_or_the_new_one(
    model: LoadedModel, tmp_path: Path
) -> None:
    """Regular, best and paused ones, with those that are dropped meanwhile."""
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    mx.eval(weights.matrices)
    disk_folder = tmp_path / "disk"
    disk_folder.mkdir()
    with powercut.recorded(disk_folder) as disk:
        checkpoints = Checkpoints(disk_folder / "run/checkpoints", MADE_OF)
        for step in (1, 2, 3):
            checkpoints.save_best(step, weights)
            checkpoints.save(state(step, best_step=step), weights)
            disk.mark(str(step))
        checkpoints.pause(
            TrainState(**{**vars(state(4, best_step=3)), "gradient": mx.array([1.0])}),
            weights,
        )
        disk.mark("4")
    for cut in disk.cuts():
        promised = int(cut.marks[-1]) if cut.marks else 0
        assert newest(cut, tmp_path) in (promised, min(promised + 1, 4)), cut


def test_the_best_adapter_is_whole_or_not_there_when_the_power_fails(model: LoadedModel, tmp_path: Path) -> None:
    old, new = (tiny.adapter(model, 2, seed, targets=("q_proj",)) for seed in (1, 2))
    folder = tmp_path / "disk"
    folder.mkdir()
    Checkpoints(folder / "c", MADE_OF).save_best(5, old)
    with powercut.recorded(folder) as disk:
        Checkpoints(folder / "c", MADE_OF).save_best(5, new)
    kept = {}
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            path = after / "c/best-00000005"
            if path.is_dir():
                found = Checkpoints(after / "c", MADE_OF).best(5, model.linear_shapes)
                name = "layers.0.self_attn.q_proj"
                which = [bool(mx.array_equal(found.matrices[name]["a"], w.matrices[name]["a"])) for w in (old, new)]
                assert any(which), cut
                kept[cut.before, cut.how] = which[1]
    assert all(kept["", how] for how in powercut.HOW), "in the end the new one is there"


def test_a_checkpoint_that_a_dead_process_wrote_is_on_disk_when_the_next_finds_it(
    model: LoadedModel, tmp_path: Path
) -> None:
    """It may have been killed between the rename and the flush; the run goes on, and the power fails later."""
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    plain, root = durable.flush, tmp_path / "disk"
    root.mkdir()

    def die(path: Path) -> None:
        if path == root and (root / "step-00000001").exists():
            raise KeyboardInterrupt
        plain(path)

    with powercut.recorded(root) as disk:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(durable, "flush", die)
            with pytest.raises(KeyboardInterrupt):
                Checkpoints(root, MADE_OF).save(state(1), weights)
        Checkpoints(root, MADE_OF).save(state(1), weights)
    assert all("step-00000001/stoker.json" in cut.tree for cut in disk.cuts() if cut.finished)


def test_a_state_is_read_as_it_was_written_in_every_field() -> None:
    values: dict[str, object] = {
        **dict.fromkeys(("step", "micro", "targets", "tokens", "reports", "rollbacks", "best_step", "stale"), 0),
        **dict.fromkeys(("loss_sum", "first_loss", "last_loss", "last_rate", "rate_factor", "best_loss"), 0.1),
    }
    values = {name: value + number for number, (name, value) in enumerate(values.items(), 1)}  # type: ignore[operator]
    arrays = [mx.array([float(number)]) for number in range(4)]
    written = TrainState(
        arrays[0],
        Moments(arrays[1], arrays[2]),
        gradient=arrays[3],
        recent=(1.5, 0.1),
        unreported={"loss": 0.1},
        **values,  # type: ignore[arg-type]
    )
    plain = TrainState(arrays[0], written.moments)
    assert all(getattr(written, name) != getattr(plain, name) for name in plain.numbers), "each is another than usual"
    found = TrainState.of(written.arrays, json.loads(json.dumps(written.numbers)))
    assert found == written


def test_of_regular_checkpoints_the_last_two_stay_and_the_best(model: LoadedModel, tmp_path: Path) -> None:
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    checkpoints = Checkpoints(tmp_path, MADE_OF)
    for step in range(1, 6):
        if step < 3:
            checkpoints.save_best(step, weights)
        checkpoints.save(state(step, best_step=min(step, 2)), weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-00000002", "step-00000004", "step-00000005"]


def test_what_was_paused_goes_with_the_next_regular_checkpoint(model: LoadedModel, tmp_path: Path) -> None:
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    checkpoints = Checkpoints(tmp_path, MADE_OF)
    checkpoints.pause(state(1, reports=1, micro=1), weights)
    checkpoints.save(state(2), weights)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(model: LoadedModel, tmp_path: Path) -> None:
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    Checkpoints(tmp_path, {"model": "tiny", "base": "one"}).save(state(2), weights)
    with pytest.raises(ModelError, match="made of another base than this run"):
        Checkpoints(tmp_path, {"model": "tiny", "base": "other"}).newest()


def test_the_newest_is_that_of_most_reports_not_of_the_last_name(model: LoadedModel, tmp_path: Path) -> None:
    """After a rollback the run is at an earlier step than the pause before."""
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    checkpoints = Checkpoints(tmp_path, MADE_OF)
    checkpoints.save(state(4), weights)
    checkpoints.pause(state(3, reports=9), weights)
    checkpoints.pause(state(3, reports=9, micro=12), weights)
    checkpoints.write("step-00000005", state(5), weights)
    found, anchor = Checkpoints(tmp_path, MADE_OF).newest()
    assert found is not None
    assert anchor is not None
    assert (found.reports, found.micro, anchor.step) == (9, 12, 5)


def test_what_is_deleted_is_out_of_sight_on_disk_before_its_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may keep the deletion of a file and lose the rename before it, if nothing was flushed between."""
    (tmp_path / "step-00000001").mkdir()
    flushed: list[str] = []
    plain, delete = durable.flush, shutil.rmtree

    def flush(path: Path) -> None:
        flushed.append("root" if path == tmp_path else "grave")
        plain(path)

    def rmtree(path: Path, **options: Any) -> None:
        assert flushed == ["grave", "root"]
        delete(path, **options)

    monkeypatch.setattr(durable, "flush", flush)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    durable.remove_folder(tmp_path / "step-00000001")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_disk_that_takes_nothing_more_leaves_the_last_checkpoint_and_says_why(
    model: LoadedModel, tmp_path: Path, error: int
) -> None:
    """No matter which call it refuses first. The quick form of the test that trains on a full disk."""
    weights = tiny.adapter(model, 2, 1, targets=("q_proj",))
    mx.eval(weights.matrices)
    Checkpoints(tmp_path, MADE_OF).save(state(1), weights)
    calls = 0
    for raised in powercut.each_refusal(error, lambda: Checkpoints(tmp_path, MADE_OF).save(state(2), weights)):
        calls += 1
        assert raised is None or (isinstance(raised, OSError) and raised.errno == error), raised
        found, _ = Checkpoints(tmp_path, MADE_OF).newest()
        assert found is not None
        assert found.weights.item() == found.step
        if found.step == 2:
            durable.remove_folder(tmp_path / "step-00000002")
    assert calls > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"], "nor any draft"


def test_files_of_others_in_the_folder_of_checkpoints_stay(model: LoadedModel, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, MADE_OF)
    (tmp_path / "README").write_text("mine")
    checkpoints.save(state(1), tiny.adapter(model, 2, 1, targets=("q_proj",)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README", "step-00000001"]

"""Checkpoints: half of one is never taken for one, whoever dies while it is made or deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.training.checkpoint import Checkpoints


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
            checkpoints._drop(old)
    assert checkpoints.newest() == (None, None)
    checkpoints._drop(old)

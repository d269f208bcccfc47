from __future__ import annotations

import os

import pytest

from stoker.settings import Settings
from workers.group.starting import Place, prepare

GRAPHS = "MLX_USE_CUDA_GRAPHS"
NCCL, RING = (Place(0, 2, backend, "127.0.0.1") for backend in ("nccl", "ring"))


@pytest.mark.parametrize(("place", "shard", "found"), [(NCCL, True, "0"), (NCCL, False, None), (RING, True, None)])
def test_ranks_that_share_a_model_over_nccl_launch_without_graphs(
    place: Place, shard: bool, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRAPHS, "to be taken back")
    monkeypatch.delenv(GRAPHS)
    prepare(Settings(group="four", shard=shard), place)
    assert os.environ.get(GRAPHS) == found


def test_what_the_environment_says_of_graphs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRAPHS, "1")
    prepare(Settings(group="four", shard=True), NCCL)
    assert os.environ[GRAPHS] == "1"

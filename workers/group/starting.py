"""Where the ranks of a group are: what `mlx.launch` says of them, or processes of this machine that rank 0 starts."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stoker.errors import ConfigError
from stoker.local.process import LogSize, Process
from stoker.local.stack import rank_command
from stoker.settings import Settings

LOOPBACK = "127.0.0.1"
#: OpenBLAS's variable for the cores that a process uses.
_CORES = "OPENBLAS_NUM_THREADS"
#: MLX's variable for CUDA graphs; it reads it at its first launch.
_GRAPHS = "MLX_USE_CUDA_GRAPHS"


@dataclass(frozen=True)
class Place:
    """This process in its group. `backend`: of `mx.distributed`. `host`: where the others reach rank 0."""

    rank: int
    size: int
    backend: str
    host: str


def place_of(environment: Mapping[str, str]) -> Place:
    """What `mlx.launch` says in its variables. Raises `ConfigError` where it does not."""
    try:
        rank = int(environment["MLX_RANK"])
        if "MLX_HOSTFILE" in environment:
            # Empty for a single host.
            hosts = json.loads(Path(environment["MLX_HOSTFILE"]).read_text("utf-8") or '[["127.0.0.1:0"]]')
            place = Place(rank, len(hosts), "ring", hosts[0][0].rpartition(":")[0])
        elif "MLX_JACCL_COORDINATOR" in environment:
            size = len(json.loads(Path(environment["MLX_IBV_DEVICES"]).read_text("utf-8")))
            place = Place(rank, size, "jaccl", environment["MLX_JACCL_COORDINATOR"].rpartition(":")[0])
        else:
            place = Place(rank, int(environment["MLX_WORLD_SIZE"]), "nccl", environment["NCCL_HOST_IP"])
    except (KeyError, ValueError, OSError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"a group of several hosts is started by `mlx.launch --hostfile hosts.json -- stoker worker --group NAME`, "
            f"whose variables are not here, or wrong ({type(error).__name__}: {error}). For processes of this machine: "
            "stoker worker --group-size 2."
        ) from None
    if not 0 <= place.rank < place.size:
        raise ConfigError(f"MLX_RANK: {place.rank} given; the group has the ranks 0 to {place.size - 1}.")
    return place


def prepare(settings: Settings, place: Place) -> None:
    """Before MLX's first launch: where ranks share a model over NCCL, let it launch without CUDA graphs. Each sum over
    the ranks is captured anew in every graph, which takes longer than the graph saves (`bench.fleet`)."""
    if settings.shard and place.backend == "nccl":
        os.environ.setdefault(_GRAPHS, "0")


class Starting(Protocol):
    """How the other ranks come to be."""

    def starting(self) -> AbstractContextManager[Place]:
        """Inside, MLX of this process and of the others finds the hosts. Raises `ConfigError`."""
        ...

    def stop(self) -> None:
        """End those that were started here."""
        ...


class LocalRanks:
    """The ranks behind the first one, as processes of this machine. None outlives this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._processes: list[Process] = []

    @contextmanager
    def starting(self) -> Iterator[Place]:
        """Inside, MLX of this process and of the others finds the hosts."""
        size = self._settings.ranks
        with tempfile.TemporaryDirectory(prefix="stoker-group-") as folder:
            hosts = Path(folder, "hosts.json")
            hosts.write_text(json.dumps([[f"{LOOPBACK}:{port}"] for port in free_ports(size)]), "utf-8")
            share = str(max(1, (os.cpu_count() or 1) // size))
            common = {"MLX_HOSTFILE": str(hosts), _CORES: os.environ.get(_CORES, share)}
            os.environ |= {**common, "MLX_RANK": "0"}
            self._processes = [self._started(rank, common) for rank in range(1, size)]
            yield Place(0, size, "ring", LOOPBACK)

    def _started(self, rank: int, common: dict[str, str]) -> Process:
        settings = self._settings
        # It has nothing to say to the broker, and need not know how to.
        env = {**settings.environment(), **common, "MLX_RANK": str(rank), "STOKER_URL": "", "PYTHONUNBUFFERED": "1"}
        log = settings.logs / f"rank-{rank}.log"
        return Process(f"rank {rank}", rank_command(), log=log, env=env, grace=1.0, size=LogSize.of(settings))

    def stop(self) -> None:
        for process in self._processes:
            process.ask_to_stop()
        for process in self._processes:
            process.stop()


def place_of_group(settings: Settings) -> tuple[int, Starting] | None:
    """How many ranks the group of these settings has, and how the others come to be; None: it is no group. Raises
    `ConfigError`."""
    if settings.group is not None:
        place = place_of(os.environ)
        prepare(settings, place)
        return None if place.size == 1 else (place.size, LaunchedRanks())
    if settings.shard and settings.ranks == 1:
        raise ConfigError(
            "STOKER_SHARD given, and one rank; the ranks of a group share a model. Give --group-size 2, or --group "
            "under mlx.launch."
        )
    return None if settings.ranks == 1 else (settings.ranks, LocalRanks(settings))


class LaunchedRanks:
    """Ranks that `mlx.launch` has started, and ends."""

    @contextmanager
    def starting(self) -> Iterator[Place]:
        yield place_of(os.environ)

    def stop(self) -> None: ...


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has now."""
    with ExitStack() as leaving:
        sockets = [leaving.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [int(each.getsockname()[1]) for each in sockets]

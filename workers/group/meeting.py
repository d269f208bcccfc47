"""How the ranks of a group meet: over MLX first, whose group says where rank 0 listens and by which secret it knows
the others; then over a socket each, where they compare what has to be alike."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version

import stoker
from engine.platform.probe import device
from engine.training.ranks import MlxRanks
from stoker.errors import ConfigError
from stoker.settings import Settings
from workers.group.plan import VERSION, Hello
from workers.group.starting import LOOPBACK, Place

log = logging.getLogger(__name__)

#: Seconds that the ranks have to meet.
MEET_WITHIN = 60.0
#: What has to be alike: the field, its name for people, and what to do.
_ALIKE = (
    ("stoker", "Stoker", "Install the same version on every host."),
    ("plan", "the plan's version", "Install the same version of Stoker on every host."),
    ("mlx", "MLX", "Install the same version of mlx on every host: `make venv`."),
    ("device", "the device", "Use the same kind of device for every rank."),
    (
        "precision",
        "the precision",
        "Set STOKER_DTYPE, STOKER_QUANTIZE, STOKER_GROUP_SIZE, STOKER_KV_BITS and STOKER_KERNELS alike.",
    ),
    ("shard", "STOKER_SHARD", "Set it alike on every host."),
)


def introduction(settings: Settings, secret: str, rank: int) -> Hello:
    """What this process is, for the others."""
    precision = f"{settings.dtype} {settings.quantize} {settings.group_size} {settings.kv_bits} {settings.kernels}"
    return Hello(
        secret=secret,
        rank=rank,
        host=socket.gethostname(),
        plan=VERSION,
        stoker=stoker.__version__,
        mlx=version("mlx"),
        device="cpu" if device() == "cpu" else "gpu",
        precision=precision,
        shard=settings.shard,
    )


def meet(ranks: MlxRanks, place: Place) -> None:
    """Wait for all ranks. Raises `ConfigError` if MLX cannot make the group; a rank that does not come within
    `MEET_WITHIN` ends the process."""
    log.info("rank %d of %d waits for the others, %.0f s at most", place.rank, place.size, MEET_WITHIN)
    # MLX holds the interpreter while it waits: no thread of ours could end it.
    faulthandler.dump_traceback_later(MEET_WITHIN, exit=True)
    try:
        ranks.meet(place.backend)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the group could not be made: {error}. Rank {place.rank} of {place.size} was to use {place.backend}: look "
            "at the addresses in the file of hosts, and whether their ports are free."
        ) from None
    finally:
        faulthandler.cancel_dump_traceback_later()


def differences(own: Hello, others: Sequence[Hello]) -> Iterator[str]:
    """What is not alike, by name."""
    for other in others:
        for field, name, remedy in _ALIKE:
            given, needed = getattr(other, field), getattr(own, field)
            if given != needed:
                yield f"rank {other.rank} on {other.host}: {name} {given} given; rank 0 has {needed}. {remedy}"
    expected, given_ranks = list(range(1, len(others) + 1)), sorted(other.rank for other in others)
    if given_ranks != expected:
        yield f"ranks: {given_ranks} given; {expected} are needed. Start each rank once."


def missing_models(rank: int, own: dict[str, str], other: dict[str, str]) -> Iterator[str]:
    """The models of rank 0 that another one does not hold, or holds with other weights."""
    for model, digest in own.items():
        if other.get(model) != digest:
            given = f"weights {other[model]}" if model in other else "none"
            yield (
                f"rank {rank}: {given} given of model {model}; rank 0 has weights {digest}. "
                "Give each rank the same files: STOKER_MODELS."
            )


@contextmanager
def listening(host: str) -> Iterator[socket.socket]:
    """A socket at a free port of `host`."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.settimeout(MEET_WITHIN)
        yield server


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and which process it is there."""

    host: str
    port: int
    pid: int
    secret: str

    def connect(self) -> socket.socket:
        """Raises `OSError`."""
        return socket.create_connection((self.host, self.port), timeout=MEET_WITHIN)

    @property
    def written(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, written: str) -> Address:
        return cls(**json.loads(written))

    def kill(self) -> None:
        """End a rank 0 of this machine whose connection is there and which gives no sign of life: it cannot end by
        itself, and nobody starts another for as long as it is there."""
        if self.host == LOOPBACK:
            os.kill(self.pid, signal.SIGKILL)

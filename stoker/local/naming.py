"""The name of a worker in Flower: the same after a restart, so that it keeps its row and its history.

It comes from the machine, STOKER_HOME and the models. STOKER_HOME counts with a number of its own: two machines may
have one name, as new Macs have, and a user of one name on both. Of several such workers on one machine each takes the
first number that is free: a lock says which are taken, and goes with the process that holds it, however that ends.
Within the ledger a worker's process has a name that is new each time (`workers/celery/boot.py`): jobs of one that died
must not be taken for those of its successor.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from hashlib import sha256
from typing import IO

from stoker.catalogue import parse_models
from stoker.errors import ConfigError
from stoker.files.locks import try_lock
from stoker.files.secret import kept_password, opener
from stoker.settings import Settings

#: Workers of the same models that one machine may run for one STOKER_HOME.
MOST = 100


def take_name(settings: Settings) -> tuple[str, IO[str]]:
    """A name that no living worker has, and the lock that keeps it for as long as it is open. Raises `ConfigError`."""
    folder = settings.home / "workers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _names(settings):
            lock = open(folder / f"{name}.lock", "w", encoding="utf-8", opener=opener)  # noqa: SIM115  it stays open
            if try_lock(lock):
                return f"{name}@{platform.node()}", lock
            lock.close()
    except OSError as error:
        raise ConfigError(f"STOKER_HOME: {folder} cannot be written ({error.strerror}).") from None
    raise ConfigError(f"{MOST} workers of these models run on this machine already; name this one with --name.")


def home_id(settings: Settings) -> str:
    """What no other STOKER_HOME of any machine is called: its path, and a number that is drawn when it is first asked
    for. Raises `ConfigError`."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"STOKER_HOME: {settings.home} cannot be made ({error.strerror}).") from None
    return f"{settings.home}|{kept_password(settings.home / 'identity')}"


def _names(settings: Settings) -> Iterator[str]:
    models = sorted(parse_models(settings.models))
    name = f"stoker-{sha256(os.fsencode('|'.join([home_id(settings), *models]))).hexdigest()[:8]}"
    yield name
    yield from (f"{name}-{number}" for number in range(2, MOST + 1))

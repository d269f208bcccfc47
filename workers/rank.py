"""A rank behind the first one: `python -m workers.rank`, with MLX's variables. It knows no broker and no jobs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stoker.catalogue import parse_models
from stoker.errors import StokerError
from stoker.local import boot_errors
from stoker.local.interrupts import end_at_once
from stoker.logs.setup import configure
from stoker.settings import Settings, load_settings
from workers.group.starting import place_of, prepare
from workers.machine import boot_blas, precision_of

if TYPE_CHECKING:
    from engine.checkpoints.loading import LoadedModel
    from engine.models.shard import Shard


def main() -> None:
    end_at_once()
    settings = load_settings()
    configure(settings)
    try:
        _follow(settings)
    except StokerError as error:
        print(boot_errors.line_of(str(error)), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _follow(settings: Settings) -> None:
    place = place_of(os.environ)
    prepare(settings, place)
    boot_blas(settings)
    # Behind it: importing the engine imports MLX.
    from engine.platform.probe import choose_kernels
    from workers.group.follower import Follower

    choose_kernels(settings.kernels)

    def loaded(shard: Shard | None) -> Mapping[str, LoadedModel]:
        # Rank 0 is asked to end too, and lets its jobs be kept first; then this rank hears of it.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        return load_models(settings, shard)

    Follower(settings, place, loaded).run()


def load_models(settings: Settings, shard: Shard | None = None) -> Mapping[str, LoadedModel]:
    """Those of the settings, or this part of them, warm or not: name → model. Raises `ModelError`."""
    from engine.checkpoints.loading import load
    from engine.text import trial

    options = precision_of(settings)
    asked = parse_models(settings.models)
    models = {name: load(name, sources, shard=shard, **options) for name, sources in asked.items()}
    trial.end()
    return models


if __name__ == "__main__":
    main()

"""What the process that computes takes from its surroundings, and the engine made with it: neither the engine nor the
kernels read the environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from stoker.catalogue import drafts_of, parse_models
from stoker.settings import Settings
from workers.group.starting import place_of_group

if TYPE_CHECKING:
    from engine.checkpoints.drafts import DraftSource
    from engine.checkpoints.loading import PrecisionOptions
    from engine.engine import Engine
    from engine.generation.limits import LaneLimits
    from engine.platform.blas import BlasReport
    from engine.ticket import Entry

log = logging.getLogger(__name__)


def boot_blas(settings: Settings) -> BlasReport:
    """Call it before anything imports MLX, which binds to the BLAS that it finds."""
    from engine.platform import blas

    return blas.boot(asked_cores(), cache=settings.home / "cache", library=settings.blas or "")


def asked_cores() -> int | None:
    """The cores that `OPENBLAS_NUM_THREADS`, OpenBLAS's own variable, asks for; None: it says nothing."""
    said = os.environ.get("OPENBLAS_NUM_THREADS", "")
    return int(said) if said.isdigit() and int(said) > 0 else None


def make_engine(settings: Settings, publish: Callable[[list[Entry]], None], on_death: Callable[[], None]) -> Engine:
    """The engine with the models of `settings`, not started; its arguments are those of `Engine`."""
    # BLAS first: importing the engine imports MLX, and MLX binds to the BLAS that it finds.
    from engine.platform import blas

    report = boot_blas(settings)
    place = place_of_group(settings)
    from engine.engine import Engine
    from engine.platform.probe import choose_kernels, describe_kernels, memory
    from engine.prefixes.disk import DiskLimits
    from engine.training.ranks import ALONE
    from workers.group.leader import Leader, leader_of
    from workers.neighbours import neighbours_of

    choose_kernels(settings.kernels)
    log.info("BLAS: %s", report)
    log.info("kernels: %s", describe_kernels())
    if report.active and not blas.verify():
        log.warning("MLX does not use the fast BLAS that was loaded: expect a thirtieth of its speed")
    group = ALONE if place is None else leader_of(settings, *place)
    engine = Engine(
        parse_models(settings.models),
        adapters=settings.adapters,
        runs=settings.runs,
        publish=publish,
        limits=limits_of(settings),
        train_share=settings.train_share,
        adapter_bytes=settings.adapter_memory << 20,
        run_bytes=settings.train_memory << 20 if settings.train_memory else memory() // 8,
        precision=precision_of(settings),
        prefixes=DiskLimits(settings.prefixes, settings.prefix_disk << 20),
        neighbours=neighbours_of(settings, device_here()),
        group=group,
        sharing=group if isinstance(group, Leader) and settings.shard else None,
        drafts=draft_sources(settings),
        on_death=on_death,
    )
    if isinstance(group, Leader):
        group.woken = engine.wake
    return engine


def draft_sources(settings: Settings) -> dict[str, DraftSource]:
    """Model → what drafts for it."""
    from engine.checkpoints.drafts import DraftSource

    drafts = {model: DraftSource(*draft) for model, draft in drafts_of(settings).items()}
    if unknown := sorted(drafts.keys() - parse_models((*settings.models, *settings.on_demand)).keys()):
        log.warning(
            "STOKER_DRAFT_MODELS names %s, which this worker has only if it is asked to load it", ", ".join(unknown)
        )
    return drafts


def precision_of(settings: Settings) -> PrecisionOptions:
    """What weights, keys and values are kept in."""
    return {
        "dtype": settings.dtype,
        "quantize": settings.quantize,
        "group_size": settings.group_size,
        "kv_bits": settings.kv_bits,
    }


def device_here() -> str:
    """What this process computes on: the same for all that share it."""
    from engine.platform.probe import device

    # GPUs of one machine have the same name, and a process that sees one of them does not know which.
    return f"{device()} {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"


def limits_of(settings: Settings) -> LaneLimits:
    """What a batch of generations may take."""
    from engine.generation.limits import LaneLimits
    from engine.platform.probe import memory

    kv_bytes = settings.kv_cache << 20 if settings.kv_cache else memory() // 8
    return LaneLimits(
        slots=settings.generate_slots,
        kv_bytes=kv_bytes,
        stall=settings.stall,
        cores=asked_cores(),
        lookup=settings.lookup,
    )


def model_limit(settings: Settings) -> int:
    """Bytes that the weights of all models may take together when another one comes."""
    from engine.platform.probe import memory

    return settings.model_memory << 20 if settings.model_memory else memory() // 2

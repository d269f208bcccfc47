"""What a lane may use."""

from __future__ import annotations

from dataclasses import dataclass

from engine.generation.step import Compiled


@dataclass(frozen=True)
class LaneLimits:
    """`slots`: rows that decode at once. `kv_bytes`: keys and values of all rows, prompts on their way and prefixes.
    `prefix_share`: of these, what kept prefixes may take. `stall`: seconds that a prompt may hold up running
    streams. `compiled`; `lookup`, whether rows draft whose requests do not say it: None: what is usual on this machine.
    `cores`: a CPU's, for embedding; None: all."""

    slots: int = 16
    kv_bytes: int = 1 << 30
    prefix_share: float = 0.25
    stall: float = 0.25
    compiled: Compiled | None = None
    cores: int | None = None
    lookup: bool | None = None


@dataclass(frozen=True)
class GenerationLoad:
    """How full a lane is, and what it had to do for want of room or of a compiled pass since the engine began.

    `traced`: passes, or parts of them, that were traced to be compiled. `disk_hits`: prompts whose beginning came from
    the disk. `drafted`: tokens that were tried as drafts; `accepted`: those of them that were right. `kv_bits`: of the
    numbers of keys and values.
    """

    kv_bytes: int
    kv_limit: int
    preempted: int
    traced: int
    disk_hits: int
    drafted: int
    accepted: int
    kv_bits: int

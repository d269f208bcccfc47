"""Every fused kernel, by name, and which of them a process uses."""

from __future__ import annotations

from kernels import (
    add_layer_norm,
    add_rms_norm,
    attend,
    attend_stored,
    backend,
    greedy,
    lora,
    lora_add_rms_norm,
    lora_swiglu,
    mean_pool,
    norm_project,
    pack_kv,
    sample,
)
from kernels.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    module.KERNEL.name: module.KERNEL
    for module in (
        sample,
        attend,
        attend_stored,
        lora,
        add_rms_norm,
        add_layer_norm,
        mean_pool,
        greedy,
        lora_add_rms_norm,
        lora_swiglu,
        norm_project,
        pack_kv,
    )
}
NAMES = tuple(KERNELS)


def use(setting: str) -> None:
    """From now on this process uses the kernels that `setting`, a value of STOKER_KERNELS, names. Raises as `parse`."""
    backend.use_only(parse(setting))


def parse(setting: str) -> frozenset[str]:
    """The kernels that a value of STOKER_KERNELS names: `auto` (all of them), `off`, or names with commas between.

    Raises `ValueError` for a name that there is not.
    """
    value = setting.strip().lower()
    if value in ("", "auto"):
        return frozenset(NAMES)
    if value == "off":
        return frozenset()
    names = frozenset(part.strip() for part in value.split(",") if part.strip())
    if unknown := sorted(names - set(NAMES)):
        raise ValueError(
            f"STOKER_KERNELS={setting!r}: there is no kernel {', '.join(unknown)}; it is auto, off, or some of "
            f"{', '.join(NAMES)} with commas between"
        )
    return names

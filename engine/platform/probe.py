"""What MLX runs on here."""

from __future__ import annotations

import os
from importlib.metadata import version

import mlx.core as mx

from kernels import registry
from kernels.backend import of_machine
from kernels.registry import KERNELS
from stoker.errors import ConfigError


def device() -> str:
    """The GPU's name, or `cpu`."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu"
    return str(mx.device_info().get("device_name", "gpu"))


def memory() -> int:
    """Bytes that MLX may use: what the GPU should hold at most, or the machine's memory."""
    if device() == "cpu":
        return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))
    info = mx.device_info()
    return int(info.get("max_recommended_working_set_size") or info.get("memory_size") or 8 << 30)


def describe_device() -> str:
    """For people: version, device, and the memory that the device has."""
    memory = mx.device_info().get("memory_size", 0) if device() != "cpu" else 0
    return f"MLX {version('mlx')} on {device()}" + (f", {int(memory) / 2**30:.0f} GiB" if memory else "")


def choose_kernels(setting: str) -> None:
    """From now on this process uses the fused kernels of `setting`, a value of STOKER_KERNELS. Raises `ConfigError`."""
    try:
        registry.use(setting)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def describe_kernels() -> str:
    """For people: which fused kernels are in use."""
    active = [name for name, kernel in KERNELS.items() if kernel.active]
    off = [name for name in KERNELS if name not in active]
    if not active:
        return f"none in use: {'MLX runs on a CPU' if of_machine() == 'reference' else 'STOKER_KERNELS says so'}"
    return f"{', '.join(active)} in use on {of_machine()}" + (f"; off: {', '.join(off)}" if off else "")

"""What a config.json says of a quantization that is another's than MLX's: AWQ, GPTQ or FP8. No MLX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stoker.contract.shown import as_json
from stoker.errors import ModelError

METHODS = ("awq", "gptq", "fp8")
#: Bits that a method has here.
_BITS = {"awq": (4,), "gptq": (2, 3, 4, 8)}
#: Method -> the field that says how its matrices lie, and what is read.
_LAYOUTS = {"awq": ("version", ("gemm",)), "gptq": ("checkpoint_format", ("gptq", "gptq_v2"))}
_WHERE = "config.json: quantization_config"


#: Either says that a model is quantized: mlx-lm writes both, the second for the hub's sake.
CONFIG_KEYS = ("quantization", "quantization_config")


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says so, in any way."""
    return any(config.get(key) is not None for key in CONFIG_KEYS)


@dataclass(frozen=True)
class Packing:
    """Codes of AWQ or GPTQ. `group`: inputs that share a scale, -1 for all. `less_one`: whether zeros are stored less
    by one than they are meant."""

    method: Literal["awq", "gptq"]
    bits: int
    group: int
    less_one: bool = False

    def __str__(self) -> str:
        return f"{self.bits} bit in groups of {self.group} ({self.method})"


@dataclass(frozen=True)
class Blocks:
    """Numbers of 8 bits, a scale for each block (rows, columns) of a matrix; None: one for a whole matrix."""

    block: tuple[int, int] | None

    def __str__(self) -> str:
        return "8 bit (fp8)" if self.block is None else f"8 bit in blocks of {self.block[0]} × {self.block[1]} (fp8)"


def read(config: Mapping[str, Any]) -> Packing | Blocks | None:
    """None for a dense model, MLX's own layout, or a method that is not read here, which others refuse. Raises
    `ModelError` for what is not supported of one that is."""
    inner = config.get("text_config")
    section = config.get("quantization_config")
    if section is None and isinstance(inner, Mapping):
        section = inner.get("quantization_config")
    if config.get("quantization") is not None or not isinstance(section, Mapping):
        return None
    method = section.get("quant_method")
    if method == "fp8":
        return _blocks(section)
    return _packing(method, section) if method in ("awq", "gptq") else None


def _packing(method: Literal["awq", "gptq"], section: Mapping[str, Any]) -> Packing:
    bits, group = section.get("bits", section.get("w_bit")), section.get("group_size", section.get("q_group_size"))
    if type(bits) is not int or bits not in _BITS[method]:
        raise ModelError(
            f"{_WHERE}: bits = {as_json(bits)} are not supported; of {method} {', '.join(map(str, _BITS[method]))} are"
        )
    if type(group) is not int or (group < 1 and group != -1):
        raise ModelError(f"{_WHERE}: group_size = {as_json(group)}: a whole number of at least 1 is needed, or -1")
    name, allowed = _LAYOUTS[method]
    layout = section.get(name) or allowed[0]
    if not isinstance(layout, str) or layout.lower() not in allowed:
        raise ModelError(f"{_WHERE}: {name} = {as_json(layout)} is not supported; allowed: {', '.join(allowed)}")
    for unread in ("dynamic", "is_marlin_format"):
        if section.get(unread):
            raise ModelError(f"{_WHERE}: {unread} = {as_json(section[unread])} is not supported")
    return Packing(method, bits, group, less_one=layout.lower() == "gptq")


def _blocks(section: Mapping[str, Any]) -> Blocks:
    block = section.get("weight_block_size")
    if block is None:
        return Blocks(None)
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise ModelError(f"{_WHERE}: weight_block_size = {as_json(block)}: two whole numbers of at least 1 are needed")
    return Blocks((block[0], block[1]))

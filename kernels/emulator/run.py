"""Executes a compiled kernel and turns what the runtime saw into errors that quote the body's line."""

from __future__ import annotations

import ctypes
import mmap
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from kernels.emulator.build import Built, build
from kernels.emulator.trace import Launch

#: Metal's limit on every Apple GPU.
THREADGROUP_BYTES = 32768
#: Between buffers lies this much of nothing, so that an index error does not land in a neighbour.
_GAP = 1 << 20


@dataclass(frozen=True)
class Report:
    """One defect. `kind` is RACE, OUT_OF_BOUNDS, UNINITIALISED, UNWRITTEN_OUTPUT, WRITE_TO_INPUT, THREADGROUP_MEMORY,
    BARRIER_DIVERGENCE, SIMD_DIVERGENCE or LAUNCH."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class KernelDefect(AssertionError):
    """The kernel did what no GPU forgives; `reports` says what, and in which line of the body."""

    def __init__(self, name: str, reports: Sequence[Report]):
        super().__init__("\n".join([f"{name}:", *map(str, reports)]))
        self.reports = tuple(reports)

    @property
    def kinds(self) -> set[str]:
        return {report.kind for report in self.reports}


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element", ctypes.c_uint32),
        ("output", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
    )


class _Options(ctypes.Structure):
    _fields_ = (("seed", ctypes.c_uint64), ("checked", ctypes.c_uint32), ("threadgroup_limit", ctypes.c_uint32))


def run(launch: Launch, *, seed: int = 1, checked: bool = True) -> list[mx.array]:
    """The outputs of `launch`, its threads scheduled by `seed`. Raises `KernelDefect`, `CompileError`."""
    if any(total % group for total, group in zip(launch.grid, launch.threadgroup, strict=True)):
        text = f"the grid {launch.grid} is no multiple of the threadgroup {launch.threadgroup}: Metal cuts the last "
        raise KernelDefect(launch.name, [Report("LAUNCH", text + "threadgroup short, CUDA runs threads too many")])
    built = build(launch, checked=checked)
    library = ctypes.CDLL(str(built.library))
    arrays = _arguments(launch)
    placed = _place(arrays)
    outputs = placed[len(placed) - len(launch.outputs) :]
    first = len(placed) - len(outputs)
    table = (_Buffer * len(placed))()
    for i, (array, name) in enumerate(zip(placed, built.buffers, strict=True)):
        initialised = i >= first and launch.init_value is not None
        table[i] = _Buffer(
            array.ctypes.data, array.nbytes, array.itemsize, int(i >= first), int(initialised), 0, name.encode()
        )
    addresses = (ctypes.c_void_p * len(placed))(*[array.ctypes.data for array in placed])
    log = ctypes.create_string_buffer(1 << 16)
    options = _Options(seed, int(checked), THREADGROUP_BYTES)
    entry = ctypes.cast(library.entry, ctypes.c_void_p)
    sizes = [(ctypes.c_int * 3)(*triple) for triple in (launch.grid, launch.threadgroup)]
    library.emulator_run(
        entry, addresses, table, len(placed), *sizes, ctypes.byref(options), log, ctypes.c_size_t(len(log))
    )
    if reports := [_report(line, built) for line in log.value.decode().splitlines()]:
        raise KernelDefect(launch.name, reports)
    return [
        _to_mlx(array.copy().reshape(shape), dtype)
        for array, (shape, dtype) in zip(outputs, launch.outputs, strict=True)
    ]


def _arguments(launch: Launch) -> list[NDArray[np.generic]]:
    """The buffers' contents in the order of MLX's signature; outputs are full of ones, which no test mistakes."""
    arrays: list[NDArray[np.generic]] = []
    for array, (shape, strides, dimensions) in zip(launch.inputs, launch.shape_arguments, strict=True):
        host = _to_numpy(array)
        arrays.append(host)
        if not host.ndim:
            continue
        if shape:
            arrays.append(np.array(host.shape, np.int32))
        if strides:
            arrays.append(np.array([stride // host.itemsize for stride in host.strides], np.int64))
        if dimensions:
            arrays.append(np.array([host.ndim], np.int32))
    for shape_out, dtype in launch.outputs:
        host = _to_numpy(mx.full(shape_out, launch.init_value or 0, dtype))
        if launch.init_value is None:
            host = np.frombuffer(b"\xff" * host.nbytes, host.dtype).reshape(host.shape)
        arrays.append(host)
    return arrays


def _place(arrays: Sequence[NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    """Copies of `arrays`, flat, each alone in a wide stretch of memory."""
    offsets, end = [], _GAP
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _GAP) * _GAP + _GAP
    memory = mmap.mmap(-1, end, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    placed = [np.frombuffer(memory, a.dtype, a.size, offset) for a, offset in zip(arrays, offsets, strict=True)]
    for target, source in zip(placed, arrays, strict=True):
        target[:] = source.reshape(-1)
    return placed


def _to_numpy(array: mx.array) -> NDArray[np.generic]:
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # numpy has no bfloat16
    return np.ascontiguousarray(np.array(raw))


def _to_mlx(array: NDArray[np.generic], dtype: mx.Dtype) -> mx.array:
    result = mx.array(array)
    return result.view(mx.bfloat16) if dtype == mx.bfloat16 else result


def _report(line: str, built: Built) -> Report:
    kind, text, *addresses = line.split("\t")
    return Report(kind, text + _quote(built, addresses))


def _quote(built: Built, addresses: Sequence[str]) -> str:
    """The lines of the body, or of the shared header, that belong to code addresses."""
    codes = [int(address, 16) for address in addresses if address not in ("(nil)", "0")]
    if not codes:
        return ""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        base = next(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(built.library.name))
    # An address is where the access returns to: one byte before it is the access.
    command = ["addr2line", "-i", "-e", str(built.library), *[hex(code - base - 1) for code in codes]]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    quotes = []
    for part, number in re.findall(r"\b(header|body):(\d+)", found):
        lines = built.body if part == "body" else built.header
        if int(number) <= len(lines):
            quotes.append(f"{part}:{number} `{lines[int(number) - 1].strip()}`")
    return "  <- " + " | ".join(dict.fromkeys(quotes)) if quotes else ""

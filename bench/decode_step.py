"""The engine's compiled decode step with fused kernels and without, one after the other in turn."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from bench.shapes import QWEN2_5_0_5B, random_llama
from engine.adapters.stacked import StackedLora
from engine.generation.sampling import Draw, columns
from engine.generation.step import KeyValues, Step
from engine.models.llama import Llama
from engine.models.qwen2 import Qwen2Args
from kernels.registry import NAMES
from stoker.contract import GenerateRequest

#: Steps that are launched one after the other before the last is waited for, as the engine runs a pass ahead.
STEPS, TIMES, CAPACITY = 16, 6, 512
#: Which kernels are in use: all, none, and all but one, which shows what that one is worth.
SETTINGS = {"none": "off", "all": "auto"} | {
    f"all but {name}": ",".join(other for other in NAMES if other != name)
    for name in ("sample", "attend", "add_rms_norm", "rope")
}
ADAPTER_SETTINGS = {"none": "off", "all": "auto", "all but lora": ",".join(name for name in NAMES if name != "lora")}


def measure(
    rows: int, *, adapters: int = 0, args: Qwen2Args = QWEN2_5_0_5B, llama: Llama | None = None
) -> list[dict[str, Any]]:
    """Milliseconds of a step of `rows` rows of 256 to 511 tokens, each with an adapter of rank 16 if there are any."""
    llama = random_llama(args)
    settings = ADAPTER_SETTINGS if adapters else SETTINGS if rows > 1 else dict(list(SETTINGS.items())[:2])
    made = {name: _Loop(llama, rows, adapters, setting) for name, setting in settings.items()}
    samples: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(TIMES + 1):
        for name, loop in made.items():
            took = loop.run()
            if turn:  # the first time compiles
                samples[name].append(took)
    what = f"decode step, {rows} rows" + (f", {adapters} adapters" if adapters else "")
    found = [{"name": what, "kernels": name, "ms": float(np.median(taken))} for name, taken in samples.items()]
    base = found[0]["ms"]
    for row in found:
        row["speedup"] = base / row["ms"]
        print(f"{row['name']:36} kernels: {row['kernels']:20} {row['ms']:8.3f} ms  {row['speedup']:.2f} ×", flush=True)
    return found


class _Loop:
    """Some steps in a row, each fed by the one before, under one value of STOKER_KERNELS."""

    def __init__(self, llama: Llama, rows: int, adapters: int, setting: str) -> None:
        self._setting, self._step = setting, Step(llama, compiled=True)
        self._kv = KeyValues(llama, rows, CAPACITY)
        random = np.random.default_rng(0)
        self._offset = mx.array(random.integers(CAPACITY // 2, CAPACITY, rows), mx.int32)
        self._tokens = mx.array(random.integers(0, llama.args.vocab, rows), mx.int32)
        request = GenerateRequest(model="m", prompt="x", temperature=0.8, top_k=50, top_p=0.95)
        self._columns = columns([Draw(request, float(u)) for u in random.random(rows)], llama.args.vocab)
        self._adapters = _stacked(llama, rows, adapters) if adapters else None
        mx.eval(self._kv.keys, self._kv.values, self._offset, self._tokens)

    def run(self) -> float:
        with _kernels(self._setting):
            start = time.perf_counter()
            tokens = self._tokens
            for _ in range(STEPS):
                chosen = self._step(
                    self._kv,
                    tokens[:, None],
                    self._offset,
                    columns=CAPACITY,
                    sampling=self._columns,
                    adapters=self._adapters,
                )
                tokens = chosen[0]
                mx.async_eval(chosen)  # type: ignore[no-untyped-call]
            mx.eval(tokens)
            return (time.perf_counter() - start) * 1e3 / STEPS


def _stacked(llama: Llama, rows: int, adapters: int, rank: int = 16) -> StackedLora:
    """Random adapters on every linear layer; row i has adapter 1 + i modulo their number."""
    stacks = {}
    for name, (wide, out) in llama.linear_shapes.items():
        real = (mx.arange(adapters + 1) > 0)[:, None, None]
        a = mx.random.normal((adapters + 1, wide, rank), scale=wide**-0.5).astype(llama.dtype)
        b = mx.random.normal((adapters + 1, rank, out), scale=0.01).astype(llama.dtype)
        stacks[name] = {"a": mx.where(real, a, 0), "b": mx.where(real, b, 0)}
    mx.eval(stacks)
    return StackedLora(stacks, mx.array(1 + np.arange(rows) % adapters, mx.uint32))


@contextmanager
def _kernels(setting: str) -> Iterator[None]:
    before = os.environ.get("STOKER_KERNELS")
    os.environ["STOKER_KERNELS"] = setting
    try:
        yield
    finally:
        if before is None:
            del os.environ["STOKER_KERNELS"]
        else:
            os.environ["STOKER_KERNELS"] = before

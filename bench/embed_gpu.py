"""`python -m bench.embed --gpu`: embeddings on a GPU in 16 bits, sentence-transformers in the same process.

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

from bench.report import Record, Row, against, by_turns, row
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


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def rate(count: int, action: Callable[[], Any]) -> float:
    """Of so many texts, a second."""
    return count / timed(action)


def main(out: Path, *, quick: bool) -> int:
    from engine.platform import probe

    record, rounds = Record("embed-gpu", out, device=probe.device()), 5 if quick else 20
    with tempfile.TemporaryDirectory() as home:
        folder = write_checkpoint(Path(home) / "model")
        peer = Against(folder, rounds)
        record.part("warming", peer.warming)
        for name in SETS:
            record.part(name, partial(peer.one_set, name))
        record.part("one text at a time", peer.one_at_a_time)
        record.part("forward alone", peer.forward_alone)
        if not quick:
            record.part("attention", attention_forms)
            record.part("shape tokens", lambda: shape_tokens(folder))
        record.keep(**peer.about)
    print(f"rows in {record.path}")
    return int(record.failed)


def attention_forms(rows: int = 128) -> list[Row]:
    """What a mask costs: one attention of 128 texts of 128 tokens, float16, with none and in three forms."""
    import mlx.core as mx

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

    def sample(form: Callable[[], mx.array]) -> float:
        return 1000 * timed(lambda: mx.eval([form() for _ in range(10)])) / 10

    found = by_turns({name: partial(sample, form) for name, form in forms.items()}, 7)
    return [row(f"attention {rows} × 12 × 128 × 32, {name}", "ms", samples) for name, samples in found.items()]


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


class Against:
    """Both sides in one process: texts in, vectors out; then each one's parts."""

    def __init__(self, folder: Path, rounds: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from engine.embedding.lane import EmbedLane

        self.about = {"torch": torch.__version__, "sentence-transformers": version("sentence-transformers")}
        self._rounds, self._folder = rounds, folder
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def peer(dtype: Any) -> Any:
            return SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype})

        self._half, self._exact = peer(getattr(torch, DTYPE)), peer(torch.float32)
        self._lane = EmbedLane(half_model(folder))

    def warming(self) -> list[Row]:
        """As the engine does before a worker is ready."""
        return [row("every shape is warm", "s", [timed(lambda: [None for _ in self._lane.warming()])])]

    def one_set(self, name: str) -> list[Row]:
        texts = texts_of(SETS[name], seed=2)
        wanted = self._exact.encode(texts, batch_size=64, convert_to_numpy=True)
        sizes = [size for size in BATCHES if size == BATCHES[0] or size // 2 <= len(texts)]
        sides: dict[str, Callable[[], np.ndarray]] = {"Stoker": partial(embed, self._lane, texts)}
        for size in sizes:
            sides[f"batch {size}"] = partial(self._half.encode, texts, batch_size=size)
        first = timed(sides["Stoker"])
        errors = [float(np.abs(np.asarray(run()) - wanted).max()) for run in sides.values()]
        for run in sides.values():
            warm_up(run)
        found = by_turns({side: partial(rate, len(texts), run) for side, run in sides.items()}, self._rounds, warm=0)
        # Against the best of its batches, turn by turn.
        best = [max(turn) for turn in zip(*(found[f"batch {size}"] for size in sizes), strict=True)]
        return [
            row(f"{name}, the first time", "texts/s", [len(texts) / first]),
            *against(name, "texts/s", found["Stoker"], "sentence-transformers", best),
            row(f"{name}: largest difference from float32", "", errors[:1]),
            row(f"{name}: largest difference from float32, sentence-transformers", "", [max(errors[1:])]),
        ]

    def one_at_a_time(self) -> list[Row]:
        texts = texts_of(SETS["mixed"], seed=2)

        def singly() -> float:
            return 100 / timed(lambda: [embed(self._lane, [text]) for text in texts[::10]])

        found = by_turns({"one": singly, "all": lambda: len(texts) / timed(partial(embed, self._lane, texts))}, 3)
        return against("1,000 mixed at once", "texts/s", found["all"], "one at a time through the lane", found["one"])

    def forward_alone(self) -> list[Row]:
        """Tokens in, vectors out, in this thread: what the models cost without tokenizing and queueing."""
        from engine.embedding.forward import PaddedForward
        from engine.embedding.lane import unit

        model = half_model(self._folder)
        forward = PaddedForward(model)
        rows: list[Row] = []
        for name, size in (("mixed", 128), ("128 tokens", 1000), ("100 of 128", 100)):
            arrays = tokens_of(model, name)
            sides = {
                "ours": partial(rate, len(arrays), partial(lambda arrays: unit(forward(arrays)), arrays)),
                "theirs": partial(rate, len(arrays), partial(self._forward, arrays, size)),
            }
            found = by_turns(sides, self._rounds, warm=2)
            rows += against(
                f"{name}, forward alone", "texts/s", found["ours"], "sentence-transformers", found["theirs"]
            )
        return rows

    def _forward(self, arrays: list[np.ndarray], size: int) -> None:
        import torch

        ids = sorted((array.tolist() for array in arrays), key=len, reverse=True)
        for start in range(0, len(ids), size):
            rows = ids[start : start + size]
            width = len(rows[0])
            padded = torch.tensor([row + [0] * (width - len(row)) for row in rows]).to(self._half.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).to(self._half.device)
            with torch.inference_mode():
                self._half({"input_ids": padded, "attention_mask": mask})["sentence_embedding"].float().cpu().numpy()


def half_model(folder: Path) -> Any:
    from engine.checkpoints.loading import load

    return load(MODEL, [str(folder)], dtype=DTYPE)


def tokens_of(model: Any, name: str) -> list[np.ndarray]:
    texts = texts_of(SETS[name], seed=2)
    return [np.array(ids, dtype=np.int32) for ids in model.tokenizer.encode_batch(texts)]


def shape_tokens(folder: Path) -> list[Row]:
    """How large a padded batch should be, and what compiling brings."""
    import mlx.core as mx

    from engine.embedding.forward import PaddedForward

    model, rows = half_model(folder), list[Row]()
    sets = {name: tokens_of(model, name) for name in ("mixed", "128 tokens")}

    def measure(forward: PaddedForward, what: str) -> None:
        for name, arrays in sets.items():
            samples = [1000 * timed(partial(forward, arrays)) for _ in range(7)][2:]
            rows.append(row(f"{name}: forward, {what}", "ms", samples))

    for tokens in (8_192, 16_384, 32_768, 65_536):
        measure(PaddedForward(model, tokens), f"batches of {tokens:,} tokens")
    mx.disable_compile()
    try:
        measure(PaddedForward(model), "not compiled")
    finally:
        mx.enable_compile()
    return rows

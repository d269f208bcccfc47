"""`stoker demo`: the whole of Stoker in about two minutes, on real models, through the public client."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from stoker.cli.options import Url, console, for_output
from stoker.cli.train import follow
from stoker.client import Client
from stoker.contract import Presence
from stoker.errors import UnknownModel
from stoker.settings import load_settings

EMBED_MODEL = "all-minilm-l6-v2"
GENERATE_MODEL = "smollm2-135m-instruct"
ADAPTER = "house-style"
QUERY = "caring for a sick person"
STORY = "Once upon a time, in a small village by the sea,"
QUESTION = "Q: Why is the grass green?\nA:"
STEPS = 24


def demo(url: Url = None) -> None:
    """Embed, stream, train and generate with the new adapter. Starts its own broker and worker, and stops them."""
    began = time.monotonic()
    with demo_worker(url) as (client, worker):
        _report_worker(worker)
        _search(client)
        _stream(client)
        _train(client)
        _compare(client)
        _report_end(client, time.monotonic() - began)


@contextmanager
def demo_worker(url: str | None, *, exact: bool = False) -> Iterator[tuple[Client, Presence]]:
    """A client and a worker with the demo's models: those at `url`, else of a stack of its own, with its own data.
    `exact`: with weights, keys and values as they are, also where the settings say that fewer bits are to do."""
    if url is not None:
        with Client(url) as client:
            yield client, _first_worker(client)
        return
    from stoker.local.stack import Stack

    with tempfile.TemporaryDirectory(prefix="stoker-demo-") as home:
        # Its adapter must not come into the store of a fleet, whose numbers it does not know.
        settings = load_settings(home=Path(home), models=(EMBED_MODEL, GENERATE_MODEL), grace=5.0).alone()
        if exact:
            settings = settings.model_copy(update={"dtype": None, "quantize": None, "kv_bits": 16})
        with Stack(settings, flower=False, own_broker=True) as stack:
            with console().status("starting a broker and a worker, loading two models"):
                worker = stack.wait_until_warm()
            with Client(settings=stack.settings) as client:
                yield client, worker


def _first_worker(client: Client) -> Presence:
    workers = client.workers()
    if not workers:
        raise UnknownModel(f"no worker is alive at {client.settings.address.shown}. Start one with `stoker up`.")
    return workers[0]


def _heading(text: str) -> None:
    console().print(f"\n[bold]{text}[/bold]")


def _report_worker(worker: Presence) -> None:
    _heading("A warm worker")
    for card in worker.models:
        print(
            f"  {card.model}: {card.architecture}, {card.parameters / 1e6:.0f} M parameters, {'/'.join(card.abilities)}"
        )
    print(f"  {worker.worker} on {worker.device}, process {worker.pid}")


def _search(client: Client) -> None:
    import numpy as np

    sentences = resources.files("stoker.data").joinpath("sentences.txt").read_text("utf-8").splitlines()
    _heading(f"1. Embed {len(sentences)} sentences and search them")
    began = time.perf_counter()
    vectors = client.embed(sentences, model=EMBED_MODEL).result()
    seconds = time.perf_counter() - began
    query = client.embed([QUERY], model=EMBED_MODEL).result()[0]
    print(f"  {vectors.shape[0]} × {vectors.shape[1]} {vectors.dtype} in {seconds:.2f} s. Nearest to “{QUERY}”:")
    # The vectors have unit length, so the dot product is the cosine.
    likeness = vectors @ query
    for index in np.argsort(-likeness)[:3]:
        print(f"  {likeness[index]:.3f}  {sentences[index]}")


def _stream(client: Client) -> None:
    _heading("2. Stream a completion, token by token")
    print(f"  {STORY}", end="", flush=True)
    began, count, first = time.perf_counter(), 0, 0.0
    for token in client.generate(STORY, model=GENERATE_MODEL, max_tokens=48).stream():
        first = first or time.perf_counter() - began
        count += 1
        print(for_output(token.text).replace("\n", "\n  "), end="", flush=True)
    seconds = time.perf_counter() - began
    print(f"\n  {count} tokens, the first after {first:.2f} s, then {(count - 1) / (seconds - first):.1f} tokens/s")


def _train(client: Client) -> None:
    _heading(f"3. Train a LoRA adapter on the same warm base ({STEPS} steps)")
    with resources.as_file(resources.files("stoker.data").joinpath("house_style.jsonl")) as dataset:
        job = client.train(
            ADAPTER,
            dataset,
            model=GENERATE_MODEL,
            steps=STEPS,
            rank=8,
            alpha=16,
            batch_size=4,
            learning_rate=2e-3,
            warmup_steps=2,
            max_length=64,
        )
        result = follow(job)
    print(
        f"  {result.adapter}@{result.version}: loss {result.first_loss:.3f} → {result.last_loss:.3f}, "
        f"{result.tokens} tokens in {result.usage.run_seconds:.1f} s"
    )


def _compare(client: Client) -> None:
    _heading("4. The base and the adapter, side by side in one batch, with no reload")
    jobs = {
        "base": client.generate(QUESTION, model=GENERATE_MODEL, max_tokens=32),
        ADAPTER: client.generate(QUESTION, model=GENERATE_MODEL, max_tokens=32, adapter=ADAPTER),
    }
    print("  " + QUESTION.replace("\n", "\n  "))
    for name, job in jobs.items():
        text = for_output(job.result().text).strip().replace("\n", " ")
        print(f"  {name:>11}: {text}")


def _report_end(client: Client, seconds: float) -> None:
    worker = _first_worker(client)
    _heading("What ran where")
    print(
        f"  one process, {worker.worker} on {worker.device}: embedding, generation and training; {seconds:.0f} s in all"
    )
    print(f"  through the broker at {client.settings.address.shown}")
    _heading("How to go on")
    print("  stoker up                                      broker, worker and Flower until Ctrl-C")
    print('  stoker generate "Once upon a time"             from another shell')
    print("  stoker train my-style --dataset my-data.jsonl  your own adapter")

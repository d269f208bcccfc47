"""The whole system against the engine alone: what the queue costs. Both sides in one run, on the demo's models."""

from __future__ import annotations

import tempfile
import time
from importlib import resources
from pathlib import Path

from bench.report import Row, repeat, row, write
from stoker import Client
from stoker.catalogue import CATALOGUE
from stoker.contract import EmbedRequest, GenerateRequest
from stoker.local.stack import Stack
from stoker.settings import load_settings

EMBED, GENERATE = "all-minilm-l6-v2", "smollm2-135m-instruct"
PROMPT = "Once upon a time, in a small village by the sea,"
TOKENS = 48
TIMES = 5


def through_the_queue(texts: list[str]) -> list[Row]:
    with tempfile.TemporaryDirectory() as home:
        settings = load_settings(home=Path(home), grace=5.0)
        with Stack(settings, flower=False, own_broker=True) as stack:
            stack.wait_until_warm()
            with Client(settings=stack.settings) as client:

                def embed() -> float:
                    began = time.perf_counter()
                    client.embed(texts, model=EMBED).result()
                    return len(texts) / (time.perf_counter() - began)

                def one_text() -> float:
                    began = time.perf_counter()
                    client.embed(texts[:1], model=EMBED).result()
                    return 1000 * (time.perf_counter() - began)

                def generate(streams: int) -> float:
                    began = time.perf_counter()
                    jobs = [client.generate(PROMPT, model=GENERATE, max_tokens=TOKENS) for _ in range(streams)]
                    for job in jobs:
                        for _ in job.stream():
                            pass
                    return streams * TOKENS / (time.perf_counter() - began)

                return [
                    row("queue: embed, all sentences in one job", "texts/s", repeat(embed, TIMES)),
                    row("queue: embed, one text, round trip", "ms", repeat(one_text, 20)),
                    row("queue: generate, 1 stream", "tokens/s", repeat(lambda: generate(1), TIMES)),
                    row("queue: generate, 8 streams", "tokens/s", repeat(lambda: generate(8), TIMES)),
                ]


def engine_alone(texts: list[str]) -> list[Row]:
    from engine.platform import blas

    blas.boot()
    from engine.engine import Engine

    with tempfile.TemporaryDirectory() as home:
        models = {name: CATALOGUE[name] for name in (EMBED, GENERATE)}
        engine = Engine(models, adapters=Path(home), publish=lambda entries: None)
        engine.start()

        def embed(count: int) -> float:
            began = time.perf_counter()
            engine.submit("job", EmbedRequest(model=EMBED, texts=tuple(texts[:count]))).result()
            return time.perf_counter() - began

        def generate(streams: int) -> float:
            request = GenerateRequest(model=GENERATE, prompt=PROMPT, max_tokens=TOKENS)
            began = time.perf_counter()
            tickets = [engine.submit(f"job-{number}", request) for number in range(streams)]
            for ticket in tickets:
                ticket.result()
            return streams * TOKENS / (time.perf_counter() - began)

        rows = [
            row("engine: embed, all sentences", "texts/s", repeat(lambda: len(texts) / embed(len(texts)), TIMES)),
            row("engine: embed, one text", "ms", repeat(lambda: 1000 * embed(1), 20)),
            row("engine: generate, 1 stream", "tokens/s", repeat(lambda: generate(1), TIMES)),
            row("engine: generate, 8 streams", "tokens/s", repeat(lambda: generate(8), TIMES)),
        ]
        engine.stop()
        return rows


def main() -> None:
    texts = resources.files("stoker.data").joinpath("sentences.txt").read_text("utf-8").splitlines()
    queue, alone = through_the_queue(texts), engine_alone(texts)
    path = write("whole", [*queue, *alone])
    for ours, base in zip(queue, alone, strict=True):
        print(f"ratio {ours.p50 / base.p50:.2f}  {ours.name}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()

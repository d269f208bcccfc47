"""`stoker embed FILE` on real workers, killed in the middle: every row there, once, and right."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from stoker import AsyncClient, Client
from stoker.errors import JobError
from stoker.files.output import partial_path, state_path
from stoker.local.stack import Stack
from tests.conftest import EMBED_MODEL, GENERATE_MODEL, replace_worker, wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack(renamed_stack: Stack) -> Stack:
    return renamed_stack


#: As many as no other number here divides: a row that is lost or there twice moves all behind it.
SENTENCES = [f"sentence {number}: " + "the stoker feeds the fire " * (number % 5 + 1) for number in range(41)]
#: Long enough that a fast machine, too, has work left when the kill comes.
LONG_SENTENCES = [sentence + "and the fire burns on " * 6 for sentence in SENTENCES]


def write_texts(path: Path, count: int, sentences: list[str] = SENTENCES) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"id": number, "text": sentences[number % 41]}) + "\n")


#: The command line with its rows made safe after each batch: how far it is does not depend on how fast the machine is.
SAFE_AT_ONCE = "from stoker.files import output; output.SAFE_EVERY = 0.0; from stoker.cli import main; main()"


def start(
    stack: Stack, folder: Path, *options: str, command: str = "embed", model: str = EMBED_MODEL
) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", SAFE_AT_ONCE, command, "in.jsonl", "--model", model, *options]
    env = {**os.environ, "STOKER_URL": stack.settings.address.celery}
    return subprocess.Popen(words, cwd=folder, env=env, text=True)


def rows_safe(path: Path) -> int:
    state = state_path(path)
    return json.loads(state.read_text())["done"] if state.exists() else 0


def worker_pid(stack: Stack) -> int:
    with Client(settings=stack.settings) as client:
        (pid,) = [worker.pid for worker in client.workers() if worker.worker == stack.worker_name]
    return pid


def expected(stack: Stack, sentences: list[str] = SENTENCES) -> np.ndarray:
    with Client(settings=stack.settings) as client:
        return client.embed(sentences, model=EMBED_MODEL).result(120)


@pytest.mark.timeout(1200)
@pytest.mark.slow
@pytest.mark.parametrize("count", [200, 5_000])
def test_every_row_is_there_once_after_every_kill(own_embedding_stack: Stack, tmp_path: Path, count: int) -> None:
    write_texts(tmp_path / "in.jsonl", count, LONG_SENTENCES)
    output = tmp_path / "out.npy"
    worker = worker_pid(own_embedding_stack)
    first = start(own_embedding_stack, tmp_path, "-o", output.name, "--batch", "8", "--in-flight", "3")
    wait_until(lambda: rows_safe(output) > count // 10, "a tenth is there", 600)
    first.kill()
    first.wait()
    assert partial_path(output).exists()
    assert not output.exists()
    second = start(own_embedding_stack, tmp_path, "-o", output.name, "--batch", "8", "--in-flight", "3")
    before = rows_safe(output)
    wait_until(lambda: rows_safe(output) > before or second.poll() is not None, "it goes on", 600)
    os.kill(worker, signal.SIGKILL)
    assert second.poll() is None, "the worker dies in the middle"
    replace_worker(own_embedding_stack)
    assert second.wait(900) == 0
    vectors = np.load(output)
    wanted = expected(own_embedding_stack, LONG_SENTENCES)[np.arange(count) % 41]
    assert vectors.shape == wanted.shape
    assert np.abs(vectors - wanted).max() < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["in.jsonl", "out.npy"]


def test_a_file_becomes_codes_and_scales(stack: Stack, tmp_path: Path) -> None:
    write_texts(tmp_path / "in.jsonl", 60)
    done = start(stack, tmp_path, "-o", "out.safetensors", "--dtype", "int8")
    assert done.wait(120) == 0
    tensors = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    wanted = expected(stack)[np.arange(60) % 41]
    error = np.abs(tensors["vectors"] * tensors["scales"][:, None] - wanted)
    assert (error <= tensors["scales"][:, None] * 0.51).all()


def test_every_request_of_a_file_has_one_line_after_a_kill(stack: Stack, client: Client, tmp_path: Path) -> None:
    prompts = ["Once upon a time", "The fire", "In the morning"]
    lines = [{"id": number, "prompt": prompts[number % 3]} for number in range(16)] + [{"id": 16, "prompt": ""}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output, words = tmp_path / "out.jsonl", ("-o", "out.jsonl", "--max-tokens", "4", "--in-flight", "2")
    first = start(stack, tmp_path, *words, command="generate", model=GENERATE_MODEL)
    wait_until(lambda: rows_safe(output) > 3, "some are answered", 60)
    first.kill()
    first.wait()
    before = rows_safe(output)
    assert before < len(lines)
    assert not output.exists()
    assert start(stack, tmp_path, *words, command="generate", model=GENERATE_MODEL).wait(60) == JobError.exit_code
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in found] == list(range(17))
    assert found.pop()["error"]["type"] == "InvalidRequest"
    wanted = [job.result(60).text for job in [client.generate(p, model=GENERATE_MODEL, max_tokens=4) for p in prompts]]
    assert [line["result"]["text"] for line in found] == [wanted[number % 3] for number in range(16)]


def test_many_texts_come_in_order_and_leave_nothing_behind(client: Client) -> None:
    before = len(client.redis.keys("stoker:blob:vectors:*"))
    vectors = np.stack(list(client.embed_many(iter(SENTENCES), model=EMBED_MODEL, batch=10, in_flight=3)))
    whole = client.embed(SENTENCES, model=EMBED_MODEL).result(60)
    assert np.abs(vectors - whole).max() < 1e-5

    async def collect(settings: Any) -> np.ndarray:
        async with AsyncClient(settings=settings) as sender:
            many = sender.embed_many(SENTENCES, model=EMBED_MODEL, batch=40, dtype="float16")
            return np.stack([vector async for vector in many])

    found = asyncio.run(collect(client.settings))
    assert found.dtype == np.float16
    assert np.abs(found - whole).max() < 1e-3
    assert len(client.redis.keys("stoker:blob:vectors:*")) == before + 1, "only that of the job sent by `embed` is kept"


def test_leaving_early_cancels_what_is_under_way(client: Client) -> None:
    endless = (SENTENCES[number % 41] for number in iter(int, 1))
    many = client.embed_many(endless, model=EMBED_MODEL, batch=16, in_flight=2)
    assert len(list(islice(many, 40))) == 40
    many.close()
    wait_until(lambda: not client.jobs(), "nothing runs on")

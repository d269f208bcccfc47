"""Generation: Stoker's engine and mlx-lm in one run, on the same weights.

`python -m bench.generate` on a CPU: SmolLM2-135M in float32, mlx-lm from `.venv-peers` with the same OpenBLAS.
`python -m bench.generate --gpu --out DIR`: random bfloat16 weights of Qwen2.5-0.5B's shape, mlx-lm from this Python.
`--shape NAME` takes random weights of an architecture that runs through mlx-lm's model file, with 16 streams, in
bfloat16 on a GPU and float32 on a CPU; with `--layers N` it has so many. `--tiny` tries the whole with a small model.
Both sides take turns; a row has each side's median and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.bridged import BRIDGED
from bench.report import Record
from engine.platform import blas

ROOT = Path(__file__).parent.parent
NAME = "bench-model"
#: The projections that the adapters change, where a model has them.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
#: For each stream the seconds, from the start, at which its tokens came.
Times = list[list[float]]


@dataclass(frozen=True)
class Sizes:
    """How much is run: a GPU makes in a second what two CPU cores make in a minute."""

    rounds: int
    prompt: int
    single: int
    streams: int
    tokens: int
    adapters: int
    long_prompt: int


GPU = Sizes(rounds=4, prompt=64, single=128, streams=32, tokens=128, adapters=8, long_prompt=1000)
CPU = Sizes(rounds=3, prompt=16, single=16, streams=8, tokens=12, adapters=8, long_prompt=300)
#: Streams of the shapes of `--shape`.
BRIDGED_STREAMS = 16
TINY = Sizes(rounds=2, prompt=16, single=16, streams=4, tokens=12, adapters=2, long_prompt=300)


@dataclass(frozen=True)
class Result:
    """One line of the table: `ratio` is how much better `ours` is than `other`; `least`: what the issue asks for."""

    name: str
    unit: str
    ours: float
    other: float
    ratio: float
    least: float | None
    samples: int
    spread: tuple[float, float]


class Ours:
    """The engine as a worker runs it; what it publishes is timed."""

    def __init__(self, folder: Path, home: Path, sizes: Sizes) -> None:
        from engine.engine import Engine
        from engine.generation.limits import LaneLimits

        self._came: defaultdict[str, list[float]] = defaultdict(list)
        self._random, self._count = np.random.default_rng(1), 0
        # The small model stands for a GPU, where everything is compiled.
        limits = LaneLimits(slots=sizes.streams, kv_bytes=8 << 30, compiled="all" if sizes is TINY else None)
        self.engine = Engine({NAME: (str(folder),)}, adapters=home, publish=self._publish, limits=limits)
        self.engine.start()
        self.vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
        self._make_adapters(home, sizes.adapters)

    def _make_adapters(self, home: Path, count: int) -> None:
        import mlx.core as mx

        from engine.adapters.lora import LoraConfig, LoraWeights
        from engine.adapters.store import AdapterStore

        linears = {name.rpartition(".")[2] for name in self.engine.model(NAME).linear_shapes}
        config = LoraConfig(8, 16.0, tuple(name for name in ATTENTION if name in linears))
        for number in range(count):
            random = np.random.default_rng(number)
            matrices = {}
            for name, (wide, out) in self.engine.model(NAME).linear_shapes.items():
                if name.rpartition(".")[2] in config.targets:
                    sides = {"a": (wide, 8), "b": (8, out)}
                    matrices[name] = {
                        side: mx.array(random.normal(0, 0.02, shape).astype(np.float32))
                        for side, shape in sides.items()
                    }
            AdapterStore(home).write(NAME, f"a{number}", LoraWeights(config, matrices), {})

    def _publish(self, entries: list[Any]) -> None:
        now = time.perf_counter()
        for job, _ in entries:
            self._came[job].append(now)

    def prompt(self, tokens: int) -> list[int]:
        """Another one at each call, so that no prefix is found again."""
        drawn: list[int] = self._random.integers(0, self.vocabulary, tokens).tolist()
        return drawn

    def submit(self, prompt: Sequence[int], tokens: int, **options: Any) -> tuple[str, Any]:
        from stoker.contract import GenerateRequest

        self._count += 1
        job = f"job-{self._count}"
        # Without drafts, as the peer decodes: random tokens come in circles, which drafts would make one step of.
        fixed: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "lookup": False}
        request = GenerateRequest(model=NAME, prompt_ids=tuple(prompt), **fixed, **options)
        return job, self.engine.submit(job, request)

    def came(self, job: str) -> list[float]:
        return self._came[job]

    def run(self, prompts: Sequence[Sequence[int]], tokens: int, each: Callable[[int], Any] = lambda _: {}) -> Times:
        began = time.perf_counter()
        sent = [self.submit(prompt, tokens, **each(index)) for index, prompt in enumerate(prompts)]
        for _, ticket in sent:
            ticket.result(600)
        return [[at - began for at in self._came.pop(job)] for job, _ in sent]

    @property
    def traces(self) -> int:
        from engine.generation.lane import GenerateLane

        lane = self.engine.lane(NAME, "generate")
        assert isinstance(lane, GenerateLane)
        return int(lane.step.traces)


class Peer:
    """mlx-lm in a process of its own."""

    def __init__(self, folder: Path, python: str) -> None:
        self._process = subprocess.Popen(
            # As a module: as a script it would have this folder on its path, whose queue.py hides Python's own.
            [python, "-m", "bench.peer_mlx_lm", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        self.about = self._read()

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> Times:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": list(prompts), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._read()  # type: ignore[no-any-return]

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"mlx-lm's process ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """This one's, with the checkout on the path, and the OpenBLAS that this process has loaded."""
    import os

    report = blas.boot()
    chosen = {"STOKER_BLAS": report.library} if report.active else {}
    # Where this process finds its packages by PYTHONPATH, the child has to as well.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **chosen}


# --- what times say ---


def steady(times: Times) -> float:
    """Tokens a second while every stream runs."""
    first, last = max(line[0] for line in times), min(line[-1] for line in times)
    return sum(first < at <= last for line in times for at in line) / max(last - first, 1e-9)


def whole(times: Times) -> float:
    """Tokens a second from the submission to the end."""
    return sum(map(len, times)) / max(line[-1] for line in times)


def gaps(times: Sequence[float], begin: float, end: float) -> list[float]:
    """Milliseconds between neighbours in [begin, end]."""
    inside = [at for at in times if begin <= at <= end]
    return [1000 * (later - earlier) for earlier, later in itertools.pairwise(inside)]


# --- the measures ---


class Bench:
    def __init__(
        self,
        ours: Ours,
        peer: Peer | None,
        sizes: Sizes,
        folder: Path,
        *,
        redis: bool,
        bridged: bool = False,
        only: Sequence[str] = (),
    ) -> None:
        self._ours, self._peer, self._sizes, self._folder = ours, peer, sizes, folder
        self._bridged = bridged
        self._parts = [self.single, self.many, self.adapters, self.sampled, self.first_token, self.long_prompt]
        if redis:
            self._parts.append(self.through_redis)
        self._parts = [part for part in self._parts if not only or part.__name__ in only]
        self.rows: list[dict[str, Any]] = []

    def run(self, keep: Callable[[list[dict[str, Any]]], None]) -> None:
        """`keep` gets the rows so far after each part: what runs out of time loses nothing before it."""
        for part in self._parts:
            began = time.perf_counter()
            try:
                part()
            except Exception as error:
                traceback.print_exc()
                self.rows.append({"name": part.__name__, "error": f"{type(error).__name__}: {error}"})
            print(f"# {part.__name__}: {time.perf_counter() - began:.1f} s", flush=True)
            keep(self.rows)
        self.rows.append({"name": "traces of the step", "unit": "traces", "ours": self._ours.traces})
        keep(self.rows)

    def _add(
        self, name: str, unit: str, ours: list[float], other: list[float], least: float | None, *, less: bool = False
    ) -> None:
        """`less`: less is better."""
        left, right = float(np.median(ours)), float(np.median(other))
        pairs = [theirs / mine if less else mine / theirs for mine, theirs in zip(ours, other, strict=False)]
        ratio = right / left if less else left / right
        spread = (min(pairs), max(pairs)) if pairs else (ratio, ratio)
        row = Result(name, unit, left, right, ratio, least, len(ours), spread)
        self.rows.append(asdict(row))
        asked = "" if least is None else f"  (at least {least}: {'yes' if ratio >= least else 'NO'})"
        print(f"{name:66} {left:10.2f} {right:10.2f} {unit:9} {ratio:6.2f} ×{asked}", flush=True)

    def _prompts(self, count: int) -> list[list[int]]:
        return [self._ours.prompt(self._sizes.prompt) for _ in range(count)]

    def _turns(self, sides: dict[str, Callable[[], Times]]) -> dict[str, list[Times]]:
        """Each side once to warm up, then all in turn, round after round."""
        found: dict[str, list[Times]] = {name: [] for name in sides}
        for run in sides.values():
            run()
        for _ in range(self._sizes.rounds):
            for name, run in sides.items():
                found[name].append(run())
        return found

    def _against_peer(self, name: str, streams: int, tokens: int, least: float) -> None:
        if self._peer is None:
            raise RuntimeError("no peer: mlx-lm did not start")
        peer = self._peer
        found = self._turns(
            {
                "ours": lambda: self._ours.run(self._prompts(streams), tokens),
                "peer": lambda: peer.run(self._prompts(streams), tokens),
            }
        )
        for what, measure in (("decode", steady), ("prompt and all", whole)):
            self._add(
                f"{name}, {what}: engine, mlx-lm",
                "tokens/s",
                [measure(times) for times in found["ours"]],
                [measure(times) for times in found["peer"]],
                least if what == "decode" else None,
            )

    def single(self) -> None:
        self._against_peer("1 stream", 1, self._sizes.single, 1.0 if self._bridged else 1.1)

    def many(self) -> None:
        self._against_peer(
            f"{self._sizes.streams} streams", self._sizes.streams, self._sizes.tokens, 1.0 if self._bridged else 1.5
        )

    def adapters(self) -> None:
        streams, tokens, count = self._sizes.streams, self._sizes.tokens, self._sizes.adapters

        def run(each: Callable[[int], Any]) -> Callable[[], Times]:
            return lambda: self._ours.run(self._prompts(streams), tokens, each)

        found = self._turns(
            {
                "base": run(lambda _: {}),
                "one": run(lambda _: {"adapter": "a0"}),
                "all": run(lambda index: {"adapter": f"a{index % count}"}),
            }
        )
        rates = {name: [steady(times) for times in runs] for name, runs in found.items()}
        name = f"{streams} streams over {count} adapters"
        self._add(f"{name}, over one adapter", "tokens/s", rates["all"], rates["one"], 0.95)
        self._add(f"{name}, over the bare base", "tokens/s", rates["all"], rates["base"], 0.85)

    def sampled(self) -> None:
        """What sampling costs: temperature, top-k and top-p in every row, against greedy."""
        streams, tokens = self._sizes.streams, self._sizes.tokens

        def run(**options: Any) -> Callable[[], Times]:
            return lambda: self._ours.run(self._prompts(streams), tokens, lambda index: {"seed": index, **options})

        found = self._turns(
            {
                "greedy": run(),
                "temperature": run(temperature=0.8),
                "top": run(temperature=0.8, top_k=50, top_p=0.95),
                "nucleus": run(temperature=0.8, top_p=0.95),
            }
        )
        rates = {name: [steady(times) for times in runs] for name, runs in found.items()}
        for name, what in {"temperature": "temperature", "top": "top-k 50 and top-p", "nucleus": "top-p alone"}.items():
            self._add(f"{streams} streams with {what}, greedy", "tokens/s", rates[name], rates["greedy"], None)

    def first_token(self) -> None:
        """A new request's first token, alone and while all slots except one are busy."""
        rounds = 2 * self._sizes.rounds
        for _ in range(2):
            self._first()
        alone = [self._first() for _ in range(rounds)]
        running = self._keep_running(self._sizes.streams - 1)
        try:
            for _ in range(2):
                self._first()
            busy = [self._first() for _ in range(rounds)]
        finally:
            self._stop(running)
        name = f"first token of a new request while {self._sizes.streams - 1} run, alone"
        self._add(name, "ms", busy, alone, 0.5, less=True)

    def long_prompt(self) -> None:
        """Milliseconds between a stream's tokens while a long prompt is prefilled, and without."""
        running = self._keep_running(max(1, self._sizes.streams // 4))
        busy: list[float] = []
        without: list[float] = []
        first: list[float] = []
        # On a GPU the first rounds compile each size of chunk that is tried.
        cold, rounds = (4, 12) if self._sizes is GPU else (1, self._sizes.rounds)
        try:
            for index in range(cold + rounds):
                calm = time.perf_counter()
                time.sleep(0.5 if self._sizes is GPU else 3.0)
                began = time.perf_counter()
                job, ticket = self._ours.submit(self._ours.prompt(self._sizes.long_prompt), 1)
                ticket.result(600)
                ended = self._ours.came(job)[0]
                if index >= cold:
                    first.append(1000 * (ended - began))
                    for stream, _ in running:
                        without += gaps(self._ours.came(stream), calm, began)
                        slack = max(without) / 1000
                        busy += gaps(self._ours.came(stream), began - slack, ended + slack)
        finally:
            self._stop(running)
        if not busy or not without:
            raise RuntimeError("too few tokens came")
        name = f"p99 between tokens while {self._sizes.long_prompt} tokens are prefilled, without"
        self._add(name, "ms", [float(np.percentile(busy, 99))], [float(np.percentile(without, 99))], 0.5, less=True)
        name = name.replace("p99", "p50")
        self._add(name, "ms", [float(np.median(busy))], [float(np.median(without))], None, less=True)
        alone = [self._first_of(self._sizes.long_prompt) for _ in range(rounds)]
        name = f"first token of {self._sizes.long_prompt} tokens next to streams, alone"
        self._add(name, "ms", first, alone, None, less=True)

    def through_redis(self) -> None:
        """Eight streams of a client through broker and worker, against the engine of this process alone."""
        from stoker import Client
        from stoker.local.stack import Stack
        from stoker.settings import load_settings

        streams, tokens = 8, 2 * self._sizes.tokens
        settings = load_settings(home=self._folder.parent / "home", models=(f"{NAME}={self._folder}",), grace=5.0)
        with Stack(settings, flower=False, own_broker=True) as stack:
            stack.wait_until_warm()
            with Client(settings=stack.settings) as client:

                def queued() -> Times:
                    began = time.perf_counter()
                    jobs = [
                        client.generate(prompt, model=NAME, max_tokens=tokens, ignore_eos=True, lookup=False)
                        for prompt in self._prompts(streams)
                    ]
                    return [[time.perf_counter() - began for _ in job.stream()] for job in jobs]

                found = self._turns({"queue": queued, "engine": lambda: self._ours.run(self._prompts(streams), tokens)})
        rates = {name: [whole(times) for times in runs] for name, runs in found.items()}
        self._add(
            f"{streams} streams through Redis, the engine alone", "tokens/s", rates["queue"], rates["engine"], 0.97
        )

    def _first(self) -> float:
        return self._first_of(2 * self._sizes.prompt)

    def _first_of(self, tokens: int) -> float:
        """Milliseconds until the first token of another prompt."""
        began = time.perf_counter()
        job, ticket = self._ours.submit(self._ours.prompt(tokens), 1)
        ticket.result(600)
        return 1000 * (self._ours.came(job)[0] - began)

    def _keep_running(self, count: int) -> list[tuple[str, Any]]:
        running = [self._ours.submit(prompt, 8000) for prompt in self._prompts(count)]
        while not all(len(self._ours.came(job)) > 1 for job, _ in running):
            time.sleep(0.01)
        return running

    def _stop(self, running: list[tuple[str, Any]]) -> None:
        for _, ticket in running:
            ticket.cancel()
        self._ours.engine.wake()
        for _, ticket in running:
            try:
                ticket.result(60)
            except Exception as error:
                if type(error).__name__ != "JobCancelled":
                    raise


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.generate", description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="Qwen2.5-0.5B's shape in bfloat16, mlx-lm from this Python")
    parser.add_argument("--tiny", action="store_true", help="a small model: to try the benchmark itself")
    parser.add_argument("--shape", choices=tuple(BRIDGED), help="an architecture that runs through mlx-lm's model file")
    parser.add_argument("--layers", type=int, help="of the shape, so many: where all would take too long")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for generate.json")
    parser.add_argument("parts", nargs="*", help="those measures alone (single, many, …), and no file")
    options = parser.parse_args()
    report = blas.boot()
    import mlx.core as mx

    from bench.checkpoint import QWEN, SMALL, write_bridged, write_random, write_smollm2

    sizes = TINY if options.tiny else GPU if options.gpu else CPU
    name = f"generate{'-gpu' if options.gpu else '-tiny' if options.tiny else ''}"
    if options.shape:
        # More rounds than of the other rows: what launches take varies by a third on a shared host.
        rounds = 3 * sizes.rounds if options.gpu else sizes.rounds
        sizes, name = replace(sizes, streams=BRIDGED_STREAMS, rounds=rounds), f"{name}-{options.shape}"
    record = Record(name, options.out, sizes=asdict(sizes), layers=options.layers)

    def keep(rows: list[dict[str, Any]]) -> None:
        if not options.parts:
            record.keep(device=ours.engine.device, rows=rows)

    python = sys.executable if options.gpu else str(ROOT / ".venv-peers" / "bin" / "python")
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / NAME
        if options.shape:
            shape = {**BRIDGED[options.shape], **({"num_hidden_layers": options.layers} if options.layers else {})}
            write_bridged(folder, shape, mx.bfloat16 if options.gpu else mx.float32)
        elif options.gpu or options.tiny:
            write_random(folder, SMALL if options.tiny else QWEN)
        else:
            write_smollm2(folder)
        mx.clear_cache()
        ours = Ours(folder, Path(home) / "adapters", sizes)
        peer, about = None, ""
        try:
            peer = Peer(folder, python)
            about = peer.about
        except Exception as error:
            traceback.print_exc()
            about = f"no peer: {error}"
        redis = not options.gpu and not options.shape
        bench = Bench(ours, peer, sizes, folder, redis=redis, bridged=bool(options.shape), only=options.parts)
        print(f"{ours.engine.device}, BLAS {report.detail}; mlx-lm: {about}\n", flush=True)
        print(f"{'':66} {'ours':>10} {'other':>10}")
        bench.run(keep)
        if peer is not None:
            peer.close()
        ours.engine.stop()
    if not options.parts:
        print(f"rows in {record.path}")


if __name__ == "__main__":
    main()

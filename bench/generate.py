"""Generation: Stoker's engine and mlx-lm in one run, on the same weights.

`python -m bench.generate` on a CPU: SmolLM2-135M in float32, mlx-lm from `.venv-peers` with the same OpenBLAS.
`python -m bench.generate --gpu`: random bfloat16 weights of Qwen2.5-0.5B's shape, mlx-lm from this Python.
`--shape NAME` takes random weights of an architecture that runs through mlx-lm's model file, with 16 streams, in
bfloat16 on a GPU and float32 on a CPU; with `--layers N` it has so many. `--tiny` tries the whole with a small model.
Both sides take turns, and a ratio is the median over their turns.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.bridged import BRIDGED
from bench.report import Record, Row, against, by_turns, parser, ratio, row
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
    #: Rounds of the quick form.
    quick: int
    prompt: int
    single: int
    streams: int
    tokens: int
    adapters: int
    long_prompt: int
    #: Long prompts of a round, seconds before them that they are compared with, and rounds that do not count.
    long_prompts: int
    calm: float
    cold: int
    compiled: Literal["all"] | None = None


GPU = Sizes(
    rounds=20, quick=6, prompt=64, single=128, streams=32, tokens=128, adapters=8,
    long_prompt=1000, long_prompts=4, calm=0.5, cold=3,
)  # fmt: skip
CPU = Sizes(
    rounds=5, quick=2, prompt=16, single=16, streams=8, tokens=12, adapters=8,
    long_prompt=300, long_prompts=1, calm=3.0, cold=1,
)  # fmt: skip
#: Streams of the shapes of `--shape`.
BRIDGED_STREAMS = 16
#: The small model stands for a GPU, where everything is compiled.
TINY = replace(CPU, rounds=2, streams=4, adapters=2, calm=0.5, compiled="all")


class Ours:
    """The engine as a worker runs it; what it publishes is timed."""

    def __init__(self, folder: Path, home: Path, sizes: Sizes) -> None:
        from engine.engine import Engine
        from engine.generation.limits import LaneLimits

        self._came: defaultdict[str, list[float]] = defaultdict(list)
        self._random, self._count = np.random.default_rng(1), 0
        limits = LaneLimits(slots=sizes.streams, kv_bytes=8 << 30, compiled=sizes.compiled)
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
    """The parts, each of which makes rows. `launches`: of a decode step, by its rows, where they are known."""

    def __init__(self, ours: Ours, peer: Peer | None, sizes: Sizes, folder: Path, launches: Mapping[int, int]) -> None:
        self._ours, self._peer, self._sizes, self._folder, self._launches = ours, peer, sizes, folder, launches

    def _prompts(self, count: int) -> list[list[int]]:
        return [self._ours.prompt(self._sizes.prompt) for _ in range(count)]

    def _turns(self, sides: Mapping[str, Callable[[], Times]]) -> dict[str, list[Times]]:
        return by_turns(sides, self._sizes.rounds)

    def _against_peer(self, streams: int, tokens: int) -> list[Row]:
        if self._peer is None:
            raise RuntimeError("no peer: mlx-lm did not start")
        peer, name = self._peer, f"{streams} stream{'s' if streams > 1 else ''}"
        found = self._turns(
            {
                "ours": lambda: self._ours.run(self._prompts(streams), tokens),
                "peer": lambda: peer.run(self._prompts(streams), tokens),
            }
        )
        rows: list[Row] = []
        for what, measure in (("decode", steady), ("prompts and all", whole)):
            rates = [[measure(times) for times in found[side]] for side in ("ours", "peer")]
            rows += against(f"{name}, {what}", "tokens/s", rates[0], "mlx-lm", rates[1])
        return [replace(rows[0], launches=self._launches.get(streams)), *rows[1:]]

    def single(self) -> list[Row]:
        return self._against_peer(1, self._sizes.single)

    def many(self) -> list[Row]:
        return self._against_peer(self._sizes.streams, self._sizes.tokens)

    def adapters(self) -> list[Row]:
        streams, tokens, count = self._sizes.streams, self._sizes.tokens, self._sizes.adapters

        def run(each: Callable[[int], Any]) -> Callable[[], Times]:
            return lambda: self._ours.run(self._prompts(streams), tokens, each)

        found = self._turns(
            {
                "the bare base": run(lambda _: {}),
                "one adapter": run(lambda _: {"adapter": "a0"}),
                "all": run(lambda index: {"adapter": f"a{index % count}"}),
            }
        )
        return self._rates(found, {"all": f"over {count} adapters"}, ("one adapter", "the bare base"))

    def sampled(self) -> list[Row]:
        """What sampling costs: temperature, top-k and top-p in every row, against greedy."""
        streams, tokens = self._sizes.streams, self._sizes.tokens

        def run(**options: Any) -> Callable[[], Times]:
            return lambda: self._ours.run(self._prompts(streams), tokens, lambda index: {"seed": index, **options})

        found = self._turns(
            {
                "greedy": run(),
                "temperature": run(temperature=0.8),
                "top-k 50 and top-p": run(temperature=0.8, top_k=50, top_p=0.95),
                "top-p alone": run(temperature=0.8, top_p=0.95),
            }
        )
        return self._rates(found, {side: f"with {side}" for side in found if side != "greedy"}, ("greedy",))

    def _rates(self, found: Mapping[str, list[Times]], names: Mapping[str, str], bases: Sequence[str]) -> list[Row]:
        """Tokens a second of all sides, and those that are named as multiples of the bases."""
        rates = {side: [steady(times) for times in runs] for side, runs in found.items()}
        shown = {side: f"{self._sizes.streams} streams {names.get(side, f'of {side}')}" for side in found}
        return [
            *(row(shown[side], "tokens/s", samples) for side, samples in rates.items()),
            *(ratio(f"{shown[side]}, against {base}", rates[side], rates[base]) for side in names for base in bases),
        ]

    def first_token(self) -> list[Row]:
        """A new request's first token, alone and while all slots except one are busy."""
        count = self._sizes.streams - 1
        found = by_turns({"alone": self._first, "busy": lambda: self._next_to(count, self._first)}, self._sizes.rounds)
        return against(f"first token while {count} streams run", "ms", found["busy"], "alone", found["alone"])

    def long_prompt(self) -> list[Row]:
        """Milliseconds between a stream's tokens while long prompts are prefilled, and without."""
        tokens = f"{self._sizes.long_prompt:,} tokens"
        running = self._keep_running(max(1, self._sizes.streams // 4))
        calm: list[list[float]] = []
        busy: list[list[float]] = []
        first: list[float] = []
        try:
            for number in range(self._sizes.cold + self._sizes.rounds):
                found = self._prompts_next_to(running)
                # The first rounds compile each size of chunk that is tried.
                if number >= self._sizes.cold:
                    calm.append(found[0])
                    busy.append(found[1])
                    first.append(found[2])
        finally:
            self._stop(running)
        if not all(calm) or not all(busy):
            raise RuntimeError("too few tokens came")
        rows = [row(f"first token of {tokens} next to streams", "ms", first)]
        for what, part in (("p50", 50), ("p99", 99), ("longest time", 100)):
            sides = [[float(np.percentile(each, part)) for each in found] for found in (busy, calm)]
            rows += against(f"{what} between tokens while {tokens} are prefilled", "ms", sides[0], "none", sides[1])
        return rows

    def _prompts_next_to(self, running: Sequence[tuple[str, Any]]) -> tuple[list[float], list[float], float]:
        """Gaps between the tokens of these streams before and while prompts are prefilled one after the other, and
        milliseconds to a first token, at the median."""
        calm = time.perf_counter()
        time.sleep(self._sizes.calm)
        began, first = time.perf_counter(), []
        for _ in range(self._sizes.long_prompts):
            first.append(self._first_of(self._sizes.long_prompt))
        ended = time.perf_counter()
        times = [self._ours.came(stream) for stream, _ in running]
        without = [gap for each in times for gap in gaps(each, calm, began)]
        slack = max(without, default=0.0) / 1000
        return (
            without,
            [gap for each in times for gap in gaps(each, began - slack, ended + slack)],
            float(np.median(first)),
        )

    def through_redis(self) -> list[Row]:
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
        name = f"{streams} streams through Redis"
        return against(name, "tokens/s", rates["queue"], "the engine alone", rates["engine"])

    def traces(self) -> list[Row]:
        return [row("traces of the step", "traces", [self._ours.traces])]

    def _next_to(self, count: int, measure: Callable[[], float]) -> float:
        running = self._keep_running(count)
        try:
            return measure()
        finally:
            self._stop(running)

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


def main() -> int:
    options = _options()
    report = blas.boot()
    import mlx.core as mx

    from bench.checkpoint import QWEN, SMALL, write_bridged, write_random, write_smollm2
    from bench.launches import of_a_step
    from engine.platform.probe import device

    sizes = TINY if options.tiny else GPU if options.gpu else CPU
    name = f"generate{'-gpu' if options.gpu else '-tiny' if options.tiny else ''}"
    if options.shape:
        sizes, name = replace(sizes, streams=BRIDGED_STREAMS), f"{name}-{options.shape}"
    if options.quick:
        sizes = replace(sizes, rounds=sizes.quick)
    # Counted before the engine runs: for the count, operations of this process are those of a GPU.
    launches = {rows: of_a_step(rows).total() for rows in (1, sizes.streams)} if sizes is GPU else {}
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
        head = {"device": device(), "blas": report.detail, "mlx-lm": about, "sizes": asdict(sizes)}
        print(f"{device()}, BLAS {report.detail}; mlx-lm: {about}\n", flush=True)
        record = Record(name, options.out, **head, layers=options.layers)
        bench = Bench(ours, peer, sizes, folder, launches)
        parts = [bench.single, bench.many, bench.adapters, bench.sampled, bench.first_token, bench.long_prompt]
        parts += [] if options.gpu or options.shape else [bench.through_redis]
        for part in [*parts, bench.traces]:
            if not options.parts or part.__name__ in options.parts:
                record.part(part.__name__, part)
        if peer is not None:
            peer.close()
        ours.engine.stop()
    print(f"rows in {record.path}")
    return int(record.failed)


def _options() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--gpu", action="store_true", help="Qwen2.5-0.5B's shape in bfloat16, mlx-lm from this Python")
    made.add_argument("--tiny", action="store_true", help="a small model: to try the benchmark itself")
    made.add_argument("--shape", choices=tuple(BRIDGED), help="an architecture that runs through mlx-lm's model file")
    made.add_argument("--layers", type=int, help="of the shape, so many: where all would take too long")
    made.add_argument("--part", action="append", dest="parts", help="that measure alone (single, many, …)")
    return made.parse_args()


if __name__ == "__main__":
    sys.exit(main())

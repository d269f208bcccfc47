"""What Stoker's page shows, put together from what was seen: pure functions, and frozen data that becomes JSON."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stoker.adapters import facts
from stoker.broker import letters as dead_letters
from stoker.broker.ledger import PRIORITIES
from stoker.broker.registry import AdapterEntry
from stoker.contract import Presence
from stoker.contract.kinds import KINDS
from stoker.contract.presence import describe_prefix, describe_state, node_of
from stoker.monitor.mirror import Mirror, MirroredJob

#: Waiting jobs that are listed one by one, and clients whose shares are.
LISTED = 100
CLIENTS = 8
#: Seconds of waiting at which the next group begins.
AGES = (10.0, 60.0, 600.0)


@dataclass(frozen=True)
class Share:
    client: str
    waiting: int
    running: int


@dataclass(frozen=True)
class Queue:
    """`oldest`: seconds that the oldest waiting job has waited. `by_priority`: jobs that wait, for each priority;
    `by_age`: those that wait for less than each of `AGES`, and longer."""

    name: str
    model: str
    kind: str
    waiting: int
    running: int
    oldest: float
    by_priority: tuple[int, ...]
    by_age: tuple[int, ...]
    clients: tuple[Share, ...]


@dataclass(frozen=True)
class LaneRow:
    kind: str
    held: int
    limit: int


@dataclass(frozen=True)
class Worker:
    id: str
    node: str
    device: str
    up: float
    memory_bytes: int
    models: tuple[str, ...]
    adapters: tuple[str, ...]
    prefixes: tuple[str, ...]
    lanes: tuple[LaneRow, ...]
    tokens_per_second: float


@dataclass(frozen=True)
class JobRow:
    """`share`: how much of it is done, 0 to 1, where that is known."""

    id: str
    kind: str
    model: str
    adapter: str
    client: str
    priority: int
    size: str
    age: float
    worker: str
    text: str
    share: float | None


@dataclass(frozen=True)
class Run:
    """A training run: its losses by step."""

    id: str
    name: str
    model: str
    text: str
    share: float
    running: bool
    points: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Version:
    number: int
    facts: str
    serves: bool


@dataclass(frozen=True)
class Adapter:
    id: str
    name: str
    model: str
    versions: tuple[Version, ...]
    can_roll_back: bool


@dataclass(frozen=True)
class LetterRow:
    id: str
    kind: str
    model: str
    client: str
    history: tuple[str, ...]
    can_retry: bool


@dataclass(frozen=True)
class Overview:
    """`trouble`: why the broker cannot be seen now, if it cannot."""

    trouble: str
    queues: tuple[Queue, ...]
    workers: tuple[Worker, ...]
    running: tuple[JobRow, ...]
    waiting: tuple[JobRow, ...]
    waiting_in_all: int
    runs: tuple[Run, ...]
    adapters: tuple[Adapter, ...]
    dead: tuple[LetterRow, ...]


def overview(
    mirror: Mirror,
    workers: Sequence[Presence],
    adapters: Sequence[AdapterEntry],
    dead: Mapping[str, dead_letters.Letter],
    trouble: str = "",
) -> Overview:
    waiting = [(name, job) for name, job in mirror.jobs.items() if job.worker is None]
    running = [(name, job) for name, job in mirror.jobs.items() if job.worker is not None]
    rates = mirror.rates()
    first = sorted(waiting, key=lambda item: (item[1].known.priority, item[1].known.submitted))[:LISTED]
    return Overview(
        trouble,
        queues(mirror),
        tuple(_worker(presence, rates.get(presence.worker, 0.0)) for presence in workers),
        tuple(_job(name, job, mirror) for name, job in sorted(running, key=lambda item: item[1].known.submitted)),
        tuple(_job(name, job, mirror) for name, job in first),
        len(waiting),
        runs(mirror),
        tuple(_adapter(entry) for entry in adapters if entry.versions),
        tuple(_letter(name, letter) for name, letter in dead.items()),
    )


def queues(mirror: Mirror) -> tuple[Queue, ...]:
    """Every queue that a model of the fleet has, whether or not a worker takes from it just now."""
    jobs: dict[str, list[MirroredJob]] = {name: [] for name in mirror.lines}
    for name, line in mirror.lines.items():
        jobs[name] = [mirror.jobs[job_id] for job_id in line.jobs if job_id in mirror.jobs]
    found = [_queue(name, line.model, line.kind, jobs[name], mirror.now) for name, line in mirror.lines.items()]
    return tuple(sorted(found, key=lambda queue: queue.name))


def _queue(name: str, model: str, kind: str, jobs: Iterable[MirroredJob], now: float) -> Queue:
    waiting = [job.known for job in jobs if job.worker is None]
    running = Counter(job.known.client for job in jobs if job.worker is not None)
    priorities, clients = Counter(job.priority for job in waiting), Counter(job.client for job in waiting)
    shares = [Share(client, clients[client], running[client]) for client in clients | running]
    shares.sort(key=lambda share: (-share.waiting - share.running, share.client))
    ages = [max(0.0, now - job.submitted) for job in waiting]
    groups = Counter(bisect_right(AGES, age) for age in ages)
    return Queue(
        name,
        model,
        kind,
        len(waiting),
        running.total(),
        max(ages, default=0.0),
        tuple(priorities[priority] for priority in range(PRIORITIES)),
        tuple(groups[group] for group in range(len(AGES) + 1)),
        tuple(shares[:CLIENTS]),
    )


def _worker(presence: Presence, rate: float) -> Worker:
    return Worker(
        id=presence.worker,
        node=node_of(presence.worker),
        device=presence.place,
        up=max(0.0, presence.time - presence.started),
        memory_bytes=presence.memory_bytes,
        models=tuple(_models(presence)),
        adapters=tuple(f"{name} on {model}" for model, names in presence.adapters.items() for name in names),
        prefixes=tuple(f"{state.name} on {state.model} ({describe_prefix(state)})" for state in presence.prefixes),
        lanes=tuple(LaneRow(kind, held, limit) for kind, (held, limit) in presence.lanes.items()),
        tokens_per_second=rate,
    )


def _models(presence: Presence) -> Iterator[str]:
    """What is warm, and what is not, with the reason."""
    states = {state.model: state for state in presence.states}
    for card in presence.models:
        state = states.pop(card.model, None)
        yield f"{card.model} ({card.described}{', pinned' if state is not None and state.pinned else ''})"
    for state in states.values():
        yield f"{state.model} ({describe_state(state)})"


def _job(job_id: str, job: MirroredJob, mirror: Mirror) -> JobRow:
    known, curve = job.known, mirror.runs.get(job_id)
    text, share = (curve.text, curve.share) if curve else ("", None)
    if curve is None and job.entries is not None:
        most = known.size.partition(" ")[0]
        share = min(1.0, job.entries / int(most)) if most.isdecimal() and int(most) else None
        text = f"{job.entries} tokens · {job.pace:.0f} tokens/s"
    asked = (known.kind, known.model, known.adapter, known.client, known.priority, known.size)
    age = max(0.0, mirror.now - known.submitted)
    return JobRow(job_id, *asked, age=age, worker=node_of(job.worker or ""), text=text, share=share)


def runs(mirror: Mirror) -> tuple[Run, ...]:
    """The newest first."""
    found = []
    for job_id, curve in reversed(mirror.runs.items()):
        known = mirror.run_of(job_id)
        shown = (tuple(curve.shown), tuple(curve.held_out))
        found.append(Run(job_id, known.adapter, known.model, curve.text, curve.share, job_id in mirror.jobs, *shown))
    return tuple(found)


def _adapter(entry: AdapterEntry) -> Adapter:
    versions = tuple(
        Version(number, facts(known), number == entry.serving)
        for number, known in sorted(entry.versions.items(), reverse=True)
    )
    return Adapter(f"{entry.model}/{entry.name}", entry.name, entry.model, versions, bool(entry.history))


def _letter(job_id: str, letter: dead_letters.Letter) -> LetterRow:
    history = tuple(_crash(crash) for crash in letter["history"])
    client = dead_letters.sender(letter) or ""
    return LetterRow(job_id, letter["kind"], letter["model"], client, history, letter["kind"] in KINDS)


def _crash(crash: dead_letters.CrashEntry) -> str:
    trouble = crash.get("trouble")
    return str(crash["worker"]) + (f": {trouble}" if trouble else " went silent")

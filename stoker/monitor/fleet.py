"""What the monitor counts itself, from what it holds of the ledger anyway: a scrape asks the broker nothing for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from stoker.broker.ledger import PRIORITIES
from stoker.broker.letters import Letter
from stoker.contract import Presence
from stoker.contract.kinds import KINDS
from stoker.monitor import metrics
from stoker.monitor.metrics import OTHER
from stoker.monitor.mirror import Mirror
from stoker.monitor.numbers import MetricsReport, Numbers

#: Models that have series of their own: a registry that another program filled makes no series without end.
MODELS = 100
#: model, kind
Lane = tuple[str, str]


def fleet(mirror: Mirror, workers: Sequence[Presence], dead: Mapping[str, Letter], *, up: bool) -> MetricsReport:
    numbers, known = Numbers(), sorted({line.model for line in mirror.lines.values()})[:MODELS]
    numbers.of(metrics.BROKER_UP).set(float(up))
    lanes = {folded(line.model, line.kind, known) for line in mirror.lines.values()}
    _jobs(numbers, mirror, lanes, known)
    for (model, kind), count in mirror.cancelled.items():
        numbers.of(metrics.CANCELLED_WAITING, *folded(model, kind, known)).add(count)
    for letter in dead.values():
        numbers.of(metrics.DEAD_LETTERS, *folded(letter["model"], letter["kind"], known)).add()
    _workers(numbers, workers, known)
    return numbers.report()


def folded(model: str, kind: str, known: Iterable[str]) -> Lane:
    return (model if model in known else OTHER), (kind if kind in KINDS else OTHER)


def _jobs(numbers: Numbers, mirror: Mirror, lanes: Iterable[Lane], known: Sequence[str]) -> None:
    """Every lane has all its series, also while nothing waits: an alert ends with a number, not with silence."""
    waiting: Counter[tuple[str, str, int]] = Counter()
    running: Counter[Lane] = Counter()
    oldest: dict[tuple[str, str, int], float] = {}
    for job in mirror.jobs.values():
        lane = folded(job.known.model, job.known.kind, known)
        if job.worker is not None:
            running[lane] += 1
            continue
        key = (*lane, min(max(job.known.priority, 0), PRIORITIES - 1))
        waiting[key] += 1
        oldest[key] = max(oldest.get(key, 0.0), mirror.now - job.known.submitted)
    for lane in {*lanes, *running, *((model, kind) for model, kind, _ in waiting)}:
        numbers.of(metrics.RUNNING, *lane).set(running[lane])
        numbers.of(metrics.CANCELLED_WAITING, *lane)
        numbers.of(metrics.DEAD_LETTERS, *lane)
        for priority in range(PRIORITIES):
            key = (*lane, priority)
            numbers.of(metrics.WAITING, *lane, str(priority)).set(waiting[key])
            numbers.of(metrics.OLDEST_WAIT, *lane, str(priority)).set(oldest.get(key, 0.0))


def _workers(numbers: Numbers, workers: Sequence[Presence], known: Sequence[str]) -> None:
    for model in known:
        numbers.of(metrics.WORKERS, model)
    for presence in workers:
        for model in {card.model if card.model in known else OTHER for card in presence.models}:
            numbers.of(metrics.WORKERS, model).add()

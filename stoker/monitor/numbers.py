"""Where a process counts, and what it reports of it: plain numbers, without Prometheus' library."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable

from pydantic import ConfigDict, ValidationError

from stoker.contract.presence import Notice
from stoker.monitor.metrics import Metric


class Series:
    """One metric with one set of labels. `value`: of a histogram, the sum of what was observed.

    There is no lock: a series is written by one thread at a time, and read by any. What several threads write has a
    lock around it (`workers/services/job_meter.py`).
    """

    __slots__ = ("bounds", "counts", "value")

    def __init__(self, bounds: tuple[float, ...] = ()) -> None:
        self.bounds, self.value = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1) if bounds else []

    def add(self, amount: float = 1.0) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.value += value


class Sample(Notice):
    """A series as it is reported. `counts`: observations in each bucket of a histogram, the last without bound."""

    #: A loss may be no number: then that is what has to be seen.
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")

    labels: tuple[str, ...]
    value: float
    counts: tuple[int, ...] = ()


class MetricsReport(Notice):
    """What one process has counted. `source`: the worker's process, or "" for the monitor's own."""

    source: str = ""
    samples: dict[str, tuple[Sample, ...]]


class Numbers:
    """The series of one process."""

    def __init__(self) -> None:
        self._series: dict[tuple[Metric, tuple[str, ...]], Series] = {}

    def of(self, metric: Metric, *labels: str) -> Series:
        """The series of `metric` with these labels, from now on there."""
        found = self._series.get((metric, labels))
        if found is None:
            if len(labels) != len(metric.labels):
                raise ValueError(f"{metric.name} has the labels {metric.labels}; {labels} given")
            found = self._series.setdefault((metric, labels), Series(metric.buckets))
        return found

    def keep(self, metric: Metric, of: Collection[str]) -> None:
        """Let go of the series of `metric` whose first label is none of these: what they stood for is no longer
        there."""
        for known, labels in list(self._series):
            if known is metric and labels[0] not in of:
                self._series.pop((known, labels), None)

    def report(self, source: str = "") -> MetricsReport:
        found: dict[str, list[Sample]] = {}
        # A copy at once: other threads add series meanwhile.
        for (metric, labels), series in list(self._series.items()):
            sample = Sample(labels=labels, value=series.value, counts=tuple(series.counts))
            found.setdefault(metric.name, []).append(sample)
        return MetricsReport(source=source, samples={name: tuple(samples) for name, samples in found.items()})


def parse_reports(values: Iterable[bytes | None]) -> list[MetricsReport]:
    """Those that can be read: another release may report in another form, and is left out."""
    found = []
    for raw in values:
        try:
            found += [] if raw is None else [MetricsReport.model_validate_json(raw)]
        except ValidationError:
            continue
    return found

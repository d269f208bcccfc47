"""Reports as Prometheus reads them: the one place that uses its library."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from stoker.contract.presence import node_of
from stoker.monitor.metrics import FLEET, GATEWAY, WORKER, Metric, shown_labels
from stoker.monitor.numbers import MetricsReport, Sample

#: Characters of a label that are shown.
LONGEST = 100
#: Series of one metric that are shown of one worker. It has fewer; another program may have written the report.
MOST = 1000


class Exposition(Collector):
    """What `read` says, asked at each scrape."""

    def __init__(self, read: Callable[[], Iterable[Family]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Family]:
        return self._read()

    def describe(self) -> Iterable[Family]:
        """Nothing is known before the first scrape."""
        return []


def registry(read: Callable[[], Iterable[Family]]) -> CollectorRegistry:
    made = CollectorRegistry(auto_describe=False)
    made.register(Exposition(read))
    return made


def text(families: Iterable[Family]) -> bytes:
    return generate_latest(registry(lambda: families))


class WorkersText:
    """The text of what workers reported, made once for each list of reports: it takes 5 ms for a worker, and scrapes
    need no password."""

    def __init__(self) -> None:
        self._reports: Sequence[MetricsReport] | None = None
        self._text = b""

    def of(self, reports: Sequence[MetricsReport]) -> bytes:
        if reports is not self._reports:
            self._reports, self._text = reports, text(of_workers(reports))
        return self._text


def of_workers(reports: Sequence[MetricsReport]) -> Iterator[Family]:
    """Each series with its worker's name. Of two processes that have one name for a moment, the later in `reports` is
    shown: two series of the same labels would make a scrape fail as a whole."""
    named = {node_of(report.source)[:LONGEST]: report for report in reports}
    for metric in WORKER:
        samples = {
            (name, *sample.labels): sample
            for name, report in named.items()
            for sample in report.samples.get(metric.name, ())[:MOST]
            if _fits(metric, sample)
        }
        yield _family(metric, samples)


def of_fleet(report: MetricsReport) -> Iterator[Family]:
    return _of_process(FLEET, report)


def of_gateway(report: MetricsReport) -> Iterator[Family]:
    return _of_process(GATEWAY, report)


def _of_process(metrics: Iterable[Metric], report: MetricsReport) -> Iterator[Family]:
    for metric in metrics:
        yield _family(metric, {sample.labels: sample for sample in report.samples.get(metric.name, ())})


def _fits(metric: Metric, sample: Sample) -> bool:
    """Whether a worker of this release could have reported it."""
    counts = len(metric.buckets) + 1 if metric.buckets else 0
    short = all(len(label) <= LONGEST for label in sample.labels)
    return short and len(sample.labels) == len(metric.labels) and len(sample.counts) == counts


def _family(metric: Metric, samples: dict[tuple[str, ...], Sample]) -> Family:
    labels = shown_labels(metric)
    if metric.type == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=labels)
        bounds = [*map(str, metric.buckets), "+Inf"]
        for values, sample in samples.items():
            buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(sample.counts), strict=True)]
            histogram.add_metric(values, buckets, sample.value)
        return histogram
    made = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
    family = made(metric.name, metric.help, labels=labels)
    for values, sample in samples.items():
        family.add_metric(values, sample.value)
    return family

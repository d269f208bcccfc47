"""What a scrape says, as numbers."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from stoker.monitor.metrics import Metric


@dataclass(frozen=True)
class Scrape:
    """Sample name → its labels, as (name, value) pairs → value."""

    samples: dict[str, dict[frozenset[tuple[str, str]], float]]

    @classmethod
    def of(cls, text: str) -> Scrape:
        samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                of_name = samples.setdefault(sample.name, {})
                labels = frozenset(sample.labels.items())
                assert labels not in of_name, f"{sample.name} {dict(labels)} is there twice"
                of_name[labels] = sample.value
        return cls(samples)

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric over all series with these labels; a histogram's by `_count` or `_sum`."""
        return sum(value for found, value in self.samples.get(name, {}).items() if found >= labels.items())

    def has(self, metric: Metric) -> bool:
        return (metric.name + "_count" if metric.type == "histogram" else metric.name) in self.samples

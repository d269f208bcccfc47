"""Metrics as they are declared, counted, reported and exposed."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

import pytest

from stoker import AsyncClient
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.broker.letters import Letter
from stoker.monitor import exposition, metrics
from stoker.monitor import watch as watching
from stoker.monitor.fleet import MODELS, fleet
from stoker.monitor.metrics import FLEET, GATEWAY, WORKER, Metric
from stoker.monitor.mirror import Mirror, MirroredJob
from stoker.monitor.notices import Known
from stoker.monitor.numbers import MetricsReport, Numbers, Sample, parse_reports
from stoker.monitor.state import JobMemory
from stoker.monitor.watch import Watch
from stoker.settings import Settings
from tests.monitor.scraped import Scrape
from tests.monitor.test_overview import card, presence

ALL = (*FLEET, *WORKER, *GATEWAY)
UNITS = ("_seconds", "_bytes", "_total", "_size", "_per_second")


def shown(*reports: MetricsReport) -> Scrape:
    return Scrape.of(exposition.text(exposition.of_workers(reports)).decode())


def test_another_programs_series_do_not_fill_a_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MOST", 3)
    numbers = Numbers()
    for number in range(5):
        numbers.of(metrics.KV_CACHE, f"model-{number}").set(1)
    assert len(shown(numbers.report("w@here/1")).samples["stoker_kv_cache_bytes"]) == 3


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_a_name_says_type_and_unit_and_labels_have_few_values(metric: Metric) -> None:
    assert re.fullmatch(r"stoker_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    if metric.type == "histogram":
        assert metric.name.endswith(UNITS)
        assert list(metric.buckets) == sorted(set(metric.buckets))
    else:
        assert not metric.buckets
    assert set(metric.labels) <= {"model", "kind", "priority", "outcome", "result", "endpoint", "status"}
    assert metric.help.endswith(".")


def test_no_name_is_declared_twice() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL)


def test_a_histogram_counts_each_value_in_its_bucket_and_cumulates_when_it_is_read() -> None:
    numbers = Numbers()
    series = numbers.of(metrics.INTER_TOKEN, "base")
    for value in (0.005, 0.006, 100.0):
        series.observe(value)
    found = shown(numbers.report("w@here/1"))
    bucket = "stoker_inter_token_seconds_bucket"
    assert [found.value(bucket, le=bound) for bound in ("0.005", "0.01", "2.5", "+Inf")] == [1, 2, 2, 3]
    assert found.value("stoker_inter_token_seconds_count", model="base", worker="w@here") == 3
    assert found.value("stoker_inter_token_seconds_sum") == pytest.approx(100.011)


def test_a_report_comes_back_as_it_was_also_with_a_loss_that_is_no_number() -> None:
    numbers = Numbers()
    numbers.of(metrics.TRAIN_LOSS, "base").set(math.nan)
    numbers.of(metrics.TRAIN_LOSS, "other").set(math.inf)
    numbers.of(metrics.JOBS, "base", "embed", "failed").add(3)
    (back,) = parse_reports([numbers.report("w@here/1").model_dump_json().encode()])
    found = shown(back)
    assert math.isnan(found.value("stoker_training_loss", model="base"))
    assert found.value("stoker_training_loss", model="other") == math.inf
    assert found.value("stoker_jobs_total", outcome="failed") == 3


@pytest.mark.parametrize("labels", [("base",), ("base", "embed", "done", "more")])
def test_labels_that_a_metric_does_not_have_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="stoker_jobs_total has the labels"):
        Numbers().of(metrics.JOBS, *labels)


def test_a_process_of_the_same_name_that_began_later_is_shown_alone() -> None:
    """A worker that is started again while its predecessor ends: two equal series would make the scrape fail."""
    reports = []
    for number in (1, 2):
        numbers = Numbers()
        numbers.of(metrics.ATTEMPTS, "base", "embed").add(number)
        reports.append(numbers.report(f"stoker-1@mac/{number}"))
    found = shown(*reports).samples["stoker_job_attempts_total"]
    assert found == {frozenset({("worker", "stoker-1@mac"), ("model", "base"), ("kind", "embed")}): 2.0}


def test_the_text_of_the_same_reports_is_made_once_and_of_others_anew() -> None:
    made, numbers = exposition.WorkersText(), Numbers()
    numbers.of(metrics.MEMORY).set(1)
    first = [numbers.report("w")]
    assert made.of(first) is made.of(first)
    numbers.of(metrics.MEMORY).set(2)
    second = [numbers.report("w")]
    assert Scrape.of(made.of(second).decode()).value("stoker_memory_bytes") == 2


@pytest.mark.parametrize(
    "sample",
    [
        Sample(labels=("base",), value=1.0),
        Sample(labels=("base", "embed"), value=1.0, counts=(1, 2)),
        Sample(labels=("b" * 101, "embed"), value=1.0),
    ],
    ids=["labels", "counts", "long"],
)
def test_what_no_worker_of_this_release_reports_is_left_out_and_the_rest_is_shown(sample: Sample) -> None:
    good = Sample(labels=("base", "train"), value=7.0)
    report = MetricsReport(source="w", samples={"stoker_job_attempts_total": (sample, good), "stoker_unknown": (good,)})
    found = shown(report)
    assert list(found.samples["stoker_job_attempts_total"].values()) == [7.0]
    assert "stoker_unknown" not in found.samples


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"samples": 1}', b"\xff", b'{"samples": {"x": [{"labels": 1}]}}'])
def test_a_report_that_cannot_be_read_costs_no_other(raw: bytes) -> None:
    good = Numbers().report("w").model_dump_json().encode()
    assert [report.source for report in parse_reports([raw, None, good])] == ["w"]


def mirror() -> Mirror:
    made = Mirror()
    made.now = 100.0
    made.follow(keys.queue("base", "generate"), "base", "generate")
    for number, (priority, worker) in enumerate([(0, None), (0, None), (9, None), (5, "w@here/1")]):
        known = Known(f"job-{number}", "generate", "base", "team", priority, "", "", 40.0 + number, 0)
        made.jobs[f"job-{number}"] = MirroredJob(known, worker)
        made.lines[keys.queue("base", "generate")].jobs.add(f"job-{number}")
    return made


def test_the_fleets_gauges_are_what_the_ledger_holds_and_zero_where_nothing_is() -> None:
    letter = Letter(kind="generate", model="base", client="", history=[], request="")
    report = fleet(mirror(), [presence()], {"a": letter}, up=True)
    found = Scrape.of(exposition.text(exposition.of_fleet(report)).decode())
    waiting = {priority: found.value("stoker_jobs_waiting", priority=str(priority)) for priority in range(10)}
    assert waiting == {**dict.fromkeys(range(10), 0.0), 0: 2.0, 9: 1.0}
    assert len(found.samples["stoker_oldest_wait_seconds"]) == 10
    assert found.value("stoker_oldest_wait_seconds", priority="0") == 60.0
    assert found.value("stoker_jobs_running", model="base", kind="generate") == 1
    assert found.value("stoker_dead_letters", model="base", kind="generate") == 1
    assert found.value("stoker_broker_up") == 1


def test_only_a_job_that_waited_counts_as_cancelled_while_it_waited() -> None:
    seen, queue = mirror(), keys.queue("base", "generate")
    seen.end(queue, "job-0", "REVOKED", "")
    seen.end(queue, "job-1", "FAILURE", "JobDead")
    seen.end(queue, "job-3", "REVOKED", "")
    seen.end(queue, "unknown", "REVOKED", "")
    found = Scrape.of(exposition.text(exposition.of_fleet(fleet(seen, [], {}, up=True))).decode())
    assert found.value("stoker_jobs_cancelled_waiting_total") == 1


def test_models_without_end_and_names_of_others_make_no_series_without_end() -> None:
    many = Mirror()
    for number in range(5 * MODELS):
        many.follow(keys.queue(f"m-{number:04}", "embed"), f"m-{number:04}", "embed")
    letters = {
        str(number): Letter(kind=f"kind-{number}", model=f"odd-{number}", client="", history=[], request="")
        for number in range(50)
    }
    workers = [presence(models=tuple(card(model=f"x-{number}") for number in range(50)))]
    report = fleet(many, workers, letters, up=False)
    assert {sample.labels for sample in report.samples["stoker_dead_letters"] if sample.value} == {("other", "other")}
    models = {sample.labels[0] for sample in report.samples["stoker_workers"]}
    assert len(models) == MODELS + 1
    assert "other" in models
    others = [sample.value for sample in report.samples["stoker_workers"] if sample.labels == ("other",)]
    assert others == [1], "one worker, however many such models it has"
    assert len(report.samples["stoker_jobs_waiting"]) == 10 * (MODELS + 1)


def test_many_scrapes_ask_the_broker_once_and_wherever_workers_are_gone_nothing(
    broker: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis: Any = connect(broker)
    redis.set(keys.metrics("w@here/1"), Numbers().report("w@here/1").model_dump_json(), ex=10)

    def asked() -> int:
        return int(redis.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"])

    async def session() -> None:
        async with AsyncClient(settings=broker) as client:
            watch = Watch(client, JobMemory)
            before = asked()
            assert await watch.reports() == []
            assert asked() == before, "no worker, no question"
            watch.workers = [presence(worker="w@here/1"), presence(worker="gone/2")]
            monkeypatch.setattr(watching, "COUNTED", 0.0)
            assert [report.source for report in await watch.reports()] == ["w@here/1"]
            monkeypatch.setattr(watching, "COUNTED", 1e9)
            for _ in range(20):
                await watch.reports()
            assert asked() == before + 1

    asyncio.run(session())
    redis.close()


def test_a_lane_has_all_its_series_before_anything_has_happened() -> None:
    """An alert needs the zero before the first count, and ends with a number."""
    seen = Mirror()
    seen.follow(keys.queue("base", "train"), "base", "train")
    samples = fleet(seen, [], {}, up=False).samples
    for metric in FLEET:
        assert all(sample.value == 0 for sample in samples[metric.name]), metric.name
        lane = ("base", "train")[: min(2, len(metric.labels))]
        assert {sample.labels[: len(lane)] for sample in samples[metric.name]} == {lane}


def test_a_priority_that_there_is_not_is_counted_with_the_nearest() -> None:
    seen = mirror()
    for number, priority in enumerate((-3, 12)):
        known = Known(f"odd-{number}", "generate", "base", "team", priority, "", "", 40.0, 0)
        seen.jobs[f"odd-{number}"] = MirroredJob(known, None)
    found = Scrape.of(exposition.text(exposition.of_fleet(fleet(seen, [], {}, up=True))).decode())
    waiting = [found.value("stoker_jobs_waiting", priority=str(priority)) for priority in (0, 9)]
    assert waiting == [3, 2]
    assert len(found.samples["stoker_jobs_waiting"]) == 10


def test_the_oldest_wait_is_that_of_the_oldest_in_whatever_order_they_come() -> None:
    seen = mirror()
    for number, submitted in enumerate((10.0, 90.0)):
        known = Known(f"more-{number}", "generate", "base", "team", 0, "", "", submitted, 0)
        seen.jobs[f"more-{number}"] = MirroredJob(known, None)
    found = Scrape.of(exposition.text(exposition.of_fleet(fleet(seen, [], {}, up=True))).decode())
    assert found.value("stoker_oldest_wait_seconds", priority="0") == 90.0


def test_the_longest_label_is_shown() -> None:
    numbers = Numbers()
    numbers.of(metrics.KV_CACHE, "m" * exposition.LONGEST).set(1)
    assert shown(numbers.report("w@here/1")).has(metrics.KV_CACHE)

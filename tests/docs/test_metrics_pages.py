"""Metrics in pages, rules and dashboard: every name is one that the code has, and every alert has its place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from stoker.monitor.metrics import FLEET, GATEWAY, WORKER, Metric
from tests.docs.pages import ROOT, code, rows

METRICS = {metric.name: metric for metric in (*FLEET, *WORKER, *GATEWAY)}
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "stoker.json"
RULES: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "stoker.rules.yml").read_text())["groups"][0]["rules"]


def samples(metric: Metric) -> set[str]:
    """The names that a query may ask for."""
    ends = ("_bucket", "_sum", "_count") if metric.type == "histogram" else ("",)
    return {metric.name + end for end in ends}


SAMPLES = {name for metric in METRICS.values() for name in samples(metric)}


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def queries() -> Iterator[tuple[str, str]]:
    yield from ((rule["alert"], rule["expr"]) for rule in RULES)
    yield from ((panel["title"], target["expr"]) for panel in panels() for target in panel.get("targets", []))


def test_the_tables_of_metrics_are_those_of_the_code() -> None:
    table = {code(row[0])[0]: (row[1], tuple(code(row[2])), row[3]) for row in rows("docs/monitor.md", "metric")}
    assert table == {metric.name: (metric.type, metric.labels, metric.help) for metric in METRICS.values()}


@pytest.mark.parametrize(("place", "query"), list(queries()), ids=lambda text: text[:40])
def test_rules_and_dashboard_ask_for_metrics_and_labels_that_there_are(place: str, query: str) -> None:
    asked = set(re.findall(r"\bstoker_\w+", query))
    assert asked <= SAMPLES, place
    assert asked or "up{" in query, place
    labels = {label for name in asked for metric in METRICS.values() if name in samples(metric)
              for label in (*metric.labels, "worker")}  # fmt: skip
    wanted = {label for inner in re.findall(r"\{(.*?)\}", query) for label in re.findall(r"(\w+) ?=~?|(\w+) ?!=", inner)
              for label in label if label}  # fmt: skip
    wanted |= {label.strip() for inner in re.findall(r"(?:by|on) \(([^)]*)\)", query) for label in inner.split(",")}
    assert wanted <= labels | {"le", "job"}, place


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for _, query in queries() for name in re.findall(r"\bstoker_\w+", query)}
    unseen = {metric.name for metric in METRICS.values() if not samples(metric) & shown}
    assert not unseen


def test_the_dashboards_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_each_alert_has_its_paragraph_in_the_runbook() -> None:
    titles = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert titles == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_the_configuration_scrapes_the_monitor_and_reads_the_rules() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert config["rule_files"] == ["stoker.rules.yml"]
    # The alert that the monitor is down names the job.
    assert [job["job_name"] for job in config["scrape_configs"]] == ["stoker", "stoker-gateway"]


@pytest.mark.parametrize("arguments", [("config", "prometheus.yml"), ("rules", "stoker.rules.yml")])
def test_prometheus_own_check_passes(arguments: tuple[str, str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    kind, name = arguments
    done = subprocess.run([promtool, "check", kind, str(PROMETHEUS / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr

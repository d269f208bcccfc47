"""A worker's numbers on their way out: the key for the monitor, and a port of its own."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.generation.limits import GenerationLoad
from stoker.broker import keys
from stoker.broker.connection import connect
from stoker.errors import ConfigError
from stoker.monitor.numbers import Numbers, parse_reports
from stoker.settings import Settings, load_settings
from tests.monitor.scraped import Scrape
from workers.capacity import Lanes
from workers.deliveries import Health
from workers.services import measuring as measuring_module
from workers.services.measuring import Measuring


@pytest.fixture
def health() -> Health:
    return Health(10)


@pytest.fixture
def runtime(broker: Settings) -> Iterator[Any]:
    redis = connect(broker)
    engine = SimpleNamespace(
        loads={"base": GenerationLoad(7, 70, 3, 2, 4, 9, 6, 8)},
        adapters={"base": ("style@1", "style@2")},
        memory_bytes=9,
        prefix_bytes=11,
        ranks=2,
    )
    made: Any = SimpleNamespace(
        redis=redis, name="w@here/1", engine=engine, numbers=Numbers(), started=0.0, stopped=threading.Event(),
        settings=broker.model_copy(update={"metrics": "19464"}), publisher=SimpleNamespace(unsent=4),
    )  # fmt: skip
    yield made
    made.stopped.set()
    redis.close()


@pytest.fixture
def measuring(runtime: Any, health: Health) -> Iterator[Measuring]:
    lanes = Lanes()
    lanes.configure({"generate": 16}, {})
    lanes.enter("generate")
    health.answered()
    health.failed()
    made = Measuring(runtime, lanes, health)
    yield made
    runtime.stopped.set()
    made.stop()


def free(count: int) -> int:
    """A port with `count - 1` others behind it, which nobody has."""
    for port in range(23_000, 60_000, count):
        try:
            for each in [socket.create_server(("127.0.0.1", port + number)) for number in range(count)]:
                each.close()
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")


def scrape(port: int) -> Scrape:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        return Scrape.of(reply.read().decode())


def test_a_report_has_how_things_stand_and_expires(measuring: Measuring, broker: Settings) -> None:
    for _ in range(3):
        # What stands is said again and again, and does not add up.
        measuring.report()
    with connect(broker) as redis:
        (report,) = parse_reports([redis.get(keys.metrics("w@here/1"))])
        assert 0 < redis.ttl(keys.metrics("w@here/1")) <= keys.PRESENCE_TTL
    values = {(name, sample.labels): sample.value for name, found in report.samples.items() for sample in found}
    assert values["stoker_kv_cache_bytes", ("base",)] == 7
    assert values["stoker_kv_cache_limit_bytes", ("base",)] == 70
    assert values["stoker_kv_bits", ("base",)] == 8
    assert values["stoker_preemptions_total", ("base",)] == 3
    assert values["stoker_step_traces_total", ("base",)] == 2
    assert values["stoker_prefix_disk_hits_total", ("base",)] == 4
    assert values["stoker_drafted_tokens_total", ("base",)] == 9
    assert values["stoker_accepted_tokens_total", ("base",)] == 6
    assert values["stoker_prefix_disk_bytes", ()] == 11
    assert values["stoker_adapters_held", ("base",)] == 2
    assert values["stoker_memory_bytes", ()] == 9
    assert values["stoker_ranks", ()] == 2
    assert values["stoker_unpublished_entries", ()] == 4
    assert values["stoker_lane_jobs", ("generate",)] == 1
    assert values["stoker_lane_jobs_limit", ("generate",)] == 16
    assert values["stoker_lease_renewals_total", ("ok",)] == values["stoker_lease_renewals_total", ("failed",)] == 1


def test_of_a_model_that_has_left_only_what_was_counted_stays(measuring: Measuring, runtime: Any) -> None:
    measuring.gather()
    runtime.engine.loads = {"other": GenerationLoad(1, 70, 0, 0, 0, 0, 0, 8)}
    runtime.engine.adapters = {"other": ()}
    found = {name: {sample.labels for sample in each} for name, each in measuring.gather().samples.items()}
    gauges = ("stoker_kv_cache_bytes", "stoker_kv_cache_limit_bytes", "stoker_kv_bits", "stoker_adapters_held")
    assert [found[name] for name in gauges] == [{("other",)}] * 4
    assert found["stoker_preemptions_total"] == {("base",), ("other",)}


def test_a_worker_keeps_the_time_of_its_start(measuring: Measuring) -> None:
    """An alert counts its changes."""
    started = []
    for _ in range(3):
        measuring.report()
        (sample,) = measuring.gather().samples["stoker_worker_start_time_seconds"]
        started.append(sample.value)
    assert len(set(started)) == 1
    assert measuring.gather().samples["stoker_broker_latency_seconds"][0].counts
    assert sum(measuring.gather().samples["stoker_broker_latency_seconds"][0].counts) == 3


def test_a_worker_that_has_stopped_leaves_no_numbers(measuring: Measuring, broker: Settings) -> None:
    measuring.report()
    measuring.stop()
    with connect(broker) as redis:
        assert not redis.exists(keys.metrics("w@here/1"))


def test_a_port_that_another_worker_has_is_passed_over(measuring: Measuring) -> None:
    first = free(3)
    with socket.create_server(("127.0.0.1", first)), socket.create_server(("127.0.0.1", first + 1)):
        assert measuring.serve("127.0.0.1", first) == first + 2
        found = scrape(first + 2)
    assert found.value("stoker_kv_cache_bytes", worker="w@here", model="base") == 7


def test_a_connection_that_says_nothing_is_closed(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring_module.Handler, "timeout", 0.05)
    port = measuring.serve("127.0.0.1", free(1))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as silent:
        assert silent.recv(1) == b""
    assert scrape(port).samples


@pytest.mark.skipif(not socket.has_ipv6, reason="without IP version 6")
def test_an_address_of_ip_version_6_is_served_too(measuring: Measuring) -> None:
    port = measuring.serve("::1", free(1))
    with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=10) as reply:
        assert reply.status == 200


def test_no_free_port_is_one_clear_error(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring_module, "PORTS", 2)
    first = free(2)
    with (
        socket.create_server(("127.0.0.1", first)),
        socket.create_server(("127.0.0.1", first + 1)),
        pytest.raises(ConfigError, match=rf"STOKER_METRICS: .* ports {first} to {first + 1}, can be listened on"),
    ):
        measuring.serve("127.0.0.1", first)


def test_an_address_that_is_not_this_machines_is_the_same_error(measuring: Measuring) -> None:
    with pytest.raises(ConfigError, match="STOKER_METRICS"):
        measuring.serve("192.0.2.1", 65_530)


def test_nothing_is_served_unless_it_is_asked_for(measuring: Measuring, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = SimpleNamespace(settings=Settings(), stopped=threading.Event())
    monkeypatch.setattr(measuring_module, "make_server", pytest.fail)
    Measuring(runtime, Lanes(), Health(10)).listen()


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("localhost:65535", ("localhost", 65535)),
        ("[::1]:9464", ("::1", 9464)),
    ],
)
def test_a_port_alone_is_of_loopback(monkeypatch: pytest.MonkeyPatch, given: str, address: tuple[str, int]) -> None:
    monkeypatch.setenv("STOKER_METRICS", given)
    assert load_settings().metrics_address == address


@pytest.mark.parametrize("given", ["0", "65536", "nine", "::1:9464", "host:", "http://host:1", "9464 ", "-1", "٩"])
def test_anything_else_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("STOKER_METRICS", given)
    with pytest.raises(ConfigError, match=r"^STOKER_METRICS: .*host:port"):
        load_settings()


def test_silence_is_borne_for_seconds_alone() -> None:
    """Each connection has a thread."""
    assert measuring_module.Handler.timeout == measuring_module.SILENT
    assert 0 < measuring_module.SILENT <= 30


def test_renewals_that_failed_are_no_renewals(measuring: Measuring, health: Health) -> None:
    health.failed()
    health.failed()
    found = {sample.labels: sample.value for sample in measuring.gather().samples["stoker_lease_renewals_total"]}
    assert found == {("ok",): 1, ("failed",): 3}


def test_an_end_without_a_broker_is_an_end(
    measuring: Measuring, runtime: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "redis", connect(Settings(url="redis://127.0.0.1:1/0")))
    with caplog.at_level("INFO"):
        measuring.stop()
    assert f"the last metrics stay for {keys.PRESENCE_TTL} s" in caplog.text


def test_a_port_is_free_again_once_the_worker_has_stopped(measuring: Measuring) -> None:
    port = measuring.serve("127.0.0.1", free(1))
    measuring.stop()
    assert measuring.serve("127.0.0.1", port) == port

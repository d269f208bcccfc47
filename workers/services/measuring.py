"""What a worker has counted, on its way to the broker, where the monitor finds it, and to a port of its own."""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from redis.exceptions import RedisError

from stoker.broker import keys
from stoker.errors import ConfigError
from stoker.monitor import exposition, metrics
from stoker.monitor.numbers import MetricsReport
from workers import clock
from workers.capacity import Lanes
from workers.deliveries import Health
from workers.services.background import Background
from workers.services.runtime import Runtime

log = logging.getLogger(__name__)

#: Ports that are tried, from the one that is set: workers of one machine share its settings.
PORTS = 16
#: Seconds that a connection may be silent: each has a thread.
SILENT = 10.0


class Handler(WSGIRequestHandler):
    timeout = SILENT

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is no event."""


class SixServer(ThreadingWSGIServer):
    """Of an address of IP version 6."""

    address_family = socket.AF_INET6


class Measuring:
    """Numbers are gathered when they are asked for; between two reports nothing is done."""

    def __init__(self, runtime: Runtime, lanes: Lanes, health: Health) -> None:
        self._runtime, self._lanes, self._health = runtime, lanes, health
        self._server: WSGIServer | None = None
        self.thread = Background("metrics", self.report, stopped=runtime.stopped, every=keys.METRICS_EVERY)

    def start(self) -> None:
        self.thread.start()

    def listen(self) -> None:
        """Raises `ConfigError` if metrics cannot be served where they should."""
        address = self._runtime.settings.metrics_address
        if address is not None:
            self.serve(*address)

    def serve(self, host: str, port: int) -> int:
        """Serve what is counted, on the first port that is free; return which."""
        app = make_wsgi_app(exposition.registry(lambda: exposition.of_workers([self.gather()])))
        kind = SixServer if ":" in host else ThreadingWSGIServer
        last = min(port + PORTS, 65536)
        trouble = OSError()
        for tried in range(port, last):
            try:
                self._server = make_server(host, tried, app, kind, handler_class=Handler)
            except OSError as error:
                trouble = error
                continue
            threading.Thread(target=self._server.serve_forever, name="metrics port", daemon=True).start()
            log.info("metrics are served at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, tried)
            return tried
        raise ConfigError(
            f"STOKER_METRICS: {self._runtime.settings.metrics} given; none of {host}, ports {port} to {last - 1}, can "
            f"be listened on ({trouble.strerror or trouble}). Set another one, or unset it: `stoker flower` has the "
            "metrics of all workers."
        )

    def report(self) -> None:
        """Write what is counted where the monitor finds it."""
        redis, name = self._runtime.redis, self._runtime.name
        self._ask_time()
        redis.set(keys.metrics(name), self.gather().model_dump_json(), ex=keys.PRESENCE_TTL)

    def _ask_time(self) -> None:
        """The broker's; how long it took to come is the broker's latency."""
        began = time.perf_counter()
        now = clock.now(self._runtime.redis)
        self._runtime.numbers.of(metrics.BROKER_LATENCY).observe(time.perf_counter() - began)
        started = self._runtime.numbers.of(metrics.STARTED)
        if not started.value:
            started.set(now - (time.monotonic() - self._runtime.started))

    def stop(self) -> None:
        """Called when the runtime has stopped, and with it the thread: nobody counts on a worker that is gone."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self.thread.join(1.0)
        try:
            self._runtime.redis.delete(keys.metrics(self._runtime.name))
        except RedisError as error:
            log.info("the last metrics stay for %d s: %s", keys.PRESENCE_TTL, error)

    def gather(self) -> MetricsReport:
        """What was counted, and how things stand now. Called by several threads; each sets the same."""
        numbers, engine = self._runtime.numbers, self._runtime.engine
        for kind, (held, limit) in self._lanes.load().items():
            numbers.of(metrics.LANE_JOBS, kind).set(held)
            numbers.of(metrics.LANE_LIMIT, kind).set(limit)
        loads = engine.loads
        for model, load in loads.items():
            numbers.of(metrics.KV_CACHE, model).set(load.kv_bytes)
            numbers.of(metrics.KV_LIMIT, model).set(load.kv_limit)
            numbers.of(metrics.KV_BITS, model).set(load.kv_bits)
            numbers.of(metrics.PREEMPTIONS, model).set(load.preempted)
            numbers.of(metrics.TRACES, model).set(load.traced)
            numbers.of(metrics.PREFIX_DISK_HITS, model).set(load.disk_hits)
            numbers.of(metrics.DRAFTED_TOKENS, model).set(load.drafted)
            numbers.of(metrics.ACCEPTED_TOKENS, model).set(load.accepted)
        adapters = engine.adapters
        for model, names in adapters.items():
            numbers.of(metrics.ADAPTERS, model).set(len(names))
        # A model that has left takes nothing any more; what was counted of it stays.
        for metric in (metrics.KV_CACHE, metrics.KV_LIMIT, metrics.KV_BITS):
            numbers.keep(metric, loads)
        numbers.keep(metrics.ADAPTERS, adapters)
        numbers.of(metrics.LEASE_RENEWALS, "ok").set(self._health.renewals)
        numbers.of(metrics.LEASE_RENEWALS, "failed").set(self._health.failures)
        numbers.of(metrics.PREFIX_DISK).set(engine.prefix_bytes)
        numbers.of(metrics.MEMORY).set(engine.memory_bytes)
        numbers.of(metrics.RANKS).set(engine.ranks)
        numbers.of(metrics.UNPUBLISHED).set(self._runtime.publisher.unsent)
        return numbers.report(self._runtime.name)

"""Spans of the jobs at this worker, in the traces of the clients that sent them.

All of a job's spans are made when it is over, from the times in its account: while it runs, tracing costs nothing.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id, set_span_in_context

from stoker.errors import ConfigError
from stoker.logs.lines import FIELDS
from stoker.traces import Trace, failed
from workers.account import DeliveryEnd, JobAccount

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

log = logging.getLogger("stoker.traces")

#: Ends that a span shows as errors.
_BAD = frozenset({DeliveryEnd.FAILED, DeliveryEnd.DEAD})


class Tracing:
    """An `Observer`."""

    def __init__(self, provider: TracerProvider, worker: str) -> None:
        self._provider, self._worker = provider, worker
        self._tracer = provider.get_tracer("stoker")

    def begun(self, account: JobAccount) -> None: ...

    def ended(self, account: JobAccount) -> None:
        if account.outcome is DeliveryEnd.DROPPED:
            return
        clock, sent = Clock(), Trace(account.traceparent, account.tracestate).context()
        ended = clock.at(account.ended or time.monotonic())
        # What waited for a second attempt waited since the job was sent, too: the first may have left no span.
        submitted = clock.at(account.began - account.wait)
        self._span("stoker queue", sent, submitted, clock.at(account.began), self._about(account))
        job = self._tracer.start_span(
            f"stoker {account.kind}", sent, SpanKind.CONSUMER, self._about(account), start_time=clock.at(account.began)
        )
        below = set_span_in_context(job, sent)
        for phase in account.phases:
            self._span(f"stoker {phase.name}", below, clock.at(phase.began), clock.at(phase.ended), {})
        self._close(job, account, ended)

    def _span(self, name: str, place: Context, began: int, ended: int, about: dict[str, str | int]) -> None:
        self._tracer.start_span(name, place, attributes=about, start_time=began).end(max(began, ended))

    def _close(self, job: Span, account: JobAccount, ended: int) -> None:
        job.set_attribute("stoker.outcome", str(account.outcome))
        if account.tokens:
            job.set_attribute("stoker.tokens", account.tokens)
        if account.outcome in _BAD:
            failed(job, account.error)
        job.end(ended)

    def _about(self, account: JobAccount) -> dict[str, str | int]:
        return {
            "stoker.job": account.job,
            "stoker.kind": account.kind,
            "stoker.model": account.model,
            "stoker.client": account.client,
            "stoker.attempt": account.attempt,
            "stoker.worker": self._worker,
        }

    def close(self) -> None:
        """Send what is not sent yet."""
        self._provider.shutdown()


class Clock:
    """Monotonic seconds as nanoseconds since the epoch, by one look at both clocks."""

    def __init__(self) -> None:
        self._epoch = time.time_ns() - int(time.monotonic() * 1e9)

    def at(self, monotonic: float) -> int:
        return self._epoch + int(monotonic * 1e9)


class LogExporter(SpanExporter):
    """A line of the log for each span: traces without a collector."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            job = (span.attributes or {}).get("stoker.job", "")
            log.info("%s %s", span.name, job, extra={FIELDS: _fields(span)})
        return SpanExportResult.SUCCESS


def _fields(span: ReadableSpan) -> dict[str, Any]:
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    return {
        "event": "span",
        "name": span.name,
        "trace": format_trace_id(context.trace_id),
        "span": format_span_id(context.span_id),
        "parent": None if parent is None else format_span_id(parent.span_id),
        "began": (span.start_time or 0) / 1e9,
        "seconds": ((span.end_time or 0) - (span.start_time or 0)) / 1e9,
        **(span.attributes or {}),
    }


def tracing(to: str, worker: str) -> Tracing:
    """Spans that go to a collector (`otlp`; OpenTelemetry's own variables say where) or to the log (`log`). Raises
    `ConfigError`."""
    # A name in OpenTelemetry's own variables wins; the SDK would let ours win.
    named = "OTEL_SERVICE_NAME" in os.environ or SERVICE_NAME in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {SERVICE_NAME: "stoker-worker"}))
    if to == "log":
        provider.add_span_processor(SimpleSpanProcessor(LogExporter()))
    else:
        provider.add_span_processor(BatchSpanProcessor(_otlp()))
    return Tracing(provider, worker)


def _otlp() -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ConfigError(
            "STOKER_TRACES: otlp given; its exporter is missing: pip install opentelemetry-exporter-otlp-proto-http."
        ) from None
    exporter: SpanExporter = OTLPSpanExporter()
    return exporter

"""Traces: what a client reports of its jobs to OpenTelemetry, and how a job carries its trace to the worker.

Who traces has set OpenTelemetry up before it sends a job. Where nobody has, nothing is imported, and a job's record has
no field more.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker.contract import Request

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span

#: Jobs whose traces a client remembers, so that its waiting for them is in the same trace.
REMEMBERED = 1024
#: Letters of a tracestate that travels; the standard asks for 512.
LONGEST = 512


@dataclass(frozen=True)
class Trace:
    """Where in which trace a job was sent, in the form of W3C's Trace Context; "" for a job that nobody traces."""

    traceparent: str = ""
    tracestate: str = ""

    def context(self) -> Context:
        """What OpenTelemetry makes of it; without a span if it is none, also if something else stands there."""
        from opentelemetry.context import Context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        known = {"traceparent": self.traceparent, "tracestate": self.tracestate[:LONGEST]}
        return TraceContextTextMapPropagator().extract(known, Context())


NONE = Trace()


class Sent:
    """The traces of the jobs that a client sent last."""

    def __init__(self) -> None:
        self._traces: OrderedDict[str, Trace] = OrderedDict()

    def remember(self, job_id: str, trace: Trace) -> None:
        if trace.traceparent:
            self._traces[job_id] = trace
            while len(self._traces) > REMEMBERED:
                self._traces.popitem(last=False)

    def of(self, job_id: str) -> Trace:
        return self._traces.get(job_id, NONE)


@contextmanager
def sending(request: Request, job_id: str) -> Iterator[Trace]:
    """A span of the sending of a job; its place is what the job carries."""
    api = _api()
    if api is None:
        yield NONE
        return
    about = {"stoker.job": job_id, "stoker.kind": request.kind, "stoker.model": request.model}
    span = api.get_tracer("stoker").start_span("stoker send", kind=api.SpanKind.PRODUCER, attributes=about)
    with _ending(span):
        yield _place(span)


@contextmanager
def waiting(job_id: str, sent: Trace) -> Iterator[None]:
    """A span of the waiting for a job: below the caller's own, else below that of its sending, to which it is linked.

    It is not made the current one: a generator gives the thread back to its caller in the middle of it.
    """
    api = _api()
    if api is None:
        yield
        return
    place, links = None, []
    if sent.traceparent:
        context = sent.context()
        links = [api.Link(api.get_current_span(context).get_span_context())]
        place = None if api.get_current_span().get_span_context().is_valid else context
    about = {"stoker.job": job_id}
    tracer = api.get_tracer("stoker")
    with _ending(tracer.start_span("stoker wait", place, kind=api.SpanKind.CLIENT, attributes=about, links=links)):
        yield


def _api() -> Any:
    """OpenTelemetry's, if this process traces: the API alone, which other libraries import too, records nothing, and
    its spans would take a tenth of a small job's time. A span of the caller's is carried on in any case."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None or not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider):
        return api
    return api if api.get_current_span().get_span_context().is_valid else None


@contextmanager
def _ending(span: Span) -> Iterator[None]:
    """End it in any case. The words of an error may quote what was asked, and stay out of the trace."""
    try:
        yield
    except GeneratorExit:
        raise
    except BaseException as error:
        failed(span, type(error).__name__)
        raise
    finally:
        span.end()


def failed(span: Span, error: str) -> None:
    """Mark it as one that ended with an error of this class."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", error)
    span.set_status(Status(StatusCode.ERROR))


def _place(span: Span) -> Trace:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return _of(carrier)


def _of(carrier: Mapping[str, str]) -> Trace:
    return Trace(carrier.get("traceparent", ""), carrier.get("tracestate", "")[:LONGEST])

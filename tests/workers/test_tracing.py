"""Spans of the jobs at a worker, without a broker or an engine; and a client that traces, or does not."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from stoker import traces
from stoker.broker import ledger
from stoker.broker.connection import connect
from stoker.broker.ledger.replies import Claim
from stoker.client.requests import generate_request
from stoker.client.submission import job_record
from stoker.errors import ConfigError, InvalidRequest
from stoker.logs.lines import FIELDS
from stoker.settings import Settings
from stoker.traces import Trace
from workers.account import DeliveryEnd, JobAccount, Phase
from workers.services import observing
from workers.services import tracing as worker_tracing
from workers.services.tracing import Tracing, tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = Trace(f"00-{TRACE}-00f067aa0ba902b7-01", "vendor=1")
REQUEST = generate_request("m", "a secret prompt", 0, {})


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


@pytest.fixture
def worker(provider: TracerProvider) -> Tracing:
    return Tracing(provider, "w@here")


@pytest.fixture
def client(provider: TracerProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process traces what its clients do."""
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)


def account(sent: Trace = PARENT, attempt: int = 1, end: DeliveryEnd = DeliveryEnd.SUCCEEDED) -> JobAccount:
    made = JobAccount("job", "generate", "m", began=100.0, ended=102.0)
    made.claimed(Claim("run", 5.0, False, client="c", attempt=attempt, traceparent=sent.traceparent))
    made.phases = [Phase("prefill", 100.5, 101.0), Phase("decode", 101.0, 101.5)]
    made.over(end, InvalidRequest("'a secret prompt' given") if end is DeliveryEnd.FAILED else None)
    return made


def trace_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}"


def seconds(span: ReadableSpan) -> float:
    assert span.end_time is not None
    assert span.start_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_spans_last_as_long_as_what_they_report(worker: Tracing, exporter: InMemorySpanExporter) -> None:
    worker.ended(account())
    lasted = {span.name: round(seconds(span), 3) for span in exporter.get_finished_spans()}
    assert lasted == {"stoker queue": 5.0, "stoker prefill": 0.5, "stoker decode": 0.5, "stoker generate": 2.0}


def test_spans_lie_at_the_time_of_day_at_which_they_were(
    worker: Tracing, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program's spans are in the same trace: a collector puts them in order by it."""
    clocks = SimpleNamespace(time_ns=lambda: 1_800_000_000 * 10**9, monotonic=lambda: 110.0)
    monkeypatch.setattr(worker_tracing, "time", clocks)
    worker.ended(account())
    began = {span.name: (span.start_time or 0) / 1e9 - 1_800_000_000 for span in exporter.get_finished_spans()}
    assert began == {"stoker queue": -15.0, "stoker prefill": -9.5, "stoker decode": -9.0, "stoker generate": -10.0}


def test_a_job_that_made_tokens_says_how_many(worker: Tracing, exporter: InMemorySpanExporter) -> None:
    for tokens in (0, 30):
        made = account()
        made.tokens = tokens
        worker.ended(made)
    runs = [span.attributes or {} for span in exporter.get_finished_spans() if span.name == "stoker generate"]
    assert [run.get("stoker.tokens") for run in runs] == [None, 30]


def test_an_attempt_after_another_is_a_span_of_its_own_in_the_same_trace(
    worker: Tracing, exporter: InMemorySpanExporter
) -> None:
    worker.ended(account(end=DeliveryEnd.RETURNED))
    worker.ended(account(attempt=2))
    spans = exporter.get_finished_spans()
    runs = [span for span in spans if span.name == "stoker generate"]
    assert {trace_of(span) for span in spans} == {TRACE}
    assert [run.attributes and run.attributes["stoker.attempt"] for run in runs] == [1, 2]
    assert [run.attributes and run.attributes["stoker.outcome"] for run in runs] == ["returned", "succeeded"]
    assert {run.parent and f"{run.parent.span_id:016x}" for run in runs} == {"00f067aa0ba902b7"}


@pytest.mark.parametrize(
    "sent",
    ["", "nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", PARENT.traceparent + "x" * 9999, "ff-\ud800", "\0"],
)
def test_a_job_whose_trace_is_none_has_one_of_its_own(
    sent: str, worker: Tracing, exporter: InMemorySpanExporter
) -> None:
    worker.ended(account(Trace(sent, "=,=" * 9999)))
    spans = exporter.get_finished_spans()
    assert len(spans) == 4
    assert TRACE not in {trace_of(span) for span in spans}


def test_a_span_says_that_its_job_failed_without_its_words(worker: Tracing, exporter: InMemorySpanExporter) -> None:
    worker.ended(account(end=DeliveryEnd.FAILED))
    (run,) = [span for span in exporter.get_finished_spans() if span.name == "stoker generate"]
    assert run.status.status_code is StatusCode.ERROR
    assert run.attributes is not None
    assert run.attributes["error.type"] == "InvalidRequest"
    assert "secret" not in "".join(span.to_json() for span in exporter.get_finished_spans())


@pytest.mark.parametrize("end", DeliveryEnd)
def test_jobs_that_failed_and_dead_letters_are_errors_and_nothing_else_is(
    end: DeliveryEnd, worker: Tracing, exporter: InMemorySpanExporter
) -> None:
    worker.ended(account(end=end))
    bad = {span.name for span in exporter.get_finished_spans() if span.status.status_code is StatusCode.ERROR}
    assert bad == ({"stoker generate"} if end in (DeliveryEnd.FAILED, DeliveryEnd.DEAD) else set())


def test_a_worker_that_ends_sends_the_spans_that_wait(exporter: InMemorySpanExporter) -> None:
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
    worker = Tracing(provider, "w@here")
    worker.ended(account())
    assert exporter.get_finished_spans() == ()
    worker.close()
    assert len(exporter.get_finished_spans()) == 4


def test_a_delivery_with_nothing_to_do_has_no_span(worker: Tracing, exporter: InMemorySpanExporter) -> None:
    worker.ended(account(end=DeliveryEnd.DROPPED))
    assert exporter.get_finished_spans() == ()


def test_a_line_of_the_log_says_all_of_a_span(caplog: pytest.LogCaptureFixture) -> None:
    made = tracing("log", "w@here")
    with caplog.at_level(logging.INFO, "stoker.traces"):
        made.ended(account())
    made.close()
    fields = [getattr(record, FIELDS) for record in caplog.records]
    assert [field["name"] for field in fields] == ["stoker queue", "stoker prefill", "stoker decode", "stoker generate"]
    assert {field["trace"] for field in fields} == {TRACE}
    assert fields[3]["parent"] == "00f067aa0ba902b7"
    assert fields[1]["parent"] == fields[3]["span"]
    assert (fields[0]["seconds"], fields[3]["stoker.worker"]) == (pytest.approx(5.0), "w@here")


@pytest.mark.parametrize(
    ("to", "missing"),
    [("log", "opentelemetry.sdk.resources"), ("otlp", "opentelemetry.exporter")],
)
def test_a_worker_that_is_to_trace_and_cannot_says_what_to_install(
    to: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "workers.services.tracing", raising=False)
    with pytest.raises(ConfigError, match="pip install opentelemetry-"):
        observing.observers(Settings(traces=to), "w@here")


@pytest.mark.usefixtures("client")
def test_a_client_sends_the_place_of_its_span_and_waits_below_it(exporter: InMemorySpanExporter) -> None:
    with traces.sending(REQUEST, "job") as place:
        pass
    with traces.waiting("job", place):
        pass
    sent, waited = exporter.get_finished_spans()
    context = sent.get_span_context()
    assert context is not None
    assert place.traceparent.startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert waited.parent is not None
    assert waited.parent.span_id == waited.links[0].context.span_id == context.span_id
    assert job_record(REQUEST, "job", trace=place)["traceparent"] == place.traceparent
    assert "secret" not in sent.to_json()


@pytest.mark.usefixtures("client")
def test_an_error_while_sending_or_waiting_ends_the_span_without_its_words(exporter: InMemorySpanExporter) -> None:
    for opened in (traces.sending(REQUEST, "job"), traces.waiting("job", traces.NONE)):
        with pytest.raises(InvalidRequest), opened:
            raise InvalidRequest("'a secret prompt' given")
    for span in exporter.get_finished_spans():
        assert span.status.status_code is StatusCode.ERROR
        assert "secret" not in span.to_json()
    assert len(exporter.get_finished_spans()) == 2


@pytest.mark.usefixtures("client")
def test_a_wait_within_a_callers_own_span_is_below_that(exporter: InMemorySpanExporter) -> None:
    own = trace.SpanContext(int(TRACE, 16) + 1, 7, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(own)), traces.waiting("job", PARENT):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent == own
    assert [link.context.trace_id for link in span.links] == [int(TRACE, 16)]


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "stoker-worker"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine"}, "mine"),
    ],
)
def test_a_worker_has_the_name_that_opentelemetrys_own_variables_give_it(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    made: list[Resource] = []

    def provider(resource: Resource) -> TracerProvider:
        made.append(resource)
        return TracerProvider(resource=resource)

    monkeypatch.setitem(tracing.__globals__, "TracerProvider", provider)
    tracing("log", "w@here").close()
    assert [resource.attributes["service.name"] for resource in made] == [name]


@pytest.mark.usefixtures("client")
def test_a_stream_that_its_reader_leaves_is_no_error(exporter: InMemorySpanExporter) -> None:
    def stream() -> Iterator[int]:
        with traces.waiting("job", PARENT):
            yield 1
            yield 2

    left = stream()
    assert next(left) == 1
    left.close()  # type: ignore[attr-defined]
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is not StatusCode.ERROR
    assert "error.type" not in (span.attributes or {})


@pytest.mark.usefixtures("client")
def test_a_callers_own_state_of_a_trace_travels_up_to_its_limit() -> None:
    state = trace.TraceState([(f"vendor-{number}", "x" * 200) for number in range(4)])
    above = trace.SpanContext(int(TRACE, 16), 7, is_remote=True, trace_state=state)
    with trace.use_span(trace.NonRecordingSpan(above)), traces.sending(REQUEST, "job") as sent:
        assert sent.traceparent[3:35] == TRACE
        assert sent.tracestate.startswith("vendor-0=xxx")
        assert len(sent.tracestate) == traces.LONGEST


def test_a_client_without_a_tracer_sends_no_trace() -> None:
    assert trace.get_tracer_provider() is not None, "the API is there, and nobody has set it up"
    with traces.sending(REQUEST, "job") as place, traces.waiting("job", place):
        assert place == traces.NONE
    assert "traceparent" not in job_record(REQUEST, "job", trace=place)


def test_a_callers_own_span_is_carried_on_where_the_api_alone_is_there() -> None:
    above = trace.SpanContext(int(TRACE, 16), 7, is_remote=True)
    with trace.use_span(trace.NonRecordingSpan(above)), traces.sending(REQUEST, "job") as sent:
        assert sent.traceparent[3:35] == TRACE


def test_where_the_api_alone_is_there_no_span_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(trace.ProxyTracer, "start_span", lambda *asked, **_: made.append(asked))
    with traces.sending(REQUEST, "job") as place, traces.waiting("job", place):
        assert made == []


def test_nobody_who_does_not_trace_imports_opentelemetry() -> None:
    code = (
        "import sys; from stoker import Client; from stoker import traces; from stoker.client.requests import "
        "generate_request as made\nwith traces.sending(made('m', 'x', 0, {}), 'job') as place: pass\n"
        "with traces.waiting('job', place): pass\n"
        "import workers.services.observing as o; from stoker.settings import Settings; o.observers(Settings(), 'w')\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_client_remembers_so_many_traces_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "REMEMBERED", 2)
    sent = traces.Sent()
    for name in ("a", "b", "c"):
        sent.remember(name, PARENT)
    sent.remember("untraced", traces.NONE)
    assert [sent.of(name) == PARENT for name in ("a", "b", "c", "untraced")] == [False, True, True, False]


def test_a_dead_letter_that_is_sent_again_stays_in_its_trace_and_counts_on(broker: Settings) -> None:
    redis: Any = connect(broker)
    record = job_record(REQUEST, "job", trace=PARENT)
    ledger.submit(redis, "job", record)
    first = ledger.claim(redis, "job", record.queue, "one", "tag", "w")
    assert (first.traceparent, first.tracestate, first.attempt) == (PARENT.traceparent, "vendor=1", 1)
    ledger.dead_letter(redis, "job", record.queue, "one", "w", "its disk is full")
    ledger.complete(redis, "job", record.queue, "one", ledger.failure("job", ValueError()))
    ledger.submit(redis, "job", job_record(REQUEST, "job"), revive=True)
    again = ledger.claim(redis, "job", record.queue, "two", "another", "w")
    assert (again.state, again.traceparent, again.attempt) == ("run", PARENT.traceparent, 2)
    redis.close()


def test_no_span_ends_before_it_begins(worker: Tracing, exporter: InMemorySpanExporter) -> None:
    """Two clocks may differ, and a phase that a cancel broke off may have no end of its own."""
    odd = account()
    odd.phases = [Phase("prefill", 101.0, 100.5)]
    worker.ended(odd)
    assert all(seconds(span) >= 0 for span in exporter.get_finished_spans())

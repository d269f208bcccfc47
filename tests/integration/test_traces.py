"""One trace through client, broker and worker. The worker reports its spans in its log."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stoker import Client
from stoker.local.stack import Stack
from tests import endless
from tests.conftest import EMBED_MODEL, wait_until
from tests.integration.machinery import logged

pytestmark = pytest.mark.integration

#: What a worker does for a job of each kind, in order.
WORK = {
    "generate": ["claim", "load", "engine queue", "prefill", "decode", "publish", "finish", "complete"],
    "embed": ["claim", "load", "engine queue", "embed", "publish", "finish", "complete"],
    "train": ["claim", "load", "engine queue", "train", "publish", "finish", "complete"],
    "adapters": ["claim", "load", "engine queue", "load adapter", "publish", "finish", "complete"],
}


@pytest.fixture
def spans_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The spans of this process."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def ids(span: ReadableSpan) -> tuple[str, str, str | None]:
    context, parent = span.get_span_context(), span.parent
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", None if parent is None else f"{parent.span_id:016x}"


def of_worker(stack: Stack, job_id: str) -> list[dict[str, Any]]:
    """The spans of a job's trace at the worker; none before its last is there."""
    lines = logged(stack.settings.logs / "worker.log")
    spans = [line for line in lines if line.get("event") == "span"]
    traces = {span["trace"] for span in spans if span.get("stoker.job") == job_id and "stoker.outcome" in span}
    return [span for span in spans if span["trace"] in traces]


@pytest.mark.parametrize("kind", WORK)
def test_a_job_of_each_kind_has_all_its_spans_in_one_trace(
    kind: str, stack: Stack, client: Client, spans_here: InMemorySpanExporter
) -> None:
    if kind == "generate":
        job: Any = client.generate("Once upon a time", model=endless.MODEL, max_tokens=3)
    elif kind == "embed":
        job = client.embed(["a warm model"], model=EMBED_MODEL)
    else:
        rows = [{"text": "Steam lifts the piston."}]
        job = client.train("traced", rows, model=endless.MODEL, steps=1, batch_size=1, max_length=32)
    job.result(60)
    if kind == "adapters":
        folder = stack.settings.adapters / endless.MODEL / "traced"
        spans_here.clear()
        job = client.adapters.load("traced-again", next(folder.iterdir()), model=endless.MODEL)
        job.result(60)
    sent, waited = spans_here.get_finished_spans()
    assert [sent.name, waited.name] == ["stoker send", "stoker wait"]
    (trace_id, root, above), (its_trace, _, below) = ids(sent), ids(waited)
    assert (above, its_trace, below) == (None, trace_id, root)
    spans = wait_until(lambda: of_worker(stack, job.id), "the worker's spans")
    assert {span["trace"] for span in spans} == {trace_id}
    by_name = {span["name"].removeprefix("stoker "): span for span in spans if span["parent"] == root}
    assert set(by_name) == {"queue", kind}
    run = by_name[kind]
    assert (run["stoker.attempt"], run["stoker.outcome"], run["stoker.model"]) == (1, "succeeded", job_model(kind))
    steps = sorted((span for span in spans if span["parent"] == run["span"]), key=lambda span: span["began"])
    assert [span["name"].removeprefix("stoker ") for span in steps] == WORK[kind]
    assert len(spans) == 2 + len(steps)
    assert all(run["began"] - 1e-3 <= span["began"] <= run["began"] + run["seconds"] + 1e-3 for span in steps)


def job_model(kind: str) -> str:
    return EMBED_MODEL if kind == "embed" else endless.MODEL


def test_a_callers_own_span_is_above_both(stack: Stack, client: Client, spans_here: InMemorySpanExporter) -> None:
    with trace.get_tracer("app").start_as_current_span("request") as request:
        job = client.generate("Once upon a time", model=endless.MODEL, max_tokens=2)
        tokens = list(job.stream(timeout=60))
    assert len(tokens) == 2
    mine = request.get_span_context().span_id
    spans = {span.name: span for span in spans_here.get_finished_spans()}
    assert {ids(spans[name])[2] for name in ("stoker send", "stoker wait")} == {f"{mine:016x}"}
    assert [link.context.span_id for link in spans["stoker wait"].links] == [int(ids(spans["stoker send"])[1], 16)]
    assert wait_until(lambda: of_worker(stack, job.id), "the worker's")[0]["trace"] == ids(spans["request"])[0]

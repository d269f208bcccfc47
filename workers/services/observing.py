"""Who observes the jobs at this worker, by its settings."""

from __future__ import annotations

from stoker.errors import ConfigError
from stoker.settings import Settings
from workers.account import Observer, Observers
from workers.services.joblog import JobLog


def observers(settings: Settings, worker: str, *others: Observer) -> Observers:
    """Raises `ConfigError`."""
    return Observers([JobLog(), *others, *_tracing(settings, worker)])


def _tracing(settings: Settings, worker: str) -> list[Observer]:
    if settings.traces == "off":
        return []
    try:
        # The SDK is loaded by workers that trace, alone.
        from workers.services.tracing import tracing
    except ImportError:
        raise ConfigError(
            f"STOKER_TRACES: {settings.traces} given, and OpenTelemetry is missing: pip install opentelemetry-sdk, for "
            "otlp opentelemetry-exporter-otlp-proto-http too."
        ) from None
    return [tracing(settings.traces, worker)]

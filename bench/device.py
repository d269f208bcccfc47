"""What a GPU does while something runs, as torch's profiler sees it: it sees MLX's kernels too, in its own process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

#: Of the trace's events, those of the device.
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def traced(run: Callable[[], object]) -> tuple[int, float] | None:
    """How often the device was given work, and the milliseconds that it worked, while `run` ran and was waited for.
    None where torch is not installed or sees nothing."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text("utf-8"))["traceEvents"]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in _ON_DEVICE]
    return (len(spans), busy(spans) / 1000) if spans else None


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The time that at least one of these spans covers."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total

"""Which tests run in one process, and in which order: what `make test` shares out to its processes."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

#: Rooms in the order in which they run; the others follow. The engine's go first. On a new machine each fused loop is
#: compiled once, and every process that meets it before that compiles it too: the storm and the stacks, with a worker
#: each or more, find them on disk. Then come the rooms with long tests, so that at the end, where one process may wait
#: for the other, all are short.
FIRST = ("engine", "integration", "chaos", "fuzz", "docs", "kernels")

#: Files that use a shared stack, by the fixtures of these stacks, go to one process: in two it would be started twice,
#: and a worker that waits takes a fiftieth of a core until the end of the run.
TOGETHER = {
    ("quick_stack",): (
        "tests/integration/test_adapters.py",
        "tests/integration/test_bad_input.py",
        "tests/integration/test_logs.py",
        "tests/integration/test_metrics.py",
        "tests/integration/test_monitor.py",
        "tests/integration/test_queue.py",
        "tests/integration/test_streams.py",
        "tests/integration/test_traces.py",
        "tests/integration/test_training.py",
    ),
    ("real_stack", "renamed_stack"): (
        "tests/docs/test_examples.py",
        "tests/gateway/test_fine_tuning.py",
        "tests/gateway/test_real.py",
        "tests/gateway/test_real_batches.py",
        "tests/gateway/test_worker.py",
        "tests/integration/test_bulk.py",
        "tests/integration/test_main_job.py",
    ),
}
#: The unit of each of these stacks.
STACKS = {stack: " and ".join(stacks) for stacks in TOGETHER for stack in stacks}
_UNIT_OF = {file: STACKS[stacks[0]] for stacks, files in TOGETHER.items() for file in files}


def unit_of(file: str) -> str:
    """What goes to one process together with this file: the tests of the unit that it is in, else its own."""
    return _UNIT_OF.get(file, file)


def place(item: pytest.Item) -> tuple[int, str]:
    """Where a test comes: room by room; what uses a shared stack behind what starts stacks of its own."""
    unit = _UNIT_OF.get(item.nodeid.partition("::")[0], "")
    room = "integration" if unit else item.path.parent.name
    return (*FIRST, room).index(room), unit


class ByUnit(LoadFileScheduling):
    """A file goes to one process, and with it what shares its stack."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(super()._split_scope(nodeid))


def import_in_turn(config: pytest.Config) -> None:
    """On a new checkout each process would rewrite the asserts of all files, all in one order: each begins at another
    file instead, and finds on disk what the others have rewritten."""
    own, tests = getattr(config, "workerinput", None), Path(__file__).parent
    if own is None or [Path(given).resolve() for given in config.args] != [tests]:
        return
    files = sorted(tests.rglob("test_*.py"))
    first = len(files) * int(own["workerid"].removeprefix("gw")) // own["workercount"]
    for file in files[first:]:
        # What cannot be imported, or is skipped, the collection says.
        with suppress(Exception, pytest.skip.Exception):
            import_module(".".join(file.relative_to(tests.parent).with_suffix("").parts))

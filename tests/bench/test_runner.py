"""The runner gives each benchmark a process, a limit and quiet, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import runner
from bench.report import COMMIT, RESULTS
from bench.runner import ON_CPU, ON_GPU, Bench, Change, Ran, committed, compared, page
from bench.surroundings import Finding

QUIET = [Finding("other programs keep 0.0 of 2 cores busy")]
LOADED = [Finding("other programs keep 1.6 of 2 cores busy", disturbs=True)]
RATIO = "1 stream, decode, against mlx-lm"


def entry(name: str, p50: float, spread: float = 0.1, unit: str = "times", **more: Any) -> dict[str, Any]:
    return {"name": name, "unit": unit, "p20": p50 - spread, "p50": p50, "p80": p50 + spread, "samples": 5, **more}


def ran(*rows: dict[str, Any], before: list[Finding] = QUIET, failure: str = "", **head: Any) -> Ran:
    return Ran("generate", 12.0, failure, before, QUIET, {"machine": "x", "cores": 2, **head, "rows": list(rows)})


def test_no_row_of_a_disturbed_benchmark_is_judged() -> None:
    row = entry(RATIO, 1.4, aim="at least 1.25", met=True)
    (quiet,), (disturbed,) = ran(row).rows, ran(row, before=LOADED).rows
    assert quiet["met"] is True
    assert disturbed["met"] is None
    said = page({}, [ran(row, before=LOADED)], [])
    assert "Disturbed, so no aim is judged: other programs keep 1.6 of 2 cores busy." in said
    assert f"| {RATIO} | not said (1.30 to 1.50) | times | at least 1.25 | not judged |" in said
    kept = ran(row, before=LOADED).as_json()
    assert kept["surroundings"]["before"][0]["disturbs"] is True


def test_rows_are_compared_with_the_committed_ones_beyond_their_spread() -> None:
    old = {
        "machine": "x",
        "cores": 2,
        "rows": [entry("a", 1.0), entry("b", 1.0), entry("c", 5.0, unit="ms"), {"name": "d"}],
    }
    now = ran(entry("a", 1.3), entry("b", 1.1), entry("c", 4.0, unit="ms"), entry("d", 1.0), entry("new", 1.0))
    assert [(change.row, change.way) for change in compared(now, old)] == [
        ("a", "rose"),
        ("b", "within the spread"),
        ("c", "fell"),
    ]
    other = compared(now, {**old, "machine": "y"})
    assert [change.row for change in other] == ["a", "b"], "of another machine ratios alone"


def test_the_page_shows_what_was_met_missed_moved_and_failed() -> None:
    rows = [
        entry(RATIO, 1.4, aim="at least 1.25", met=True, launches=200, device_ms=1.5),
        entry("b", 0.8, aim="at least 1", met=False),
        {"name": "many", "error": "ValueError: no"},
    ]
    moved = Change("generate", "b", "times", 1.2, 0.8, "fell")
    said = page({"commit": "abc"}, [ran(*rows, failure="exit code 1")], [moved])
    assert "commit abc" in said
    assert "12 s, exit code 1." in said
    assert f"| {RATIO} | 1.40 (1.30 to 1.50), 200 launches, device 1.50 ms | times | at least 1.25 | yes |" in said
    assert "| b | 0.80 (0.70 to 0.90) | times | at least 1 | **no** |" in said
    assert "| many | ValueError: no | | | |" in said
    assert "| generate | b | 1.20 | 0.80 times | fell |" in said


BENCH = """
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
if "--slow" in sys.argv:
    time.sleep(60)
row = {"name": "x", "unit": "s", "p20": 1, "p50": 1, "p80": 1, "samples": 1}
(out / "one.json").write_text(json.dumps({"commit": os.environ["BENCH_COMMIT"], "rows": [row]}))
sys.exit("--fails" in sys.argv)
"""


@pytest.fixture
def benches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Quiet, and with a benchmark of one row."""
    (tmp_path / "a_bench.py").write_text(BENCH, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(COMMIT, "abc1234")
    monkeypatch.setattr(runner, "settle", lambda *_: QUIET)
    monkeypatch.setattr(runner, "Meanwhile", lambda: type("Nothing", (), {"findings": lambda self: []})())
    return tmp_path / "out"


def test_a_run_writes_one_file_and_a_page(benches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ON_CPU", (Bench("one", "a_bench", 30, 30), Bench("long", "a_bench", 30, None)))
    assert runner.main(["--out", str(benches), "--quick", "--commit", "def5678"]) == 0
    said = json.loads((benches / "all.json").read_text("utf-8"))
    assert (said["commit"], said["quick"], list(said["benches"])) == ("def5678", True, ["one"])
    one = said["benches"]["one"]
    assert (one["commit"], one["failure"]) == ("def5678", "")
    assert one["surroundings"]["before"][0]["text"] == QUIET[0].text
    assert one == json.loads((benches / "one.json").read_text("utf-8"))
    assert "## one" in (benches / "all.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "limit", "failure"),
    [(("--fails",), 30, "exit code 1"), (("--slow",), 0, "ended after 0 s, its limit")],
)
def test_one_that_fails_or_takes_too_long_is_said(
    benches: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], limit: int, failure: str
) -> None:
    monkeypatch.setattr(runner, "ON_CPU", (Bench("one", "a_bench", limit, limit, arguments),))
    assert runner.main(["--out", str(benches)]) == 1
    said = json.loads((benches / "all.json").read_text("utf-8"))
    assert said["benches"]["one"]["failure"] == failure


def test_the_committed_rows_are_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        runner.asked(["--out", str(RESULTS)])
    assert "name another folder" in capsys.readouterr().err


def test_every_benchmark_that_runs_is_one_and_has_committed_rows() -> None:
    folder = Path(runner.__file__).parent
    for bench in (*ON_CPU, *ON_GPU):
        assert (folder / f"{bench.module.removeprefix('bench.')}.py").exists()
    assert {bench.name for bench in (*ON_CPU, *ON_GPU)} <= set(committed())

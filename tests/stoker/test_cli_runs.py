"""`stoker runs`, on folders as the engine writes them."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker.cli import app
from stoker.contract import TrainReport
from stoker.errors import ConfigError, InvalidRequest
from stoker.local.runs import MAX_FACTS, MAX_LOG, read_run
from stoker.settings import load_settings

REPORT = {"loss": 1.0, "learning_rate": 1e-3, "held_out_loss": None, "note": ""}


@pytest.fixture
def run() -> Path:
    """One that is at its third step, the fourth on its way to disk."""
    folder = load_settings().runs / "job-1"
    folder.mkdir(parents=True)
    request = {"name": "style", "dataset": "dataset:job-1", "steps": 10, "rank": 8}
    (folder / "run.json").write_text(json.dumps({"request": request, "status": "running"}))
    reports = [
        TrainReport(
            index=step,
            step=step + 1,
            steps=10,
            loss=3.0 - step,
            learning_rate=1e-3,
            gradient_norm=1.0,
            tokens=9,
            tokens_per_second=1.0,
            held_out_loss=2.5 if step == 1 else None,
            note="rolled back" if step == 2 else "",
        ).model_dump_json()
        for step in range(4)
    ]
    (folder / "log.jsonl").write_text("\n".join(reports)[:-9])
    return folder


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, ["runs", *words], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("run")
def test_runs_are_listed_and_shown_as_far_as_they_are() -> None:
    assert "job-1" in invoke("list")
    assert "step 3/10" in invoke("list")
    shown = invoke("show", "job-1")
    assert "job-1: running" in shown
    assert "loss 2.0000  held out 2.5000" in shown
    assert "rolled back" in shown
    assert [report["step"] for report in json.loads(invoke("show", "job-1", "--json"))["reports"]] == [1, 2, 3]
    assert json.loads(invoke("list", "--json"))[0]["status"] == "running"


def test_of_a_long_run_some_losses_are_shown_from_its_first_steps_to_its_last(run: Path) -> None:
    (run / "log.jsonl").write_text("".join(json.dumps(REPORT | {"step": step}) + "\n" for step in range(1, 201)))
    steps = [int(line.split()[1]) for line in invoke("show", "job-1").splitlines() if line.startswith("  step ")]
    assert len(steps) == 20
    assert steps[0] == 1
    assert steps[-1] > 190


@pytest.mark.parametrize("name", ["job-2", "../job-1", "."])
@pytest.mark.usefixtures("run")
def test_a_run_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(InvalidRequest, match="on this machine there are: job-1"):
        invoke("show", name)


def test_no_run_is_no_error() -> None:
    assert invoke("list") == ""


def test_a_plot_that_a_full_disk_does_not_take_leaves_the_former_picture_and_no_half_of_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure", reason="pip install '.[plot]'")

    def savefig(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figures.Figure, "savefig", savefig)
    (tmp_path / "loss.png").write_bytes(b"former")
    with pytest.raises(InvalidRequest, match=r"loss.png: cannot be written .*No space left"):
        invoke("plot", "job-1", "-o", str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").read_bytes() == b"former"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["loss.png"]


def test_a_plot_is_drawn_or_says_what_it_needs(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "loss.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ConfigError, match=r"pip install '\.\[plot\]', from a checkout"):
            invoke("plot", "job-1", "-o", str(out))
        return
    assert invoke("plot", "job-1", "-o", str(out)) == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


GOOD = '{"request": {"name": "style", "steps": 10}, "status": "done"}'
#: What another program left in a run's folder → what the one line says of it.
SPOILED = {
    "": "not JSON",
    "[]": "a list given",
    "[" * 100_000: "not JSON",
    "\xff": "not JSON",
    "1" * 5000: "not JSON",
    '{"request": 3, "status": "done"}': "request is '3'",
    '{"request": {"name": ["a"], "steps": 1}, "status": "done"}': "name is",
    '{"request": {"name": "a"}, "status": "done"}': "no steps",
    '{"request": {"name": "a", "steps": "many"}, "status": "done"}': "steps is 'many'",
    '{"request": {"name": "a", "steps": true}, "status": "done"}': "steps is 'True'",
    '{"request": {"name": "a", "steps": 1}, "status": null}': "status is 'None'",
}


def spoil(name: str, content: str, log: str | None = None) -> None:
    folder = load_settings().runs / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(content.encode("latin-1"))
    if log is not None:
        (folder / "log.jsonl").write_text(log)


@pytest.mark.usefixtures("run")
def test_a_run_that_cannot_be_read_is_one_line_and_hides_no_other() -> None:
    for number, content in enumerate(SPOILED):
        spoil(f"bad-{number}", content)
    spoil("bad-log-1", GOOD, "3\n")
    spoil("bad-log-2", GOOD, '{"step": 1}\n')
    (load_settings().runs / "bad-folder" / "run.json").mkdir(parents=True)
    (load_settings().runs / "bad-pipe").mkdir()
    os.mkfifo(load_settings().runs / "bad-pipe" / "run.json")
    (load_settings().runs / "bad-link").mkdir()
    (load_settings().runs / "bad-link" / "run.json").symlink_to("run.json")
    result = CliRunner().invoke(app, ["runs", "list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["job-1"]
    said = result.stderr.splitlines()
    assert len(said) == len(SPOILED) + 5
    for number, cause in enumerate(SPOILED.values()):
        assert [cause in line for line in said if f"/bad-{number}/run.json" in line] == [True]
    assert json.loads(CliRunner().invoke(app, ["runs", "list", "--json"]).stdout)[0]["run"] == "job-1"


@pytest.mark.parametrize(("name", "most"), [("run.json", MAX_FACTS), ("log.jsonl", MAX_LOG)])
def test_a_file_of_a_run_that_would_fill_the_memory_is_not_read(run: Path, name: str, most: int) -> None:
    os.truncate(run / name, most + 1)
    with pytest.raises(InvalidRequest, match=f"{name}: {most + 1} bytes; at most {most} are read"):
        read_run(run)


@pytest.mark.usefixtures("run")
def test_a_run_is_found_next_to_one_that_cannot_be_read() -> None:
    spoil("bad", "[]")
    assert "job-1: running" in invoke("show", "style")
    with pytest.raises(InvalidRequest, match=r"there are: job-1 \(style\)\.\n.*/bad/run.json: a list given"):
        invoke("show", "zz")
    with pytest.raises(InvalidRequest, match=r"/bad/run\.json: a list given"):
        invoke("plot", "bad", "-o", "x.png")

"""`stoker runs`, on folders as the engine writes them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker.cli import app
from stoker.contract import TrainReport
from stoker.errors import ConfigError, InvalidRequest
from stoker.settings import load_settings


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


@pytest.mark.parametrize("name", ["job-2", "../job-1", "."])
@pytest.mark.usefixtures("run")
def test_a_run_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(InvalidRequest, match="on this machine there are: job-1"):
        invoke("show", name)


def test_no_run_is_no_error() -> None:
    assert invoke("list") == ""


def test_a_plot_is_drawn_or_says_what_it_needs(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "loss.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ConfigError, match=r"pip install 'stoker\[plot\]'"):
            invoke("plot", "job-1", "-o", str(out))
        return
    assert invoke("plot", "job-1", "-o", str(out)) == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")

"""`stoker runs`: the training runs whose folders are under STOKER_HOME."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from stoker.cli.options import Json, print_json
from stoker.contract.names import Rule, follows
from stoker.errors import ConfigError, InvalidRequest
from stoker.settings import load_settings

RunId = Annotated[str, typer.Argument(help="As `stoker runs list` shows it: the job's id.", metavar="RUN")]


def list_runs(as_json: Json = False) -> None:
    """List the runs on this machine, newest first."""
    found = sorted(_runs(), key=lambda run: run["changed"], reverse=True)
    if as_json:
        print_json(found)
        return
    for run in found:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["changed"]))
        asked = run["request"]
        progress = f"step {run['reports'][-1]['step'] if run['reports'] else 0}/{asked['steps']}"
        print(f"{run['run']}  {when}  {asked['name']:20} {progress:16} {run['status']}")


def show(run: RunId, as_json: Json = False) -> None:
    """Show a run: what was asked, and its losses."""
    found = _read(_folder(run))
    if as_json:
        print_json(found)
        return
    asked = found["request"]
    print(f"{run}: {found['status']}")
    print("  " + ", ".join(f"{name} {value}" for name, value in asked.items() if name not in ("name", "dataset")))
    reports = found["reports"]
    for report in reports[:: max(1, len(reports) // 20)]:
        held_out = report.get("held_out_loss")
        said = "" if held_out is None else f"  held out {held_out:.4f}"
        print(f"  step {report['step']:6}  loss {report['loss']:.4f}{said}  rate {report['learning_rate']:.3g}")
    for report in reports:
        if report["note"]:
            print(f"  {report['note']}")


def plot(
    run: RunId, out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write; its suffix says which kind.")]
) -> None:
    """Draw a run's losses and learning rate."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed: pip install 'stoker[plot]'.") from None
    reports = _read(_folder(run))["reports"]
    if not reports:
        raise InvalidRequest(f"run {run!r}: no step of it has been reported yet.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([report["step"] for report in reports], [report["loss"] for report in reports], label="loss")
    held_out = [report for report in reports if report["held_out_loss"] is not None]
    if held_out:
        losses = [report["held_out_loss"] for report in held_out]
        axes.plot([report["step"] for report in held_out], losses, "o-", label="held-out loss")
    axes.set(xlabel="step", ylabel="loss (nats)", title=run)
    rates = axes.twinx()
    rates.plot(
        [report["step"] for report in reports], [report["learning_rate"] for report in reports], color="grey", alpha=0.5
    )
    rates.set_ylabel("learning rate")
    axes.legend()
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{out}: cannot be written ({error}).") from None
    print(out)


def _folder(run: str) -> Path:
    folder = load_settings().runs / run
    if not follows(Rule.JOB_ID, run) or not (folder / "run.json").is_file():
        known = ", ".join(found["run"] for found in _runs()) or "none"
        raise InvalidRequest(f"run {run!r} given; on this machine there are: {known}.")
    return folder


def _runs() -> Iterator[dict[str, Any]]:
    root = load_settings().runs
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if (folder / "run.json").is_file():
            yield _read(folder)


def _read(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text())
        lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True) if (folder / "log.jsonl").exists() else []
        # The last line may be on its way.
        reports = [json.loads(line) for line in lines if line.endswith(b"\n")]
        changed = (folder / "run.json").stat().st_mtime
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{folder}: cannot be read ({error}).") from None
    return {"run": folder.name, "changed": changed, **found, "reports": reports}

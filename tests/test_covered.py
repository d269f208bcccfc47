"""`make coverage`: the figures of the packages, and the least that is accepted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import covered
from tests.covered import ROOT, Share


def report(**files: tuple[int, int]) -> dict[str, Any]:
    """`files`: path with `__` for each slash → statements, and how many of them were run."""
    return {
        "files": {
            name.replace("__", "/") + ".py": {
                "summary": {
                    "num_statements": lines, "covered_lines": run, "missing_lines": lines - run,
                    "num_branches": 4, "covered_branches": 1,
                }
            }
            for name, (lines, run) in files.items()
        }
    }  # fmt: skip


def test_lines_add_up_by_package_and_a_path_from_the_root_counts_too() -> None:
    found = covered.shares(report(stoker__a=(10, 9), stoker__b=(30, 21), engine__c=(8, 8), bench__d=(99, 0)))
    assert found["stoker"] == Share(40, 30, 8, 2)
    assert (found["stoker"].percent, found["engine"].percent, found["tasks"].percent) == (75.0, 100.0, 100.0)
    absolute = {"files": {str(ROOT / "workers/x.py"): report(x=(5, 1))["files"]["x.py"]}}
    assert covered.shares(absolute)["workers"] == Share(5, 1, 4, 1)


@pytest.mark.parametrize(("run", "fails"), [(89, True), (90, False)])
def test_below_the_least_share_of_lines_is_a_failure(
    run: int, fails: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(covered, "read", lambda: report(stoker__a=(60, 60), engine__b=(40, run - 60)))
    if fails:
        with pytest.raises(SystemExit, match=r"89\.0 % of the lines were run; at least 90 % are wanted"):
            covered.main()
    else:
        covered.main()
    assert f"{100 - run:4} lines of engine/b.py" in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_process_ran_is_read_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    code = "import stoker.contract.names as names; names.follows(names.Rule.NAME, 'x')"
    command = [
        sys.executable,
        "-m",
        "coverage",
        "run",
        "--rcfile",
        str(ROOT / "pyproject.toml"),
        "--data-file",
        str(data),
    ]
    (tmp_path / "program.py").write_text(code, encoding="utf-8")
    subprocess.run([*command, str(tmp_path / "program.py")], check=True, cwd=ROOT)
    assert len(list(tmp_path.glob("data.*"))) == 1, "each process has data of its own"
    found = covered.shares(covered.read(str(data)))
    assert 0 < found["stoker"].percent < 90
    assert found["engine"].run == 0

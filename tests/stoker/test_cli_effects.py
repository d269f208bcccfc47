"""What commands show and do, on a client in memory or a real broker: each option's effect, and not just its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker import Client
from stoker.broker import keys, ledger
from stoker.cli import embed as embed_command
from stoker.cli.generate import describe
from stoker.contract import GenerateResult, Usage
from stoker.errors import InvalidRequest, JobFailed
from stoker.files import output as output_module
from stoker.files.durable import DRAFT
from stoker.local import storage
from stoker.settings import load_settings
from stoker.testing import FakeClient
from tests.stoker.test_client_core import fake, server
from tests.stoker.test_housekeeping import DAY, invoke, make_run

__all__ = ["fake", "server"]


def test_a_speed_is_that_of_the_tokens_behind_the_first() -> None:
    usage = Usage(worker="w1", completion_tokens=11, run_seconds=3.0, first_token_seconds=1.0)
    result = GenerateResult(text="", token_ids=(), finish_reason="length", model="m", adapter=None, usage=usage)
    assert describe(result) == "11 tokens, 5.0 tokens/s, first after 1.00 s, length, on w1"
    at_once = usage.model_copy(update={"run_seconds": 1.0})
    assert describe(result.model_copy(update={"usage": at_once})).startswith("11 tokens, first after")


def test_jobs_are_listed_with_what_they_do(fake: Callable[[], Client], server: Any) -> None:
    with fake() as client:
        runs, waits = client.embed(["a"], model="mini"), client.embed(["b"], model="mini", priority=3)
        ledger.claim(server, runs.id, keys.queue("mini", "embed"), "token", "tag", "worker-1")
        shown = {line.split()[0]: line for line in invoke("jobs", "list").splitlines()}
    assert "running on worker-1" in shown[runs.id]
    assert "priority 3, waiting" in shown[waits.id]
    assert {line.split()[2] for line in shown.values()} == {"mini"}


@pytest.mark.usefixtures("fake")
def test_a_rule_is_set_shown_and_goes_back_to_its_default(fake: Callable[[], Client]) -> None:
    fake()
    before = json.loads(invoke("jobs", "policy", "--json"))
    assert json.loads(invoke("jobs", "policy", "ageing", "60", "--json")) == before | {"ageing": 60}
    assert json.loads(invoke("jobs", "policy", "--json"))["ageing"] == 60
    assert json.loads(invoke("jobs", "policy", "ageing", "default", "--json")) == before
    with pytest.raises(InvalidRequest, match=r"'1\.5' given; expected a whole number, or 'default'"):
        invoke("jobs", "policy", "ageing", "1.5")
    with pytest.raises(InvalidRequest, match="a name without a value"):
        invoke("jobs", "policy", "ageing")


@pytest.mark.usefixtures("fake")
def test_a_file_that_was_interrupted_goes_on_behind_its_last_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each text's vector is its number, so that one in a wrong row is seen."""
    client = FakeClient(models={"m": ["embed"]})
    monkeypatch.setattr(embed_command, "connect", lambda url: client)
    monkeypatch.setattr(output_module, "SAFE_EVERY", 0.0)
    (tmp_path / "in.txt").write_text("".join(f"{number}\n" for number in range(10)))
    words = ("embed", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy"), "--batch", "2", "--in-flight", "1")
    client.script.embed(lambda request: [[float(text)] * 4 for text in request.texts], times=3)
    client.script.embed(error=JobFailed("away"), times=3)
    with pytest.raises(JobFailed):
        invoke(*words)
    client.script.embed(lambda request: [[float(text)] * 4 for text in request.texts], times=None)
    said = json.loads(invoke(*words, "--json"))
    assert (said["rows"], said["resumed"], said["dim"]) == (10, 6, 4)
    assert np.load(tmp_path / "out.npy")[:, 0].tolist() == [float(number) for number in range(10)]
    with pytest.raises(InvalidRequest, match="is there already"):
        invoke(*words)


def test_runs_are_listed_newest_first() -> None:
    for run, age in (("aa", 3), ("bb", 1), ("cc", 2)):
        make_run(run, age=age * DAY)
    assert [line.split()[0] for line in invoke("runs", "list").splitlines()] == ["bb", "cc", "aa"]
    assert [run["run"] for run in json.loads(invoke("runs", "list", "--json"))] == ["bb", "cc", "aa"]


def test_a_dry_run_counts_drafts_and_keeps_them() -> None:
    folder = load_settings().home / "adapters"
    folder.mkdir(parents=True)
    draft = folder / f"{DRAFT}left-by-a-dead-writer"
    draft.write_text("half")
    assert json.loads(invoke("clean", "--dry-run", "--json"))["drafts"] == 1
    assert draft.exists()
    assert json.loads(invoke("clean", "--json"))["drafts"] == 1
    assert not draft.exists()


def test_what_a_link_among_the_logs_names_is_no_log(tmp_path: Path) -> None:
    logs = load_settings().logs
    logs.mkdir(parents=True)
    (tmp_path / "own.txt").write_text("mine")
    (logs / "link.log").symlink_to(tmp_path / "own.txt")
    (logs / "old.log").write_text("old")
    far = 10**10
    assert [left.path.name for left in storage.leftovers(load_settings(), far)] == ["old.log"]

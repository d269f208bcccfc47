"""A worker and a client under the users of `deploy/acl`: all kinds of jobs, and nothing is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker import Client
from stoker.broker import keys
from stoker.cli import app
from stoker.errors import JobCancelled
from stoker.local.stack import Stack
from tests.conftest import stack_settings, wait_until
from tests.stoker.acl import guarded_broker

pytestmark = pytest.mark.integration

MODELS = Path(__file__).parent.parent / "goldens" / "architectures"


def test_every_kind_of_job_runs_under_the_users_of_the_template(tmp_path: Path) -> None:
    models = (f"tiny={MODELS / 'llama-linear'}", f"tinyb={MODELS / 'bert'}")
    with guarded_broker(tmp_path) as broker:
        url = str(broker.settings("worker").url)
        with Stack(stack_settings(tmp_path / "home", url=url, models=models, grace=1.0), flower=False) as stack:
            stack.wait_until_warm()
            broker.admin.acl_log_reset()
            with Client(settings=broker.settings("client")) as client:
                assert client.embed(["a"], model="tinyb").result(30).shape[0] == 1
                assert len(list(client.generate("ab", model="tiny", max_tokens=3).stream(timeout=30))) == 3
                made = client.train("a", [{"text": "ab"}], model="tiny", steps=1, max_length=8).result(30)
                assert client.generate("ab", model="tiny", adapter="a", max_tokens=1).result(30).adapter is not None
                assert [entry.serving for entry in client.adapters.list("tiny")] == [made.version]
                folder = stack.settings.adapters / "tiny" / "a" / str(made.version)
                assert client.adapters.load("b", folder, model="tiny").result(30).version == 1
                run = client.train("a", [{"text": "ab"}], model="tiny", steps=100_000, max_length=8)
                wait_until(lambda: run.status() == "running", "it runs")
                assert run.id in client.jobs()
                run.cancel()
                with pytest.raises(JobCancelled):
                    run.result(30)
                letter = '{"kind": "generate", "model": "tiny", "client": "default", "history": [], "request": '
                asked = '"{\\"contract\\": 1, \\"model\\": \\"tiny\\", \\"prompt\\": \\"ab\\", \\"max_tokens\\": 1}"}'
                broker.admin.hset(keys.DEAD, "again", letter + asked)
                client.retry("again").result(30)
            for command in (
                ["status"],
                ["jobs", "list"],
                ["jobs", "dead"],
                ["jobs", "policy"],
                ["adapters", "list", "--model", "tiny"],
            ):
                done = CliRunner().invoke(app, [*command, "--url", str(broker.settings("client").url)])
                assert done.exit_code == 0, done.output
                assert "password" not in done.output
        assert broker.denied() == []
        log = (tmp_path / "home" / "logs" / "worker.log").read_text()
    assert "worker-password" not in log

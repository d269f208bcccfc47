"""Every Python block of the documentation and every example runs, as a user would run it, against a real worker.

What the README prints, and what shows that something was learned, has the real weights. For the other blocks a tiny
decoder has the real one's name: what they show hangs on no weights.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stoker import Client
from stoker.local.stack import Stack
from tests.conftest import assert_idle
from tests.docs.pages import EXAMPLES, ROOT, Block, blocks
from tests.gateway.machinery import gateway_of

pytestmark = pytest.mark.integration

#: The example that speaks to a gateway.
OVER_HTTP = ROOT / "examples" / "openai_client.py"
#: What it shows, a model has to learn.
LEARNING = ROOT / "examples" / "train_and_use.py"
#: It speaks to one too, and has its test where what it leaves is looked at (tests/gateway/test_fine_tuning.py).
FINE_TUNING = ROOT / "examples" / "fine_tuning.py"

BIN = Path(sys.executable).parent

#: The README's session has a test of its own, which runs it and looks at what it prints.
RUNNING = [block for block in blocks("python") if not block.skip and block.page.name != "README.md"]


@pytest.fixture
def with_the_stack(renamed_stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder with a small dataset, and the broker's address in the environment."""
    with _a_users_folder(renamed_stack, monkeypatch, tmp_path):
        yield tmp_path


@pytest.fixture
def with_real_weights(real_stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The same, of the stack that has them."""
    with _a_users_folder(real_stack, monkeypatch, tmp_path):
        yield tmp_path


@contextmanager
def _a_users_folder(stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "style.jsonl").write_text('{"prompt": "Q: coal?", "completion": " Aye!"}\n' * 4, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STOKER_URL", stack.settings.address.celery)
    yield
    with Client(settings=stack.settings) as client:
        assert_idle(client.redis)


@pytest.mark.parametrize("block", RUNNING, ids=str)
def test_a_block_of_the_documentation_runs(block: Block, with_the_stack: Path) -> None:
    script = with_the_stack / "block.py"
    # The same line numbers as in the page, so that a traceback points there.
    script.write_text("\n" * block.line + block.text, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture
def gateway(with_the_stack: Path, renamed_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One that OpenAI's own client finds."""
    with gateway_of(renamed_stack.settings) as client:
        monkeypatch.setenv("OPENAI_BASE_URL", str(client.base_url))
        yield


@pytest.mark.usefixtures("gateway")
def test_the_example_of_openais_client_runs_and_says_something(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(OVER_HTTP), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 3
    assert said[-1] == "[384, 384]"


@pytest.mark.parametrize(
    "example", [path for path in EXAMPLES if path not in (OVER_HTTP, FINE_TUNING, LEARNING)], ids=lambda path: path.name
)
def test_an_example_runs_and_says_something(
    example: Path, with_the_stack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("with_real_weights")
def test_the_example_that_trains_an_adapter_learns_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(LEARNING), run_name="__main__")
    assert "adapter: ' Aye, stoker!" in capsys.readouterr().out


def test_the_readme_prints_what_it_says(with_real_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words and shapes; the losses only in their number, as the last digit depends on the machine."""
    (session,) = [block for block in blocks("python") if block.page.name == "README.md"]
    (shown,) = [block for block in blocks("") if block.page.name == "README.md"]
    script = with_real_weights / "session.py"
    script.write_text(session.text, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
    said, wanted = capsys.readouterr().out.splitlines(), shown.text.splitlines()
    assert len(said) == len(wanted)
    for one, other in zip(said, wanted, strict=True):
        assert len(one.split()) == len(other.split()) if one.startswith("loss") else one == other


def test_the_session_of_the_readme_has_eight_lines() -> None:
    (session,) = [block for block in blocks("python") if block.page.name == "README.md"]
    statements = [line for line in session.text.splitlines() if line and not line.startswith(("from", " "))]
    assert len(statements) <= 8
    assert session.page == ROOT / "README.md"


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_typed(real_stack: Stack, tmp_path: Path) -> None:
    (typed,) = [block.text for block in blocks("sh") if block.page.name == "README.md" and "stoker init" in block.text]
    env = {
        **os.environ,
        "STOKER_URL": real_stack.settings.address.celery,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["sh", "-ec", typed], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "384 in all" in done.stdout
    assert "adapter house-style@" in done.stdout
    assert "Aye, stoker!" in done.stdout.partition("adapter house-style@")[2]

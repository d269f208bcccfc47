"""Loading damaged models as a starting worker does, in a process of its own: one that aborts says so by its end."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Seconds that one model of a few kilobytes may take, and bytes of memory.
LIMIT, MOST_MEMORY = 30.0, 256 << 20


class Loader:
    """Asks the process, and starts another one when it has ended."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "loader.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()

    def load(self, path: Path) -> list[str]:
        """What is wrong with the end of loading, inspecting and verifying the model at `path`."""
        with self._one_at_a_time:
            return self._asked(path)

    def _asked(self, path: Path) -> list[str]:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n".encode())
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], LIMIT)
        line = process.stdout.readline() if ready else b""
        if line:
            return [str(problem) for problem in json.loads(line)]
        if not ready:
            process.kill()
        code = process.wait()
        self.close()
        how = "takes longer than it may" if not ready else f"ends the process ({code})"
        return [f"loading {how}: {self._log.read_text(errors='replace')[-1500:]}"]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.fuzz.loader"],
                    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=os.environ,
                )  # fmt: skip
        return self._process


def main() -> None:
    """A path a line; for each a line of JSON: what was wrong."""
    # What a library prints must not be taken for an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        print(json.dumps(_problems(Path(line.rstrip("\n")))), file=answers, flush=True)


def _problems(path: Path) -> list[str]:
    import mlx.core as mx

    from engine.checkpoints.inspecting import inspect
    from engine.checkpoints.loading import load
    from engine.checkpoints.verifying import verify
    from stoker.errors import ModelError

    wrong: list[str] = []
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for name, attempt in (
        ("inspect", inspect),
        ("verify", verify),
        ("load", lambda path: load("damaged", [str(path)])),
    ):
        try:
            attempt(path)
        except ModelError as error:
            if str(path) not in str(error) or len(str(error)) > 2000:
                wrong.append(f"{name}: an error that is too long or does not name its file: {str(error)[:1000]}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[:1000]}")
    taken = mx.get_peak_memory() - before
    return wrong + ([f"{taken >> 20} MB were taken"] if taken > MOST_MEMORY else [])


if __name__ == "__main__":
    main()

"""Importing the client loads no engine and no worker: the line that the project promises, word for word."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROMISE = (
    "import stoker,sys; assert not {m.split('.')[0] for m in sys.modules} & "
    "{'mlx','tasks','workers','engine','kernels'}"
)


def test_importing_stoker_loads_neither_mlx_nor_worker_code() -> None:
    subprocess.run([sys.executable, "-c", PROMISE], check=True)


def test_the_command_line_loads_neither_mlx_nor_worker_code() -> None:
    subprocess.run([sys.executable, "-c", PROMISE.replace("import stoker", "import stoker.cli")], check=True)


def test_importing_the_workers_app_loads_no_mlx(tmp_path: Path) -> None:
    """Flower and `celery inspect` import it on machines that hold no model."""
    code = "import workers.app, sys; assert 'mlx' not in sys.modules and 'engine' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

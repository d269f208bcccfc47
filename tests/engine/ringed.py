"""Processes of this machine as ranks of MLX's ring."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from workers.group.starting import free_ports


def run(folder: Path, ranks: int, *command: str, timeout: float = 60) -> str:
    """`python -m COMMAND` as each rank; what rank 0 wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    started = []
    with ExitStack() as leaving:
        for rank in range(ranks):
            env = {**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            leaving.callback(process.wait)
            leaving.callback(process.kill)
            started.append(process)
        said = [process.communicate(timeout=timeout) for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors
    return said[0][0]

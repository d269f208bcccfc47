"""The disk that a storm fills leaves no mount behind, however its process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.disk import Disk
from tests.conftest import wait_until

MOUNTS = Path("/proc/mounts")
#: Mounts a disk and waits to be killed.
HOLDS = "import sys; from pathlib import Path; from tests.chaos.disk import Disk; "
HOLDS += "disk = Disk([Path(sys.argv[1])]); print('mounted', flush=True); sys.stdin.read()"


def is_mounted(folder: Path) -> bool:
    return any(line.split()[1] == str(folder) for line in MOUNTS.read_text().splitlines())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that was mounted; skips where this system lets us mount none."""
    found = tmp_path / "runs"
    disk = Disk([found])
    was = MOUNTS.exists() and is_mounted(found)
    disk.close()
    if not was:
        pytest.skip("nothing can be mounted here")
    return found


def test_a_closed_disk_is_mounted_no_more(folder: Path) -> None:
    assert not is_mounted(folder)


def test_a_disk_is_unmounted_when_its_process_is_killed(folder: Path) -> None:
    folder.rmdir()
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        assert is_mounted(folder)
        process.kill()
    wait_until(lambda: not is_mounted(folder), "it is unmounted")

"""The commands of deploy/README.md that make the file of the broker's users, with each system's own `sed`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

#: As that of macOS: what follows `-i` is the ending of a copy, and has to be there.
BSD = """\
#!/bin/sh
[ "$1" = -i ] && { echo "sed: 1: \\"users.acl\\": invalid command code u" >&2; exit 1; }
exec REAL "$@"
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="passwords are made by openssl")
@pytest.mark.parametrize("system", ["Linux", "macOS"])
def test_the_commands_make_a_file_of_users_that_nobody_else_can_read(system: str, tmp_path: Path) -> None:
    block = re.search(r"^```\n(.*?)^```$", (ROOT / "deploy/README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    if system == "macOS":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "sed").write_text(BSD.replace("REAL", str(shutil.which("sed"))))
        (tmp_path / "bin" / "sed").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    script = f"umask 022\n{block[1]}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    made = tmp_path / "users.acl"
    passwords = re.findall(r" >(\S+)", made.read_text())
    assert len(set(passwords)) == len(passwords) == 7
    assert all(re.fullmatch("[0-9a-f]{48}", password) for password in passwords)
    assert made.stat().st_mode & 0o777 == 0o600
    assert {entry.name for entry in tmp_path.iterdir()} <= {"users.acl", "deploy", "bin"}

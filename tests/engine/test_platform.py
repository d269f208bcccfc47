"""What the engine takes from the machine: it is asked for the right thing, and is left as it was found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from engine.platform import child, compiler, heap, probe
from engine.platform.jsonfiles import read_bytes, read_object
from stoker.errors import ModelError

ROOT = Path(__file__).parents[2]
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux says it in /proc")

BLAS = """
import ctypes, importlib, json, os, sys
from pathlib import Path
from engine.platform import blas

cache, source = Path(sys.argv[1]), Path(sys.argv[2])

def boot():
    importlib.reload(blas)
    return Path(blas.boot(2, cache=cache, own=False).library)

first = boot()
threads = ctypes.CDLL(str(first)).openblas_get_num_threads
with blas.one_thread():
    within = threads()
found = {"verified": blas.verify(), "within": within, "behind": threads()}
inode = first.stat().st_ino
first.chmod(0o664)
found["the group's"] = boot() == first and first.stat().st_ino != inode and not first.stat().st_mode & 0o022
os.utime(source, ns=(10**9, 10**9))
found["newer"] = boot() != first
found["another's"] = blas.verify()
print(json.dumps(found))
"""


@linux_only
def test_the_copy_of_blas_is_of_the_library_that_is_there_nobody_else_writes_it_and_its_threads_come_back(
    tmp_path: Path,
) -> None:
    package = pytest.importorskip("scipy_openblas32")
    source = tmp_path / "scipy_openblas32" / "lib" / "libopenblas.so"
    source.parent.mkdir(parents=True)
    (tmp_path / "scipy_openblas32" / "__init__.py").touch()
    shutil.copy(next(Path(package.__file__).parent.glob("lib/*openblas*.so")), source)
    done = subprocess.run(
        [sys.executable, "-c", BLAS, str(tmp_path / "cache"), str(source)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {
        "verified": True,
        "within": 1,
        "behind": 2,
        "the group's": True,
        "newer": True,
        # The first library that was loaded has the name; what a later one says is not what MLX uses.
        "another's": False,
    }


PROGRAM = """
import atexit, json, signal, sys

def last():
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    print(json.dumps({"alarm": left, "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN}))

atexit.register(last)

def answer(request):
    return {"alarm": str(signal.getitimer(signal.ITIMER_REAL)[0] > 0)}
"""


def test_a_process_with_limits_waits_without_an_alarm_and_is_no_ones_to_interrupt(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-P", child.__file__, str(program), "passing", str(1 << 30)]
    asked = json.dumps({"seconds": 500}) + "\n"
    done = subprocess.run(command, input=asked, capture_output=True, text=True, check=True)
    ready, *lines = done.stdout.splitlines()
    assert (ready, [json.loads(line) for line in lines]) == (
        "ready",
        [{"alarm": "True"}, {"alarm": 0.0, "interrupt": True}],
    )


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_refused_and_nothing_of_it_stays_open(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        with pytest.raises(ModelError, match="neither a file nor a link"):
            read_object(path)
    assert len(os.listdir("/dev/fd")) == before


def test_a_file_of_the_most_bytes_is_read_and_one_of_another_byte_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ModelError, match="more than 4 bytes"):
        read_bytes(path, 4)


def test_a_link_that_leads_nowhere_is_not_taken_for_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert read_object(path, missing={}) == {}
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"no config\.json in it"):
        read_object(path, missing={})


@linux_only
def test_memory_is_that_of_the_machine_and_what_is_resident_that_of_the_process() -> None:
    total = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert total
    if probe.device() == "cpu":
        assert abs(probe.memory() - int(total[1]) * 1024) < 1 << 20
    said = dict(re.findall(r"(VmRSS|VmSize):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    resident, size = (int(said[name]) * 1024 for name in ("VmRSS", "VmSize"))
    assert abs(heap.resident() - resident) < (size - resident) / 2


@pytest.mark.parametrize(
    ("compiler_there", "works", "fuses", "off"),
    [(True, True, True, False), (True, False, False, True), (False, False, False, False)],
)
def test_a_compiler_that_does_not_work_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, compiler_there: bool, works: bool, fuses: bool, off: bool
) -> None:
    switched: list[bool] = []

    def broken(function: object) -> object:
        raise RuntimeError("g++: no such header")

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++" if compiler_there else None)
    monkeypatch.setattr(mx, "compile", (lambda function: function) if works else broken)
    monkeypatch.setattr(mx, "disable_compile", lambda: switched.append(True))
    assert (compiler.fuses_on_cpu.__wrapped__(), bool(switched)) == (fuses, off)

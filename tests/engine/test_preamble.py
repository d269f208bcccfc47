"""The header of MLX's fused loops is compiled once, and g++ takes it for what MLX compiles."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest

from engine.platform import preamble

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="g++ of Linux alone is known to take it"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]


@pytest.fixture(autouse=True)
def header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one in place of MLX's, in a temporary folder of its own."""
    path = tmp_path / "package" / "include" / preamble.HEADER
    path.parent.mkdir(parents=True)
    path.write_text("#pragma once\ninline int one() { return 1; }\n")
    monkeypatch.setattr(mx, "__file__", str(tmp_path / "package" / "core.so"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return path


def compiled() -> Path:
    return preamble.loops_folder() / f"{preamble.HEADER}.gch"


def included(header: Path) -> str:
    """What g++ says that it includes for a loop of MLX's."""
    source = preamble.loops_folder() / "loop.cpp"
    source.write_text(f'#include "{preamble.HEADER}"\nint two() {{ return 2 * one(); }}\n')
    include = header.parents[preamble.HEADER.count("/")]
    words = ["g++", *preamble.FLAGS, "-shared", "-H", "-I", str(include), str(source), "-o", str(source) + ".so"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stderr


def test_a_loop_takes_the_header_that_was_compiled(header: Path) -> None:
    assert preamble.compile_once()
    assert included(header).splitlines()[0] == f"! {compiled()}"


def test_it_is_compiled_again_for_another_compiler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preamble.compile_once()
    with monkeypatch.context() as broken:
        broken.setattr(subprocess, "run", None)
        assert preamble.compile_once(), "it is there"
    os.utime(compiled(), (0, 0))
    assert preamble.compile_once()
    assert compiled().stat().st_mtime > 0


def test_a_process_does_not_wait_for_another_that_compiles_it() -> None:
    compiled().parent.mkdir(parents=True)
    other = os.open(compiled().parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert not preamble.compile_once()
    assert not compiled().exists()
    os.close(other)
    assert preamble.compile_once()


@pytest.mark.parametrize("trouble", ["header", "folder", "no header", "no compiler"])
def test_where_it_cannot_be_compiled_loops_are_compiled_without_it(
    header: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    if trouble == "header":
        header.write_text("this is no C++\n")
    elif trouble == "folder":
        (tmp_path / "temporary").write_text("a file")
    elif trouble == "no header":
        header.unlink()
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not preamble.compile_once()
    assert not list(tmp_path.rglob("*.gch"))


def test_mlx_compiles_with_these_flags_and_includes_this_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    package = Path(mx.__file__).parent
    assert (package / "include" / preamble.HEADER).exists()
    library = (package / "lib" / "libmlx.so").read_bytes()
    assert " ".join(("g++", *preamble.FLAGS, "-shared")).encode() in library
    assert f'#include "{preamble.HEADER}"'.encode() in library
    mx.eval(mx.compile(lambda x: mx.abs(x) * 0.75 + 0.25)(mx.zeros((3,))))
    assert list(preamble.loops_folder().glob("*.so")), "where MLX keeps its loops"

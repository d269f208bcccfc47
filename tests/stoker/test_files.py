"""Files that a power cut, or `kill -9`, between any two calls leaves whole: rows of vectors, and small files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from stoker.contract.vectors import Int8Vectors
from stoker.errors import InvalidRequest
from stoker.files import output as output_module
from stoker.files import vector_output
from stoker.files.line_output import LineOutput
from stoker.files.locks import try_lock
from stoker.files.output import partial_path
from stoker.local.broker import EmbeddedBroker
from stoker.settings import Settings, load_settings
from tests import powercut
from tests.powercut import Cut, Disk
from tests.stoker import arrow
from tests.stoker.test_bulk_files import DIM, break_off, encoded, job
from tests.stoker.vector_files import opened

ROWS, STEP = 23, 9
LINES = 5
SUFFIXES = [".npy", ".safetensors", ".parquet"]


@pytest.fixture(autouse=True)
def _safe_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arrow.stand_in(monkeypatch)
    monkeypatch.setattr(output_module, "SAFE_EVERY", 0.0)


def run(path: Path, of: Mapping[str, Any], disk: Disk | None = None, overwrite: bool = False) -> int:
    """Go on with an output to its end; how many rows were there."""
    with opened(path, ROWS, of, overwrite) as output:
        before = output.done
        for start in range(before, ROWS, STEP):
            output.write(encoded(of["dtype"], start, min(start + STEP, ROWS)))
            if disk is not None:
                disk.mark(f"{output.done} rows")
        output.finish()
    if disk is not None:
        disk.mark("finished")
    return before


def rows_promised(cut: Cut) -> int:
    return max((int(mark.split()[0]) for mark in cut.marks if mark != "finished"), default=0)


def whole(folder: Path, suffix: str, of: Mapping[str, Any]) -> bytes:
    folder.mkdir()
    run(folder / f"out{suffix}", of)
    return (folder / f"out{suffix}").read_bytes()


def restored(disk: Disk, folder: Path) -> Iterator[tuple[Cut, Path]]:
    """Each state once. What goes on from there goes on to its end, and so need not wait for the real disk."""
    cuts = {(tuple(sorted(cut.tree.items())), cut.marks): cut for cut in disk.cuts()}
    assert len(cuts) > 20
    with mock.patch.object(os, "fsync"), mock.patch.object(output_module, "SAFE_EVERY", 3600.0):
        for cut in cuts.values():
            with cut.restored(folder) as after:
                yield cut, after


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_rows_that_were_promised_outlast_every_cut_and_the_file_is_whole_or_not_there(
    tmp_path: Path, suffix: str, dtype: str
) -> None:
    if (suffix, dtype) == (".npy", "int8"):
        pytest.skip("npy cannot hold scales")
    of, work = job(dtype), tmp_path / "work"
    expected = whole(tmp_path / "expected", suffix, of)
    work.mkdir()
    with powercut.recorded(work) as disk:
        run(work / f"out{suffix}", of, disk)
    for cut, after in restored(disk, tmp_path / "after"):
        path = after / f"out{suffix}"
        if "finished" in cut.marks:
            assert path.exists(), cut
        if path.exists():
            assert path.read_bytes() == expected, cut
            continue
        assert run(path, of) >= rows_promised(cut), cut
        assert path.read_bytes() == expected, cut


def test_the_rows_of_a_parquet_file_go_when_its_name_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a cut could keep that they went, and not that the file has its name."""
    path, there = tmp_path / "out.parquet", list[bool]()

    def noted(what: Path) -> None:
        if what == tmp_path:
            there.append(path.exists() and partial_path(path).exists())

    monkeypatch.setattr(vector_output, "flush", noted)
    run(path, job("float32"))
    assert any(there)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_parquet_has_every_row_once_a_piece_at_a_time(tmp_path: Path, dtype: str) -> None:
    path, rows = tmp_path / "out.parquet", 65_537
    codes = (np.arange(rows)[:, None] % 100).astype(np.float32 if dtype == "int8" else dtype)
    scales = (np.arange(rows) % 7 + 1).astype(np.float32)
    with opened(path, rows, {**job(dtype), "rows": rows}) as output:
        output.write(Int8Vectors(codes.astype(np.int8), scales) if dtype == "int8" else codes)
        output.finish()
    found = list(arrow.tables(path))
    assert [len(table["vectors"]) for table in found] == [65_536, 1]
    assert np.array_equal([row for table in found for row in table["vectors"]], codes)
    if dtype == "int8":
        assert [scale for table in found for scale in table["scales"]] == scales.tolist()
    else:
        assert set(found[0]) == {"vectors"}


def write_lines(path: Path, of: Mapping[str, Any], disk: Disk | None = None) -> int:
    """Go on with a file of lines to its end; how many were there."""
    with output_module.opened(LineOutput(path, LINES, of)) as output:
        before = output.done
        for number in range(before, LINES):
            output.write({"line": number, "error" if number % 3 == 0 else "result": "ü" * (LINES - number)})
            if disk is not None:
                disk.mark(f"{output.done} rows")
        output.finish()
        assert output.errors == len(range(0, LINES, 3))
    if disk is not None:
        disk.mark("finished")
    return before


def test_lines_that_were_promised_outlast_every_cut_and_each_is_there_once_in_the_end(tmp_path: Path) -> None:
    of, work = {"rows": LINES, "input": "digest", "stop": ("a",)}, tmp_path / "work"
    write_lines(tmp_path / "expected.jsonl", of)
    expected = (tmp_path / "expected.jsonl").read_bytes()
    work.mkdir()
    with powercut.recorded(work) as disk:
        write_lines(work / "out.jsonl", of, disk)
    for cut, after in restored(disk, tmp_path / "after"):
        path = after / "out.jsonl"
        if "finished" in cut.marks:
            assert path.exists(), cut
        if path.exists():
            assert path.read_bytes() == expected, cut
            continue
        assert write_lines(path, of) >= rows_promised(cut), cut
        assert path.read_bytes() == expected, cut


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_record_of_the_rows_goes_after_their_file_has_its_name_for_good(tmp_path: Path, suffix: str) -> None:
    """A disk may keep the one change of a folder and lose the other."""
    with powercut.recorded(tmp_path) as disk:
        run(tmp_path / f"out{suffix}", job("float16"), disk)
    cuts = disk.cuts()
    moment = max(at for at, cut in enumerate(cuts) if cut.before == f"unlink out{suffix}.partial.json")
    safe = [cut.tree for cut in cuts[: moment + 1] if cut.how == "nothing unsafe kept"][-1]
    assert f"out{suffix}" in safe
    assert f"out{suffix}.partial" not in safe


def test_an_output_that_is_begun_anew_never_vouches_for_rows_of_another_run(tmp_path: Path) -> None:
    """Either run may be gone on with after any cut, and has its own rows in the end."""
    old, new, work = job("float16", input="old"), job("float32", input="new"), tmp_path / "work"
    expected = {name: whole(tmp_path / name, ".npy", of) for name, of in (("old", old), ("new", new))}
    work.mkdir()
    break_off(work / "out.npy", old, encoded("float16", 0, 9))
    with powercut.recorded(work) as disk:
        run(work / "out.npy", new, disk, overwrite=True)
    for name, of in (("old", old), ("new", new)):
        for cut, after in restored(disk, tmp_path / "after"):
            path = after / "out.npy"
            if path.exists():
                assert path.read_bytes() == expected["new"], cut
                continue
            try:
                run(path, of)
            except InvalidRequest:
                # What is there is the other run's.
                run(path, of, overwrite=True)
            assert path.read_bytes() == expected[name], cut


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_of_a_longer_run_is_left_in_a_file_that_was_begun_anew(tmp_path: Path, suffix: str) -> None:
    new, path = job("float16", input="new"), tmp_path / f"out{suffix}"
    expected = whole(tmp_path / "expected", suffix, new)
    partial_path(path).write_bytes(b"x" * (ROWS * DIM * 4 + 10_000))
    run(path, new)
    assert path.read_bytes() == expected
    break_off(path.with_name(f"two{suffix}"), job("float32"), encoded("float32", 0, ROWS))
    run(path.with_name(f"two{suffix}"), new, overwrite=True)
    assert path.with_name(f"two{suffix}").read_bytes() == expected


def test_the_brokers_address_is_the_old_or_the_new_at_every_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "broker").mkdir(parents=True)
    settings = Settings(home=home)
    broker, record = EmbeddedBroker(settings), dict[str, str]()
    broker.url = "redis://127.0.0.1:1000/0"
    broker.announce()
    broker.url = "redis://127.0.0.1:2000/0"
    with powercut.recorded(home) as disk:
        broker.announce()
    for cut in disk.cuts():
        with cut.restored(tmp_path / "after") as after:
            record = json.loads((after / "broker.json").read_text())
            with (after / "broker" / "lock").open("w") as lock:
                assert try_lock(lock)
                found = load_settings(home=after).chosen_url
            assert found == record["url"], cut
            assert found in ({broker.url} if cut.finished else {broker.url, "redis://127.0.0.1:1000/0"}), cut

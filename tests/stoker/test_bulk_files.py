"""Files in and out: every line checked, rows that survive being broken off, nothing half-written under the name."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from stoker.contract.vectors import Encoded, Int8Vectors, quantize
from stoker.errors import ConfigError, DatasetError, InvalidRequest, ModelError
from stoker.files import line_output
from stoker.files import output as output_module
from stoker.files.line_output import LineOutput
from stoker.files.locks import try_lock
from stoker.files.output import partial_path, state_path
from stoker.files.requests import RequestFile
from stoker.files.source import Source
from stoker.files.vector_output import check_output, npy_layout, safetensors_layout
from tests.stoker.vector_files import opened

ROWS, DIM = 23, 12
VECTORS = np.random.default_rng(3).normal(size=(ROWS, DIM)).astype(np.float32)
#: (suffix, dtype)
KINDS = [(".npy", "float32"), (".npy", "float16"), (".safetensors", "float16"), (".safetensors", "int8")]


def job(dtype: str, **more: Any) -> dict[str, Any]:
    return {"rows": ROWS, "dtype": dtype, "input": "digest", **more}


def encoded(dtype: str, start: int, end: int) -> Encoded:
    part = VECTORS[start:end]
    return quantize(part) if dtype == "int8" else part.astype(dtype)


def read(path: Path, dtype: str) -> Encoded:
    if path.suffix == ".npy":
        return np.load(path)  # type: ignore[no-any-return]
    tensors = safetensors.numpy.load_file(path)
    return Int8Vectors(tensors["vectors"], tensors["scales"]) if dtype == "int8" else tensors["vectors"]


def same(left: Encoded, right: Encoded) -> bool:
    if isinstance(left, Int8Vectors) and isinstance(right, Int8Vectors):
        return np.array_equal(left.codes, right.codes) and np.array_equal(left.scales, right.scales)
    return np.array_equal(left, right) and left.dtype == right.dtype  # type: ignore[arg-type, union-attr]


def break_off(path: Path, of: dict[str, Any], *parts: Encoded) -> int:
    """Write some rows and be interrupted; how many were there before."""
    try:
        with opened(path, ROWS, of) as output:
            before = output.done
            for part in parts:
                output.write(part)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return before


@pytest.mark.parametrize(("suffix", "dtype"), KINDS)
def test_a_file_written_in_two_runs_is_whole(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"out{suffix}"
    break_off(path, job(dtype), encoded(dtype, 0, 5), encoded(dtype, 5, 9))
    assert not path.exists()
    with opened(path, ROWS, job(dtype)) as output:
        assert (output.done, output.dim) == (9, DIM)
        output.write(encoded(dtype, 9, ROWS))
        output.finish()
    assert same(read(path, dtype), encoded(dtype, 0, ROWS))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("suffix", "dtype"), KINDS)
def test_what_was_not_made_safe_is_written_again(tmp_path: Path, suffix: str, dtype: str) -> None:
    """As `kill -9` leaves it: rows in the file that nothing vouches for, the last one cut short."""
    killed, path = tmp_path / "killed", tmp_path / f"out{suffix}"
    with opened(path, ROWS, job(dtype)) as output:
        output.write(encoded(dtype, 0, 6))
        output.make_safe()
        output.write(encoded(dtype, 6, 11))
        shutil.copytree(tmp_path, killed)
    path = killed / path.name
    with partial_path(path).open("r+b") as file:
        file.truncate(partial_path(path).stat().st_size - 3)
    with opened(path, ROWS, job(dtype)) as output:
        assert output.done == 6
        output.write(encoded(dtype, 6, ROWS))
        output.finish()
    assert same(read(path, dtype), encoded(dtype, 0, ROWS))


def test_nothing_of_a_line_that_was_not_safe_is_left_behind_the_last(tmp_path: Path) -> None:
    """An answer that is made again may be a shorter one."""
    killed, of = tmp_path / "killed", {"rows": 2, "input": "digest"}
    with output_module.opened(LineOutput(tmp_path / "out.jsonl", 2, of)) as output:
        output.write({"line": 1})
        output.make_safe()
        output.write({"line": 2, "text": "x" * 1000})
        shutil.copytree(tmp_path, killed)
    with output_module.opened(LineOutput(killed / "out.jsonl", 2, of)) as output:
        assert output.done == 1
        output.write({"line": 2})
        output.finish()
    assert (killed / "out.jsonl").read_text() == '{"line": 1}\n{"line": 2}\n'


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C before the line of code with this number, of those that write a row."""
    steps, places = itertools.count(), {line_output.__file__, output_module.__file__}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and frame.f_code.co_filename in places and next(steps) == step:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_an_interrupt_between_any_two_steps_leaves_each_line_once(tmp_path: Path) -> None:
    lines = [{"line": 1, "text": "aa"}, {"line": 2, "error": "b"}, {"line": 3, "text": "c"}]
    expected, interrupted = "".join(f"{json.dumps(line)}\n" for line in lines), 0
    for step in range(40):
        path = tmp_path / f"{step}.jsonl"
        for again in (False, True):
            with suppress(KeyboardInterrupt), output_module.opened(LineOutput(path, 3, {"rows": 3})) as output:
                for line in lines[output.done :]:
                    with nullcontext() if again or output.done != 1 else interrupted_at(step):
                        output.write(line)
                assert output.errors == 1
                output.finish()
            interrupted += not path.exists()
        assert path.read_text() == expected, step
    assert interrupted >= 15, "so many steps there are"


def test_rows_that_are_gone_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    break_off(path, job("float32"), VECTORS[:9])
    for file, spoiled in ((partial_path(path), b"x" * 100), (state_path(path), b'{"job": ')):
        file.write_bytes(spoiled)
        assert break_off(path, job("float32"), VECTORS[:9]) == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_another_input_does_not_go_on_behind_the_first(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "out.npy"
    if replaced:
        path.write_bytes(b"old")
    break_off(path, job("float32"), VECTORS[:9])
    other = job("float32", input="another")
    with pytest.raises(InvalidRequest, match=r"with another input.*--overwrite"), opened(path, ROWS, other):
        pass
    with opened(path, ROWS, other, overwrite=True) as output:
        assert output.done == 0
        output.write(VECTORS)
        output.finish()
    assert np.array_equal(np.load(path), VECTORS)


def test_a_run_that_begins_as_another_ends_leaves_its_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.npy"

    def meanwhile(file: Any) -> bool:
        """The other one gives the file its name between this one's opening and its lock."""
        monkeypatch.setattr(output_module, "try_lock", try_lock)
        partial_path(path).replace(path)
        state_path(path).unlink()
        return try_lock(file)

    break_off(path, job("float32"), VECTORS)
    content = partial_path(path).read_bytes()
    monkeypatch.setattr(output_module, "try_lock", meanwhile)
    with pytest.raises(InvalidRequest, match="another run is writing"), opened(path, ROWS, job("float32"), True):
        pass
    assert path.read_bytes() == content


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.npy"
    with opened(path, ROWS, job("float32")) as output:
        with pytest.raises(InvalidRequest, match="another run is writing"), opened(path, ROWS, job("float32")):
            pass
        output.write(VECTORS)
        output.finish()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_disk_that_takes_nothing_more_is_said_and_the_run_goes_on_behind_what_is_safe(
    tmp_path: Path, suffix: str
) -> None:
    resource = pytest.importorskip("resource")
    path, job = tmp_path / f"v{suffix}", {"rows": 4, "dtype": "float32"}
    rows = np.ones((2, 1000), np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def interrupted() -> None:
        with opened(path, 4, job) as output:
            output.write(rows)
            output.write(2 * rows)

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(InvalidRequest, match=r"cannot be written \(File too large\); the first 2 of its 4 rows"):
            interrupted()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with opened(path, 4, job) as output:
        assert output.done == 2
        output.write(2 * rows)
        output.finish()
    assert path.exists()


def test_vectors_of_another_length_end_the_run(tmp_path: Path) -> None:
    with opened(tmp_path / "out.npy", ROWS, job("float32")) as output:
        output.write(VECTORS[:2])
        with pytest.raises(ModelError, match="5 numbers after some of 12"):
            output.write(VECTORS[2:4, :5])
        with pytest.raises(ModelError, match="24 numbers after some of 12"):
            output.write(np.concatenate([VECTORS[2:4]] * 2, axis=1))


def test_rows_are_made_safe_two_seconds_after_the_last_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now, safe = tmp_path / "out.npy", [100.0], []
    monkeypatch.setattr(output_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with opened(path, ROWS, job("float32")) as output:
        for seconds in (1.9, 2.0, 3.9, 4.0):
            now[0] = 100 + seconds
            output.write(VECTORS[output.done : output.done + 1])
            safe.append(json.loads(state_path(path).read_text())["done"] if state_path(path).exists() else 0)
    assert safe == [0, 2, 2, 4]


def test_rows_are_made_safe_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_module, "SAFE_EVERY", 0.0)
    path = tmp_path / "out.npy"
    with opened(path, ROWS, job("float32")) as output:
        output.write(VECTORS[:4])
        assert json.loads(state_path(path).read_text())["done"] == 4


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    there = tmp_path / "there.npy"
    there.write_bytes(b"")
    for path, dtype, why in (
        (tmp_path / "out.csv", "float32", r"'out\.csv' given.*\.npy, \.safetensors, \.parquet"),
        (tmp_path / "out.npy", "int8", "cannot hold the scales"),
        (tmp_path / "none" / "out.npy", "float32", "no folder"),
        (there, "float32", "there already.*--overwrite"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            check_output(path, dtype, overwrite=False)
    check_output(there, "float32", overwrite=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_parquet_holds_the_vectors_as_lists(tmp_path: Path, dtype: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install '.[parquet]'")
    path = tmp_path / "out.parquet"
    with opened(path, ROWS, job(dtype)) as output:
        output.write(encoded(dtype, 0, 10))
        output.write(encoded(dtype, 10, ROWS))
        output.finish()
    table = parquet.read_table(path)
    rows = np.array(table["vectors"].to_pylist())
    whole = encoded(dtype, 0, ROWS)
    if isinstance(whole, Int8Vectors):
        assert np.allclose(rows * np.array(table["scales"])[:, None], whole.to_float32())
    else:
        assert np.array_equal(rows.astype(dtype), whole)
    assert list(tmp_path.iterdir()) == [path]


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[parquet\]', from a checkout"):
        check_output(tmp_path / "out.parquet", "float32", overwrite=False)


def test_the_texts_of_a_file_are_those_of_its_lines(tmp_path: Path) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"id": 1, "body": "one"}\n\n{"body": "zwei ü", "id": 2}\r\n  \n{"body": "three"}', "utf-8")
    source = Source(lines, "body")
    assert list(source.texts()) == ["one", "zwei ü", "three"]
    count, digest = source.survey()
    assert count == 3
    plain = tmp_path / "in.txt"
    plain.write_text("one\n\n two \r\n", "utf-8")
    assert list(Source(plain, "text").texts()) == ["one", " two "]
    lines.write_text('{"id": 1, "body": "one"}\n{"body": "two"}\n{"body": "three"}\n')
    assert source.survey()[1] != digest


def test_a_digest_distinguishes_what_would_give_other_texts(tmp_path: Path) -> None:
    """A run goes on behind the rows of the one that has its digest."""
    both = tmp_path / "in.jsonl"
    both.write_text('{"a": "one", "b": "two"}\n')
    assert Source(both, "a").survey()[1] != Source(both, "b").survey()[1]
    plain, digests = tmp_path / "in.txt", set()
    for text in ("ab\nc\n", "a\nbc\n", "abc\n"):
        plain.write_text(text)
        digests.add(Source(plain, "text").survey()[1])
    assert len(digests) == 3
    requests = set()
    for text in ("ab\nc\n", "a\nbc\n", "abc\n", "c\nab\n"):
        plain.write_text(text)
        requests.add(RequestFile(plain).survey()[1])
    assert len(requests) == 4


@pytest.mark.parametrize("rows", [1, 3, 10**6])
@pytest.mark.parametrize("dim", [1, 3, 384])
def test_numbers_begin_where_their_type_may(rows: int, dim: int) -> None:
    (vectors,) = npy_layout(rows, dim, "float16").columns
    assert vectors.offset % 64 == 0
    for dtype in ("float32", "float16", "int8"):
        for column in safetensors_layout(rows, dim, dtype).columns:
            assert column.offset % np.dtype(column.dtype).itemsize == 0, column


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', r"line 2: not JSON"),
        (b"[1]", r"line 2: \[1\] given"),
        (b'{"body": "a"}', r'line 2: no field "text"; it has "body"\. Name one: --field'),
        (
            json.dumps({f"column-{number}{'x' * 99}": 0 for number in range(30)}).encode(),
            r'line 2: no field "text"; it has "column-0x{,60}….*"column-19x*…, …\. Name one: --field.$',
        ),
        (b'{"text": 3}', 'line 2: "text" is 3'),
        (b'{"text": "a", "text": "b"}', 'line 2: the field "text" is there twice; name each once'),
        (b'{"text": " "}', "line 2: the text is blank"),
        (b'{"text": "\xff"}', "line 2: not UTF-8"),
        (b'{"text": "\\ud800"}', "line 2: .* half a surrogate pair"),
        (b"[" * 100_000, "line 2: nested too deeply|line 2: not JSON"),
        (b'{"text": "' + b"a" * 1_000_001 + b'"}', "line 2: 1000001 characters; at most 1000000"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DatasetError, match=why):
        Source(path, "text").survey()


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        Source(tmp_path / "none.jsonl", "text").survey()
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="no text in it"):
        Source(tmp_path / "empty.jsonl", "text").survey()


@pytest.mark.parametrize("missing", [0, 1])
def test_rows_are_believed_where_each_of_their_columns_is_there(tmp_path: Path, missing: int) -> None:
    """Scales lie before the codes: the last row's code is what a lost end of the file takes first."""
    path = tmp_path / "out.safetensors"
    break_off(path, job("int8"), encoded("int8", 0, 9))
    with partial_path(path).open("r+b") as file:
        file.truncate(file.seek(0, 2) - missing)
    assert break_off(path, job("int8"), encoded("int8", 0, 9)) == (0 if missing else 9)

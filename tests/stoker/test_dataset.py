"""Training data: every example read as it was meant, every wrong line named."""

from __future__ import annotations

import codecs
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stoker.client.requests import read_dataset
from stoker.contract import dataset, lines
from stoker.contract.dataset import Example, TrainInput, iterate_lines, iterate_mappings, to_lines
from stoker.contract.requests import MAX_TEXT_CHARS
from stoker.errors import DatasetError
from stoker.files.source import Source

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
EXAMPLES = st.builds(Example, prompt=TEXTS | st.just(""), completion=TEXTS.filter(str.strip))


@given(st.lists(EXAMPLES, min_size=1, max_size=8))
@example([Example(prompt=" ", completion="what stands behind a blank prompt")])
def test_examples_that_were_written_are_read_back(examples: list[Example]) -> None:
    """Also through the bytes that a client uploads, which the worker splits into lines."""
    data = "\n".join(example.to_line() for example in examples).encode()
    assert list(iterate_lines(data.splitlines(), "x")) == examples


def test_a_line_end_that_a_read_cuts_in_two_is_one_line_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in range(1, 8):
        monkeypatch.setattr(lines, "CHUNK", chunk)
        found = list(lines.numbered(lines.pieces(io.BytesIO(b"a\r\nbc\r\n\r\nd")), "x"))
        assert found == [(1, b"a"), (2, b"bc"), (4, b"d")], chunk


def test_a_role_that_no_conversation_has_is_named() -> None:
    rows = [{"messages": [{"role": "robot", "content": "Hello"}, {"role": "assistant", "content": "Aye"}]}]
    with pytest.raises(DatasetError, match=r"message 1: role \"robot\" given; allowed: system, user, assistant"):
        list(iterate_mappings(rows, "x"))


def test_both_forms_are_read_and_blank_lines_skipped() -> None:
    lines = [b'{"text": "plain"}\n', b"\n", b"  \r\n", '{"prompt": "Q", "completion": "Ä"}'.encode()]
    assert list(iterate_lines(lines, "x")) == [Example("", "plain"), Example("Q", "Ä")]


ENDS = [b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("form", ["file", "upload", "embed", "plain"])
def test_a_file_is_read_alike_with_every_line_ending(tmp_path: Path, start: bytes, end: bytes, form: str) -> None:
    texts = ["one", "zwei \u2028 \x85 \x0b halves", "drei"]
    lines = [text if form == "plain" else json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = start + end.join(line.encode() for line in lines) + end
    file = tmp_path / ("a.txt" if form == "plain" else "a.jsonl")
    file.write_bytes(content)
    if form in ("embed", "plain"):
        assert list(Source(file, "text").texts()) == texts
        return
    assert read_dataset(file) == b"\n".join(Example("", text).to_line().encode() for text in texts)
    found = iterate_lines(TrainInput(file if form == "file" else content).lines(), "x")
    assert list(found) == [Example("", text) for text in texts]


@pytest.mark.parametrize("end", ENDS[:3])
def test_a_wrong_line_has_the_same_number_with_every_line_ending(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(end.join([b'{"text": "a"}', b"", b'{"text": "\xff"}', b"{}"]))
    for read in (lambda file: list(Source(file, "text").texts()), read_dataset):
        with pytest.raises(DatasetError, match=r"^a\.jsonl, line 3: not UTF-8"):
            read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\n'.encode(encoding))
    for read in (lambda file: list(Source(file, "text").texts()), read_dataset):
        with pytest.raises(DatasetError, match=r"^a\.jsonl: UTF-16, not UTF-8\. Save it as UTF-8\."):
            read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b"text", "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"3", "3 given; expected an object"),
        (b'["text"]', '["text"] given; expected an object'),
        (b"{}", "no fields given"),
        (b'{"txt": "a"}', "txt given"),
        (b'{"text": "a", "completion": "b"}', "completion, text given"),
        (b'{"prompt": "a"}', "prompt given"),
        (b'{"text": null}', "text is null; expected text"),
        (b'{"text": "a", "text": "b"}', 'the field "text" is there twice; name each once'),
        (b'{"prompt": 3, "completion": "a"}', "prompt is 3; expected text"),
        (b'{"text": " "}', "the text to learn is empty"),
        (b'{"prompt": "a", "completion": ""}', "the text to learn is empty"),
        (b"1" * 5000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(line: bytes, why: str) -> None:
    with pytest.raises(DatasetError, match=r"^style\.jsonl, line 3: .*") as error:
        list(iterate_lines([b'{"text": "fine"}', b"", line], "style.jsonl"))
    assert why in str(error.value)


def test_to_find_which_field_is_there_twice_each_name_is_looked_at_a_few_times() -> None:
    """Each with each takes hours for one line of a few megabytes, and the thread of a worker or of the gateway."""
    compared = 0

    class Name(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str(self) == str(other)

    names = [Name(f"field-{number}") for number in range(1000)]
    with pytest.raises(lines.RepeatedField, match='the field "field-999" is there twice'):
        lines.unrepeated([(name, 0) for name in (*names, Name("field-999"))])
    assert compared < 100 * len(names)


def test_a_line_that_is_nested_too_deeply_is_named() -> None:
    with pytest.raises(DatasetError, match="line 1"):
        list(iterate_lines([b"[" * 200_000], "x"))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_large_file_is_read_in_pieces_of_whole_lines(monkeypatch: pytest.MonkeyPatch, end: bytes) -> None:
    content = [b'{"text": "%d"}' % number for number in range(100)]
    for chunk in (1, 2, 7, 64, 4096):
        monkeypatch.setattr(lines, "CHUNK", chunk)
        found = list(iterate_lines(lines.pieces(io.BytesIO(end.join(content) + end)), "x"))
        assert [example.completion for example in found] == [str(number) for number in range(100)]


def test_of_a_line_without_end_no_more_is_read_than_shows_that() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return b"x" * size

    file = Endless()
    with pytest.raises(DatasetError, match=r"^x, line 1: more than 8388608 bytes"):
        list(iterate_lines(lines.pieces(file), "x"))  # type: ignore[arg-type]
    assert file.given < 2 * lines.MAX_LINE_BYTES


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x" * 1_000_001},
        {"prompt": "x" * 500_000, "completion": "x" * 500_001},
        {"messages": [{"role": "user", "content": "x" * 1_000_000}, {"role": "assistant", "content": "y"}]},
    ],
)
def test_an_example_that_is_too_long_is_refused_before_it_is_tokenized(row: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"^x, item 2: 1000001 characters; at most 1000000"):
        list(iterate_mappings([{"text": "fine"}, row], "x"))
    assert list(iterate_mappings([{"text": "x" * 1_000_000}], "x"))


def test_half_a_surrogate_pair_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud800"}\n')
    with pytest.raises(DatasetError, match="line 2"):
        read_dataset(path)


def test_a_wrong_object_is_named_by_its_place() -> None:
    with pytest.raises(DatasetError, match=r'^dataset, item 2: "wrong" given'):
        list(iterate_mappings([{"text": "fine"}, "wrong"], "dataset"))  # type: ignore[list-item]


@pytest.mark.parametrize("lines", [[], [b"", b"\n"]])
def test_a_dataset_of_nothing_is_refused(lines: list[bytes]) -> None:
    with pytest.raises(DatasetError, match="x: no example in it"):
        to_lines(iterate_lines(lines, "x"), "x")


def test_too_many_examples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "MAX_EXAMPLES", 2)
    with pytest.raises(DatasetError, match=r"x: more than 2 examples .*STOKER_DATA"):
        to_lines(iterate_mappings([{"text": "a"}] * 3, "x"), "x")


def test_a_file_is_read_for_upload_as_the_objects_are(tmp_path: Path) -> None:
    rows = [{"text": "plain \u2028 é"}, {"prompt": "Q\n", "completion": "A"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_dataset(path) == read_dataset(str(path)) == read_dataset(rows) == read_dataset(iter(rows))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere\.jsonl': cannot be read \(No such file"):
        read_dataset(tmp_path / "nowhere.jsonl")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_dataset(tmp_path)


def test_a_dataset_that_is_too_large_is_refused_as_soon_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dataset, "MAX_DATASET_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "four times this is too much"}\n' * 4 + "never read")
    with pytest.raises(DatasetError, match=r"x\.jsonl: .* or 100 bytes"):
        read_dataset(path)
    with pytest.raises(DatasetError, match="or 100 bytes"):
        read_dataset([{"text": "x" * 101}])


@pytest.mark.parametrize("said", ["", "  "])
def test_a_conversation_in_which_only_the_user_speaks_is_refused(said: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]}]
    with pytest.raises(DatasetError, match="the assistant says nothing"):
        list(iterate_mappings(rows, "x"))
    only_user = [{"messages": [{"role": "user", "content": "Hello"}]}]
    with pytest.raises(DatasetError, match="the assistant says nothing"):
        list(iterate_mappings(only_user, "x"))


@pytest.mark.parametrize(
    "row",
    [{"messages": [{"role": "x" * 200_000, "content": "a"}]}, {"x" * 200_000: 1}, {f"k{i}": i for i in range(5000)},
     {"a\nb\x1b[31m": 1}],
    ids=["role", "long name", "many names", "no line"],
)  # fmt: skip
def test_an_error_about_a_row_is_one_short_line_whatever_the_row_holds(row: dict[str, Any]) -> None:
    with pytest.raises(DatasetError) as caught:
        list(iterate_mappings([row], "items"))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


def test_a_line_has_as_many_bytes_as_are_allowed_and_not_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 5)
    assert list(lines.numbered([b"12345\n", b"\n1234\r\n"], "x")) == [(1, b"12345"), (3, b"1234")]
    with pytest.raises(DatasetError, match="x, line 2: more than 5 bytes"):
        list(lines.numbered([b"12345\n123456\n"], "x"))


def test_a_text_of_a_file_has_as_many_characters_as_are_allowed_and_not_one_more(tmp_path: Path) -> None:
    source = Source(tmp_path / "texts.txt", "text")
    source.path.write_text("x" * MAX_TEXT_CHARS)
    assert source.survey()[0] == 1
    source.path.write_text("x" * (MAX_TEXT_CHARS + 1))
    with pytest.raises(DatasetError, match=f"line 1: {MAX_TEXT_CHARS + 1} characters; at most {MAX_TEXT_CHARS}"):
        source.survey()


def test_a_byte_order_mark_is_taken_from_the_beginning_of_a_file_and_from_no_other_line() -> None:
    mark = b"\xef\xbb\xbf"
    whole = [mark + b"a\n" + mark + b"b\n", mark + b"c"]
    assert list(lines.numbered(whole, "x")) == [(1, b"a"), (2, mark + b"b"), (3, mark + b"c")]

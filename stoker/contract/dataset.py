"""Training data: JSON lines, each `{"text": …}`, `{"prompt": …, "completion": …}` or `{"messages": […]}`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stoker.contract.beneath import Beneath
from stoker.contract.lines import RepeatedField, decoded, numbered, pieces, unrepeated
from stoker.contract.shown import as_json, trouble
from stoker.errors import DatasetError

#: Before the name of a dataset that is a file under the worker's data root.
ON_WORKER = "worker:"
MAX_EXAMPLES = 1_000_000
#: Letters of one example, all its texts together: more than `max_length` may be tokens, and what a tokenizer
#: makes of longer ones takes gigabytes and minutes.
MAX_EXAMPLE_CHARS = 1_000_000
#: What a string of the broker may hold.
MAX_DATASET_BYTES = 512 * 2**20

_ALLOWED = '{"text": …}, {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}'
#: Names of fields that an error lists.
_SHOWN = 8
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One example: `messages`, or else `prompt` and `completion`.

    The loss counts what the assistant says, or `completion`; a plain text is a completion of nothing.
    """

    prompt: str = ""
    completion: str = ""
    #: Each with `role` and `content`.
    messages: tuple[dict[str, str], ...] = ()

    def to_line(self) -> str:
        fields: dict[str, Any]
        if self.messages:
            fields = {"messages": self.messages}
        elif self.prompt:
            fields = {"prompt": self.prompt, "completion": self.completion}
        else:
            fields = {"text": self.completion}
        return json.dumps(fields, ensure_ascii=False)


def _nothing() -> None: ...


@dataclass(frozen=True)
class TrainInput:
    """What a training job needs in addition to its request: the dataset's JSON lines, or the file that holds them, and
    the version that its adapter shall have (None: the next one). `kept` is called in the engine's thread when there is
    a new checkpoint: it must return at once and raise nothing."""

    dataset: bytes | Path | Beneath
    version: int | None = None
    kept: Callable[[], object] = field(default=_nothing, compare=False)

    def lines(self) -> Iterator[bytes]:
        """For `iterate_lines`; a file is read piece by piece. Raises `DatasetError` if it cannot be read."""
        if isinstance(self.dataset, bytes):
            yield self.dataset
            return
        try:
            with self.dataset.open("rb") as file:
                yield from pieces(file)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.dataset.name}: cannot be read ({trouble(error)}).") from None


def iterate_lines(lines: Iterable[bytes], source: str) -> Iterator[Example]:
    """Parse JSON lines, one at a time; blank ones are skipped. A wrong one raises `DatasetError` with its number, from
    1."""
    return (_parse(line, f"{source}, line {number}") for number, line in numbered(lines, source))


def iterate_mappings(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Example]:
    """The same for objects that are there already; a wrong one is named by its number, from 1."""
    return (_example(row, f"{source}, item {number}") for number, row in enumerate(rows, 1))


def to_lines(examples: Iterable[Example], source: str) -> bytes:
    """The JSON lines of a whole dataset, as they are uploaded. Raises `DatasetError` for none, or for too many."""
    found, count = bytearray(), 0
    for count, example in enumerate(examples, 1):
        found += (b"\n" if found else b"") + example.to_line().encode()
        if count > MAX_EXAMPLES or len(found) > MAX_DATASET_BYTES:
            raise DatasetError(
                f"{source}: more than {MAX_EXAMPLES} examples or {MAX_DATASET_BYTES} bytes, the most that can be "
                f"uploaded. Put the file under a worker's STOKER_DATA and name it: {ON_WORKER}FILE."
            )
    if not count:
        raise DatasetError(f"{source}: no example in it; expected one JSON object a line, {_ALLOWED}.")
    return bytes(found)


def _parse(line: bytes, where: str) -> Example:
    text = decoded(line, where)
    try:
        row = json.loads(text, object_pairs_hook=unrepeated)
    except RepeatedField as error:
        raise DatasetError(f"{where}: {error}.") from None
    except RecursionError:
        raise DatasetError(f"{where}: nested too deeply; expected {_ALLOWED}.") from None
    except ValueError as error:
        raise DatasetError(f"{where}: not JSON ({error}); expected {_ALLOWED}.") from None
    return _example(row, where)


def _example(row: Any, where: str) -> Example:
    example = _typed(row, where)
    texts = [message["content"] for message in example.messages] or [example.prompt, example.completion]
    if (length := sum(map(len, texts))) > MAX_EXAMPLE_CHARS:
        raise DatasetError(
            f"{where}: {length} characters; at most {MAX_EXAMPLE_CHARS} of one example. Cut it into several."
        )
    return example


def _typed(row: Any, where: str) -> Example:
    if not isinstance(row, Mapping):
        raise DatasetError(f"{where}: {as_json(row)} given; expected an object, {_ALLOWED}.")
    fields = set(row)
    if fields == {"messages"}:
        return Example(messages=_messages(row["messages"], where))
    if fields == {"text"}:
        _check_text(row["text"], "text", where)
        prompt, completion = "", row["text"]
    elif fields == {"prompt", "completion"}:
        prompt, completion = row["prompt"], row["completion"]
    else:
        raise DatasetError(f"{where}: {_listed(fields)} given; expected {_ALLOWED}.")
    _check_text(prompt, "prompt", where)
    _check_text(completion, "completion", where)
    if not completion.strip():
        raise DatasetError(f"{where}: the text to learn is empty.")
    return Example(prompt=prompt, completion=completion)


def _listed(fields: set[Any]) -> str:
    """Names of fields on one line: a row may have any number of any length."""
    shown = sorted(field if isinstance(field, str) and field.isprintable() else as_json(field) for field in fields)
    more = f" and {len(shown) - _SHOWN} more fields" if len(shown) > _SHOWN else ""
    return ", ".join(name if len(name) <= 60 else f"{name[:59]}…" for name in shown[:_SHOWN]) + more or "no fields"


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list | tuple) or not value:
        raise DatasetError(f"{where}: messages must be a list with at least one message.")
    found = []
    for number, message in enumerate(value, 1):
        source = f"{where}, message {number}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise DatasetError(f'{source}: expected an object {{"role": …, "content": …}}.')
        if message["role"] not in _ROLES:
            raise DatasetError(f"{source}: role {as_json(message['role'])} given; allowed: {', '.join(_ROLES)}.")
        _check_text(message["content"], "content", source)
        found.append({"role": str(message["role"]), "content": str(message["content"])})
    if not any(message["role"] == "assistant" and message["content"].strip() for message in found):
        raise DatasetError(f"{where}: the assistant says nothing in it, so there is nothing to learn.")
    return tuple(found)


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DatasetError(f"{where}: {name} is {as_json(value)}; expected text.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{where}: {name} holds half a surrogate pair, which is no text.") from None

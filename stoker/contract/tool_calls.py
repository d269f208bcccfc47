"""Calls of functions in what a model writes, found piece by piece.

Models write a call as they were trained to. Neither the gateway nor a client sees which model has which template: the
form is known by the answer alone, and each is taken from any model.

- Hermes, Qwen, SmolLM: `<tool_call>CALL</tool_call>`, anywhere in the answer and as often as the model likes.
- Llama 3: `<|python_tag|>CALL`, Mistral: `[TOOL_CALLS]CALL`, from there to the end.
- Mistral since 2025: `[TOOL_CALLS]NAME[ARGS]{…}`, as often as the model likes, from there to the end.
- The last three without their markers, which are special tokens that workers leave out of texts: then the calls are the
  whole answer; or, as `NAME{…}`, the end of one that says something before.
- Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`, as Hermes's.

CALL is JSON: an object with `name` and `arguments` (or `parameters`), or a list of such objects. All of them have to be
functions that the request names; else the marker and what stands behind it are text. So is a call that is cut or
broken; whole ones before it are made. A VALUE is a text where the schema of the function says so; else what it is as
JSON, or a text if it is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from stoker.contract.call_forms import ARGS, CALL_ID, VALUE, VALUE_END, XML, Functions, named_calls, xml_call
from stoker.contract.parts import Arguments, Begun, FunctionCall, Part, begun_marker

_OPENER, _CLOSER = _MARKERS = "<tool_call>", "</tool_call>"
_OPENERS = (_OPENER, "<|python_tag|>", "[TOOL_CALLS]")
#: What matters to the end of a call: an escaped character and a quote within JSON, and the markers.
_MARKS = re.compile(rf'\\.|"|{_CLOSER}|{_OPENER}', re.DOTALL)
#: The same of Qwen3-Coder's form, none longer than the closer.
_XML_MARKS = re.compile(f"{VALUE}|{VALUE_END}|{_CLOSER}|{_OPENER}")
#: What matters to where an object of JSON ends.
_BRACES = re.compile(r'\\.|["{}]', re.DOTALL)
#: A call in JSON that begins with its name.
_NAME = re.compile(r'\s*(?:\[\s*)?\{\s*"name"\s*:\s*"([^"\\]*)"')
#: Fields of a call; some models write the last two as well.
_FIELDS = frozenset({"name", "arguments", "parameters", "id", "type"})
#: How the JSON of calls begins, without its blanks.
_BEGINNINGS = tuple(f'{bracket}{{"{name}"' for bracket in ("", "[") for name in sorted(_FIELDS))
#: So many characters say whether it begins so.
_TELLING = 64


class CallReader:
    """Finds calls of `functions`: their names, or these with the schemas of their arguments. `parallel` false: the
    first one is the only one."""

    def __init__(self, functions: Functions | Iterable[str], *, parallel: bool = True) -> None:
        self._functions: Functions = functions if isinstance(functions, Mapping) else {name: {} for name in functions}
        self._parallel = parallel
        #: How Mistral's newer form begins.
        self._named = tuple(f"{name}{mark}" for name in self._functions for mark in ("{", ARGS, CALL_ID))
        #: The same without its markers, behind a text; and what may become one of all markers.
        bare = [f"{name}{{{mark}" for name in self._functions for mark in '"}']
        self._opening = re.compile("|".join(map(re.escape, (*_OPENERS, *bare))))
        self._begun = frozenset(marker[:end] for marker in (*_OPENERS, *bare) for end in range(1, len(marker)))
        self._longest = max(map(len, self._begun))
        #: Text that is not decided on: from `_at` on; before it stands what is done with.
        self._held, self._at = "", 0
        #: The marker of the call that may have begun before `_at`; "": the answer may be one without; None: none has.
        self._opener: str | None = ""
        #: Characters of it that are text if it is none, though it has no marker; and the last one before `_held`.
        self._bare, self._last = 0, ""
        #: How far that call was looked through, and whether a string of its JSON, or a value of its XML, is open there.
        self._seen, self._quoted = 0, False
        #: Of a call without a closer: where its newest object begins, where its last whole one ends, and how many
        #: braces are open.
        self._object, self._whole, self._depth = 0, 0, 0
        #: Blanks before a text or a call; next to calls they say nothing.
        self._blank, self._silent, self._called = "", True, False

    def feed(self, text: str) -> list[Part]:
        self._held += text
        parts = self._parts(ended=False)
        self._last, passed = self._before(self._at), self._at
        self._held, self._seen, self._at = self._held[self._at :], self._seen - self._at, 0
        self._object, self._whole = self._object - passed, self._whole - passed
        return parts

    def finish(self) -> list[Part]:
        parts = self._parts(ended=True)
        return parts if self._called or not self._blank else [*parts, self._blank]

    def _parts(self, *, ended: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            begun = self._opener is not None
            more = self._call(parts, ended=ended) if begun else self._text(parts, ended=ended)
            if not more:
                return parts

    def _text(self, parts: list[Part], *, ended: bool) -> bool:
        """Pass on text up to the next marker, or what may become one. Whether one was found."""
        found = next(filter(self._opens, self._opening.finditer(self._held, self._at)), None)
        if found is None:
            end = len(self._held) - (0 if ended else self._may_begin())
            self._say(parts, self._held[self._at : end])
            self._at = end
            return False
        self._say(parts, self._held[self._at : found.start()])
        self._quoted, self._depth = False, 0
        if found.group() in _OPENERS:
            self._at = self._seen = found.end()
            self._opener = found.group()
        else:
            self._at = self._seen = found.start()
            self._opener, self._bare = "", len(found.group())
        return True

    def _opens(self, found: re.Match[str]) -> bool:
        """Whether a call may begin there: a name that is the end of a word is none."""
        before = self._before(found.start())
        return found.group() in _OPENERS or not (before.isalnum() or before in ("_", "-"))

    def _before(self, at: int) -> str:
        return self._held[at - 1] if at else self._last

    def _may_begin(self) -> int:
        """How many characters at the end may be the beginning of a marker."""
        held, most = self._held, min(len(self._held) - self._at, self._longest)
        return next((length for length in range(most, 0, -1) if held[-length:] in self._begun), 0)

    def _call(self, parts: list[Part], *, ended: bool) -> bool:
        """Make calls of what stands behind the marker, or text of the marker. Whether that is decided."""
        end = self._end(ended=ended) if self._may_be_call() else self._at
        if end is None:
            return False
        calls = self._calls(self._held[self._at : end])
        if not calls and self._opener != _OPENER:
            # Of several in Mistral's newer form one may be cut, or broken.
            _, length = named_calls(self._held[self._at : end])
            if length and self._another(self._at + length):
                end = self._at + length
                calls = self._calls(self._held[self._at : end])
        if calls:
            self._made(parts, calls)
            # A closer that was cut says nothing more than a whole one.
            self._at = min(end + len(_CLOSER), len(self._held)) if self._closes(end) else end
        else:
            passed = self._at + self._bare
            self._say(parts, (self._opener or "") + self._held[self._at : passed])
            self._at = passed
        self._opener, self._bare = None, 0
        return True

    def _closes(self, end: int) -> bool:
        behind = self._held[end : end + len(_CLOSER)]
        return self._opener == _OPENER and bool(behind) and _CLOSER.startswith(behind)

    def _end(self, *, ended: bool) -> int | None:
        """Where the call ends; None: it goes on. A marker within a string of its JSON ends nothing."""
        if self._opener == _OPENER and not XML.startswith(self._beginning()[: len(XML) - 1]):
            for mark in _MARKS.finditer(self._held, self._seen):
                self._seen = mark.end()
                if mark.group() == '"':
                    self._quoted = not self._quoted
                elif mark.group() in (_CLOSER, _OPENER) and not self._quoted:
                    return mark.start()
            # The last characters may be a part of a mark.
            self._seen = max(self._seen, len(self._held) - len(_CLOSER) + 1)
        elif self._opener == _OPENER and self._beginning().startswith(XML):
            for mark in _XML_MARKS.finditer(self._held, self._seen):
                self._seen = mark.end()
                if mark.group() in (VALUE, VALUE_END):
                    self._quoted = mark.group() == VALUE
                elif not self._quoted:
                    return mark.start()
            self._seen = max(self._seen, len(self._held) - len(_CLOSER) + 1)
        elif not ended and not self._goes_on():
            return len(self._held)
        if not ended:
            return None
        return len(self._held) - (begun_marker(self._held[self._at :], _MARKERS) if self._opener == _OPENER else 0)

    def _goes_on(self) -> bool:
        """Whether a call that goes to the end of the answer may do so still: each object of it is a call, and nothing
        stands behind that is none. What is text is known where the first one is not."""
        for mark in _BRACES.finditer(self._held, self._seen):
            # A part of an escaped character may be the last that is here.
            self._seen = mark.end()
            if mark.group() == '"' and self._depth:
                self._quoted = not self._quoted
            elif mark.group() == "{" and not self._quoted:
                self._object = self._object if self._depth else mark.start()
                self._depth += 1
            elif mark.group() == "}" and not self._quoted:
                self._depth -= 1
                self._whole = mark.end()
                if self._depth <= 0 and not self._is_call():
                    return False
        return bool(self._depth) or self._whole <= self._at or self._another(self._whole)

    def _another(self, end: int) -> bool:
        """Whether what stands behind the last whole object, which ends there, may be a further call, or nothing."""
        behind = "".join(self._held[end : end + _TELLING].split())
        if behind and self._beginning().startswith("["):
            return behind.startswith(",") or behind == "]"
        return not behind or any(behind[: len(form)] == form[: len(behind)] for form in (*_OPENERS, *self._named))

    def _is_call(self) -> bool:
        """Whether the last whole object is a call, or the arguments of one."""
        begin = self._object if self._beginning().startswith("[") else self._at
        return self._depth == 0 and bool(self._calls(self._held[begin : self._whole]))

    def _say(self, parts: list[Part], text: str) -> None:
        if self._silent:
            text = self._blank + text
            self._silent = not text or text.isspace()
            self._blank = text if self._silent else ""
        if text and not self._silent:
            parts.append(text)

    def _made(self, parts: list[Part], calls: list[FunctionCall]) -> None:
        if not self._parallel:
            calls = [] if self._called else calls[:1]
        self._blank, self._silent, self._called = "", True, True
        for call in calls:
            parts += (Begun(call.name), Arguments(call.arguments))

    def _beginning(self) -> str:
        """How what stands behind the marker begins, without its blanks."""
        return "".join(self._held[self._at : self._at + _TELLING].split())

    def _may_be_call(self) -> bool:
        named = _NAME.match(self._held, self._at)
        if named is not None and named[1] not in self._functions:
            return False
        begins = self._beginning()
        forms = (*_BEGINNINGS, XML) if self._opener == _OPENER else (*_BEGINNINGS, *self._named)
        return any(begins[: len(form)] == form[: len(begins)] for form in forms)

    def _calls(self, text: str) -> list[FunctionCall]:
        """The calls that `text` is; none, where it is anything else."""
        beginning = self._beginning()
        try:
            if beginning.startswith(XML):
                name, arguments = xml_call(text, self._functions)
                return [self._one({"name": name, "arguments": arguments})]
            if not beginning.startswith(("{", "[")):
                named, end = named_calls(text)
                if text[end:].strip():
                    raise ValueError("no call")
                return [self._one({"name": name, "arguments": given}) for name, given in named]
            found = json.loads(text)
            return [self._one(item) for item in (found if isinstance(found, list) else [found])]
        except (ValueError, RecursionError):
            return []

    def _one(self, item: Any) -> FunctionCall:
        """Raises `ValueError` for what is no call."""
        if not isinstance(item, dict) or not item.keys() <= _FIELDS or ("arguments" in item) == ("parameters" in item):
            raise ValueError("no call")
        name = item.get("name")
        if not isinstance(name, str) or name not in self._functions:
            raise ValueError("no function of the request")
        return FunctionCall(name, _dumped(item.get("arguments", item.get("parameters"))))


def _dumped(arguments: Any) -> str:
    """JSON of the object that a call's arguments are; some models write it as a text. Raises `ValueError`."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(given, dict):
        raise ValueError("no object")
    # Infinity and half a surrogate pair are read as JSON, and cannot be sent as such.
    text = json.dumps(given, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def object_of(arguments: str) -> dict[str, Any] | None:
    """The arguments of a call as an object; None for those that were cut off."""
    try:
        found: dict[str, Any] = json.loads(_dumped(arguments))
    except (ValueError, RecursionError):
        return None
    return found

"""The program that renders chat templates for `engine.text.chat`, in a process with limits.

`engine.platform.child` loads it by its path. It imports nothing of Stoker.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class RefusedByTemplate(TemplateError):
    """The template called `raise_exception`."""


class TooMuch(Exception):
    """A limit was passed."""


class GenerationTag(Extension):
    """`{% generation %}` marks what a model said, for training masks; here its body is rendered and no more."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class SafeNamespace(Namespace):
    """`namespace()`, without the names through which a template could reach Python's own machinery."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        Namespace.__init__(self, *rest, **values)
        for name in dict(*rest, **values):
            SafeNamespace._check(name)

    def __setitem__(self, name: str, value: Any) -> None:
        SafeNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name that starts with an underscore, such as {name!r}")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, in which no product or power is larger than what may be printed."""

    intercepted_binops = frozenset(["*", "**"])
    largest = 1_000_000

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _bits(left) * abs(right) > 4096:
            raise TooMuch("a power of more than 4096 bits")
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, (str, list, tuple)) and len(value) * int(times) > self.largest:
                raise TooMuch(f"a product of more than {self.largest} elements")
        return super().call_binop(context, operator, left, right)


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 1


def raise_exception(message: object) -> None:
    raise RefusedByTemplate(str(message))


def strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def clock_at(moment: str | None) -> dict[str, Callable[..., Any]]:
    """What a template has instead of today's clock where it is to write another moment, in ISO 8601."""
    return {} if moment is None else {"strftime_now": datetime.fromisoformat(moment).strftime}


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where Jinja's own filter would write it for HTML."""
    if isinstance(indent, int) and indent > 64:
        raise TooMuch(f"an indent of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def compiled(text: str) -> Template:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    sandbox.filters["tojson"] = to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": SafeNamespace,
    }
    sandbox.globals.update(functions)
    return sandbox.from_string(text)


def render(template: str, variables: dict[str, Any], most: int) -> str:
    parts, size = [], 0
    for part in compiled(template).generate(**variables):
        size += len(part)
        if size > most:
            raise TooMuch(f"more than {most} characters of output")
        parts.append(part)
    return "".join(parts)


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """{"text"}, or {"refused"}: the template's own words, {"template"}: it is unusable, {"input"}: it fails on this."""
    try:
        variables = {**request["variables"], **clock_at(request["moment"])}
        return {"text": render(request["template"], variables, request["most"])}
    except RefusedByTemplate as error:
        return {"refused": str(error)}
    except TemplateSyntaxError as error:
        return {"template": f"line {error.lineno}: {error}"}
    except (TooMuch, SecurityError, RecursionError, MemoryError, OverflowError) as error:
        return {"template": f"{type(error).__name__}: {error}"}
    except Exception as error:  # a template can provoke errors of every class
        return {"input": f"{type(error).__name__}: {error}"}

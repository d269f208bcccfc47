"""Chat templates: the messages of a conversation as the one text that the model was trained to continue.

A template comes with the model and is a program, so it is not trusted. It is rendered by Jinja's immutable sandbox,
as transformers does it, in a process of its own (`engine/text/chat_process.py`) that is started by the first call and
kept. What is limited:

- time: an alarm of the system ends the process in the middle of its work; the next call starts another one;
- output, counted while it is made, and the size of the template;
- what a template can reach: no attribute with an underscore, no change of what it is given, ranges of 100,000;
- memory: 1 GB of address space on Linux. macOS has no such limit; there the time limit bounds it.

Calls from several threads wait for one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.platform.limited import LimitedProcess, LimitPassed
from stoker.errors import InvalidRequest, ModelError

#: Variables that a request has fields for, or that are so for every answer.
_OWN = ("messages", "tools", "add_generation_prompt")


@dataclass(frozen=True)
class ChatLimits:
    """`seconds` to render, `output` characters, `template` characters."""

    seconds: float = 1.5
    output: int = 4_000_000
    template: int = 1_000_000


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    names: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    moment: datetime | None = None,
    limits: ChatLimits | None = None,
) -> str:
    """The text of `messages`, as transformers' `apply_chat_template` gives it.

    `names` are the model's special tokens by the names that templates use, such as `sep_token`; `moment` is what its
    clock says, None: now.

    Messages, tools and `extra` (further variables, such as `enable_thinking` and `documents`) are JSON values. Raises
    `InvalidRequest` for a conversation that the template refuses or fails on, and for `extra` that holds one of its
    parts; `ModelError` for a template that is broken, forbidden things or beyond its limits.
    """
    limits = limits or ChatLimits()
    if given := [name for name in _OWN if name in (extra or {})]:
        raise InvalidRequest(f"template: {given[0]} given, which is no further variable: it follows from the request")
    if len(template) > limits.template:
        raise ModelError(f"the chat template has {len(template)} characters; {limits.template} are allowed")
    variables = {
        **(names or {}),
        "documents": None,
        **(extra or {}),
        # A key without a value is left out, as transformers does: templates would write "None".
        "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    said = None if moment is None else moment.isoformat()
    request = {"template": template, "variables": variables, "most": limits.output, "moment": said}
    try:
        return _text(renderer.ask(request, limits.seconds))
    except LimitPassed:
        return _text({"template": f"it took more than {limits.seconds:g} s, or more memory than it may have"})
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages, tools and template variables must be JSON values: {error}") from error


def _text(reply: Mapping[str, str]) -> str:
    if "text" in reply:
        return reply["text"]
    if "refused" in reply:
        raise InvalidRequest(f"the model's chat template refuses the conversation: {reply['refused'][:500]}")
    if "input" in reply:
        raise InvalidRequest(f"the model's chat template fails on the conversation: {reply['input'][:500]}")
    raise ModelError(f"the model's chat template cannot be used: {reply['template'][:500]}")


renderer = LimitedProcess(Path(__file__).with_name("chat_process.py"), "renders chat templates with jinja2", "passing")

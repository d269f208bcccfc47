"""Chat templates: the messages of a conversation as the one text that the model was trained to continue.

A template comes with the model and is a program, so it is not trusted. It is rendered by Jinja's immutable sandbox,
as transformers does it, in a process of its own (`engine/text/chat_process.py`) that is started by the first call and
kept. What is limited:

- time: an alarm of the system ends the process, in whatever it does; the next call starts another one;
- output, counted while it is made, and the size of the template;
- what a template can reach: no attribute with an underscore, no change of what it is given, ranges of 100,000;
- memory: 1 GB of address space on Linux. macOS has no such limit; there the time limit bounds it.

Calls from several threads wait for one another.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stoker.errors import InvalidRequest, ModelError

_PROGRAM = Path(__file__).with_name("chat_process.py")
_MEMORY = 1 << 30
#: Seconds: Python and Jinja start in 0.1 s; a machine under load takes longer.
_START_PATIENCE = 20.0


@dataclass(frozen=True)
class Limits:
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
    bos_token: str | None = None,
    eos_token: str | None = None,
    extra: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
) -> str:
    """The text of `messages`, as transformers' `apply_chat_template` gives it.

    Messages, tools and `extra` (further variables, such as `enable_thinking`) are JSON values. Raises `InvalidRequest`
    for a conversation that the template refuses or fails on, `ModelError` for a template that is broken, forbidden
    things or beyond its limits.
    """
    limits = limits or Limits()
    if len(template) > limits.template:
        raise ModelError(f"the chat template has {len(template)} characters; {limits.template} are allowed")
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    variables = {
        **{name: token for name, token in tokens.items() if token is not None},
        **(extra or {}),
        # A key without a value is left out, as transformers does: templates would write "None".
        "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    request = {"template": template, "variables": variables, "most": limits.output, "seconds": limits.seconds}
    try:
        line = json.dumps(request, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"messages, tools and template variables must be JSON values: {error}") from error
    return _text(_renderer.ask(line, limits.seconds))


def _text(reply: Mapping[str, str]) -> str:
    if "text" in reply:
        return reply["text"]
    if "refused" in reply:
        raise InvalidRequest(f"the model's chat template refuses the conversation: {reply['refused'][:500]}")
    if "input" in reply:
        raise InvalidRequest(f"the model's chat template fails on the conversation: {reply['input'][:500]}")
    raise ModelError(f"the model's chat template cannot be used: {reply['template'][:500]}")


class _Renderer:
    """The process, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, line: bytes, seconds: float) -> dict[str, str]:
        with self._lock:
            process = self._running()
            try:
                _write(process, line)
                # The alarm within is the limit; this one is for a machine that has no time to let it ring.
                reply = _read_line(process, seconds + _START_PATIENCE)
            except (OSError, EOFError):
                self._end()
                return {"template": f"it took more than {seconds:g} s, or more memory than it may have"}
            except BaseException:  # an answer that nobody read must not become the next call's
                self._end()
                raise
        answer: dict[str, str] = json.loads(reply)
        return answer

    def _running(self) -> subprocess.Popen[bytes]:
        # A process that was forked from ours must not share its pipes.
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._end()
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", str(_PROGRAM), str(_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            _read_line(self._process, _START_PATIENCE)
        except (OSError, EOFError) as error:
            self._end()
            raise ModelError(
                f"{_PROGRAM.name}, which renders chat templates, does not start: is jinja2 there?"
            ) from error
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    if process.stdin is None:
        raise EOFError
    process.stdin.write(line)
    process.stdin.flush()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """One line of its output. Raises `EOFError` when it ended, `TimeoutError` (an `OSError`) after `seconds`."""
    if process.stdout is None:
        raise EOFError
    parts: list[bytes] = []
    end = time.monotonic() + seconds
    while not parts or not parts[-1].endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError
        parts.append(os.read(process.stdout.fileno(), 1 << 20))
        if not parts[-1]:
            raise EOFError
    return b"".join(parts)


_renderer = _Renderer()

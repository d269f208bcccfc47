"""A conversation as the model's template writes it, and which of it the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from engine.text import chat
from engine.text.templates import choose
from engine.text.tokenizer import Tokenizer
from stoker.errors import InvalidRequest

_Messages = Sequence[dict[str, str]]
#: Stands for what the assistant says while its position in the text is looked for.
_MARK = "Zq7WhatIsSaidHere7qZ"
#: When conversations are written, for templates that write the date: a run that goes on the next day, or on a worker of
#: another time zone, has the same examples. It is the date that Llama 3's templates write where they have no clock.
_MOMENT = datetime(2024, 7, 26)


@dataclass
class Written:
    """`text` of a conversation; `learned`: the stretches (start, end) of it that the assistant is to learn."""

    text: str = ""
    learned: list[tuple[int, int]] = field(default_factory=list)


class Writer:
    """Writes conversations with the template of a model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._names = tokenizer.manners.names
        self._templates = tokenizer.templates

    def write(self, messages: _Messages) -> list[Written]:
        """Each of the assistant's turns as it is written at the moment it is said, its end included.

        That is one text, unless the template writes earlier turns anew when later ones come (Qwen3 leaves out what was
        thought): then a turn that does not go on behind the one before has a text of its own. Raises `InvalidRequest`.
        """
        found: list[Written] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text = self._render(messages[: index + 1])
            start = self._start(messages[: index + 1], text)
            if not found or not text.startswith(found[-1].text):
                found.append(Written())
            found[-1].text = text
            found[-1].learned.append((start, len(text)))
        return found

    def _start(self, messages: _Messages, text: str) -> int:
        """Where the last message of `text`, which is the assistant's, begins: behind what asks for it, as in use."""
        asked = self._asked(messages[:-1])
        if asked and text.startswith(asked):
            return len(asked)
        # Nobody asks for it, or the template asks otherwise than it writes: from the first word that is said.
        marked = self._render([*messages[:-1], {**messages[-1], "content": _MARK}])
        before, mark, behind = marked.partition(_MARK)
        if mark and text.startswith(before) and text[len(before) :].endswith(behind):
            return len(before)
        raise InvalidRequest(
            f"the model's chat template writes message {len(messages)}, the assistant's, so that what is said cannot "
            'be separated from what surrounds it. Give it as {"prompt", "completion"}.'
        )

    def _asked(self, messages: _Messages) -> str:
        """What asks for an answer to `messages`; nothing where none can be asked for."""
        try:
            return self._render(messages, generate=True) if messages else ""
        except InvalidRequest:
            return ""

    def _render(self, messages: _Messages, *, generate: bool = False) -> str:
        template = choose(self._templates, tools=False, model="the model")
        return chat.render(template, messages, add_generation_prompt=generate, names=self._names, moment=_MOMENT)

"""`stoker chat`: a conversation on a terminal, or from a file or pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from stoker.cli import inputs
from stoker.cli.generate import Adapter, MaxTokens, Temperature, TopP
from stoker.cli.options import Model, Url, connect, for_output, notes
from stoker.client import Client
from stoker.client.options import GenerateOptions
from stoker.contract.kinds import GENERATE
from stoker.errors import InvalidRequest, StokerError, TextTooLong
from stoker.local.interrupts import AskedToEnd

HELP = """/help             this list
/clear            forget the conversation
/model NAME       talk with another model; the conversation stays
/adapter NAME     generate with an adapter; without a name: with none
/system TEXT      the system's message, from the next answer on; without a text: none
/retry            answer the last message again, with another seed
/exit             end (also Ctrl-D); Ctrl-C stops an answer"""


def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="The system's message, before all others.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Annotated[int | None, typer.Option(help="Of the first answer, and counted on: the same talk again.")] = None,
    url: Url = None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, /help lists what can be typed, /exit or Ctrl-D ends it."""
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    with connect(url) as client:
        conversation = Conversation(client, client.choose_model(model, GENERATE.name), options)
        conversation.adapter, conversation.system, conversation.seed = adapter, system, seed
        if sys.stdin.isatty():
            conversation.note(f"{conversation.described()}. /help lists what can be typed.")
        for line in lines_said():
            conversation.take(line)
    if sys.stdin.isatty():
        print()
    elif conversation.failed is not None:
        # A program that does not read the notes learns it so.
        raise typer.Exit(conversation.failed.exit_code)


class Conversation:
    """What was said, with whom, and the commands that change it."""

    def __init__(self, client: Client, model: str, options: GenerateOptions) -> None:
        self._client, self._model, self._options = client, model, options
        self._messages: list[dict[str, str]] = []
        self.adapter: str | None = None
        self.system: str | None = None
        #: The seed of the next answer, which counts on; None: a new one for each.
        self.seed: int | None = None
        #: The first error that did not end the conversation.
        self.failed: StokerError | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.note(HELP),
            "/clear": lambda _: self._messages.clear(),
            "/model": self._use_model,
            "/adapter": self._use_adapter,
            "/system": self._use_system,
            "/retry": lambda _: self._retry(),
        }

    def described(self) -> str:
        return f"{self._model}, " + (f"adapter {self.adapter}" if self.adapter else "no adapter")

    def note(self, text: str) -> None:
        """Print what is not the model's answer, on standard error."""
        notes().print(text, style="dim", markup=False)

    def take(self, line: str) -> None:
        """A command, or a message to answer."""
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            self._messages.append({"role": "user", "content": line})
            self._answer()
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            self.note(f"{name} given; /help lists what can be typed.")

    def _use_model(self, name: str) -> None:
        try:
            self._model = self._client.choose_model(name or None, GENERATE.name)
        except StokerError as error:
            self._forgive(error, str(error))
            return
        self.note(self.described())

    def _use_adapter(self, name: str) -> None:
        self.adapter = name or None
        self.note(self.described())

    def _use_system(self, text: str) -> None:
        self.system = text or None

    def _retry(self) -> None:
        while self._messages and self._messages[-1]["role"] == "assistant":
            self._messages.pop()
        if self._messages:
            self._answer()
        else:
            self.note("nothing to answer yet")

    def _answer(self) -> None:
        """Show the answer to the last message. What cannot be answered is forgotten, and the conversation goes on."""
        start = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            said = self._shown([*start, *self._messages])
        except TextTooLong as error:
            self._messages.pop()
            self._forgive(error, "the conversation has become too long for the model: /clear forgets it")
        except StokerError as error:
            # Those who type would lose all that was said; a program learns by the exit code what went wrong.
            if not (isinstance(error, InvalidRequest) or sys.stdin.isatty()):
                raise
            self._messages.pop()
            self._forgive(error, str(error))
        else:
            self._messages.append({"role": "assistant", "content": said})

    def _forgive(self, error: StokerError, said: str) -> None:
        self.failed = self.failed or error
        self.note(said)

    def _shown(self, messages: list[dict[str, str]]) -> str:
        """Show an answer as it is made. Ctrl-C ends it (and cancels the job); what was said until then counts."""
        said, seed = "", self.seed
        self.seed = None if seed is None else (seed + 1) % 2**63
        options: GenerateOptions = {**self._options, "adapter": self.adapter}
        try:
            # To send it takes long where the queue is full, or the broker away.
            job = self._client.generate(messages, model=self._model, seed=seed, **options)
            for token in job.stream():
                said += token.text
                print(for_output(token.text), end="", flush=True)
        except AskedToEnd:
            raise
        except KeyboardInterrupt:
            notes().print(" [dim](stopped)[/dim]", end="")
        except StokerError:
            if said:
                print()
            raise
        print()
        return said


def lines_said() -> Iterator[str]:
    """What is typed, or the lines of a file or pipe, until `/exit` or the end."""
    try:
        for line in _typed() if sys.stdin.isatty() else inputs.lines():
            said = line.strip()
            if said == "/exit":
                return
            if said:
                yield said
    except AskedToEnd:
        raise
    except (EOFError, KeyboardInterrupt):
        return


def _typed() -> Iterator[str]:
    # With it, `input` edits lines, and the arrow keys bring back what was typed before.
    import readline  # noqa: F401

    while True:
        try:
            yield input("> ")
        except UnicodeDecodeError:
            notes().print("[dim]that was not in the terminal's encoding: say it again[/dim]")

# Generated from stoker/client/_async/models.py by `make format`: edit that file.
"""The models of the workers as clients see them: `client.models`."""

from __future__ import annotations

from collections.abc import Callable

from stoker.client._sync.link import Link
from stoker.client.commands import command_of, worker_for
from stoker.contract import ModelCard
from stoker.contract.control import ModelReport, ModelVerb


class Models:
    """Called, it says which models there are; its methods ask a worker to hold one, or to let go of one.

    `worker`: the name of a worker, as `stoker status` shows it, or the part of it before the `@`; it may be left out
    where just one can be meant. `timeout`: seconds to wait; None: for as long as the worker lives. A worker follows one
    command after the other. Each raises `WorkerUnavailable` for a worker that is away, and `JobTimeout`.
    """

    def __init__(self, link: Link, changed: Callable[[], None]) -> None:
        """`changed` is called when a command has come to its end."""
        self._link, self._changed = link, changed

    def __call__(self) -> dict[str, ModelCard]:
        """Every model that some worker serves, may load, or lately served."""
        return self._link.models()

    def load(self, model: str, *, worker: str | None = None, timeout: float | None = None) -> ModelReport:
        """Make a model warm: a name that the worker's settings or the catalogue have, a path on the worker's machine,
        another source, or NAME=SOURCE. The report says which models made way. One that is warm stays as its files
        were when it was loaded: unload it first where they have changed. Raises `ModelError` for one that cannot
        be loaded, or has no room; then all is as it was."""
        return self._command("load", model, worker, timeout)

    def unload(self, model: str, *, worker: str | None = None, timeout: float | None = None) -> ModelReport:
        """Free all that a model takes. Raises `InvalidRequest` while it is pinned or a job of it runs there."""
        return self._command("unload", model, worker, timeout)

    def pin(self, model: str, *, worker: str | None = None, timeout: float | None = None) -> ModelReport:
        """Let a model neither make way for another nor be unloaded."""
        return self._command("pin", model, worker, timeout)

    def unpin(self, model: str, *, worker: str | None = None, timeout: float | None = None) -> ModelReport:
        """Take `pin` back."""
        return self._command("unpin", model, worker, timeout)

    def _command(self, verb: ModelVerb, model: str, worker: str | None, timeout: float | None) -> ModelReport:
        command = command_of(verb, model)
        asked = worker_for(command, worker, self._link.workers())
        try:
            return self._link.command(asked, command, timeout)
        finally:
            self._changed()

"""Flower's own templates, with the few lines that Stoker's pages need in them, and Stoker's own page.

A template is changed as it is loaded. A line that is not there any more is an error that names it, so that another
release of Flower cannot drop the page or bring back a button in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import flower
from tornado import template

from stoker.errors import ConfigError

OWN = Path(__file__).parent / "templates"
THEIRS = Path(flower.__file__).parent / "templates"


@dataclass(frozen=True)
class Change:
    """In the template `name`, `new` stands for `old`, which is there once."""

    name: str
    old: str
    new: str


_BROKER_LINK = ">Broker</a>\n        </li>\n"
_FILTER = '    <button class="task-state-filter" type="button" data-task-state='
CHANGES = (
    Change(
        "navbar.html",
        _BROKER_LINK,
        _BROKER_LINK
        + """        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'stoker' %} active{% end %}" href="{{ reverse_url('stoker') }}"
            {% if active_tab == 'stoker' %}aria-current="page"{% end %}>Stoker</a>
        </li>
""",
    ),
    # What Stoker's workers have no use for: pool size, autoscaling, rate limits, queues by hand.
    Change(
        "base.html",
        "  </head>",
        """    <link href="{{ reverse_url('stoker-static', 'flower.css') }}" rel="stylesheet">\n  </head>""",
    ),
    # A job that waits can be revoked too.
    Change(
        "task.html",
        'task.state == "RECEIVED" or task.state == "RETRY"',
        'task.state in ("PENDING", "RECEIVED", "RETRY")',
    ),
    Change(
        "tasks.html",
        f'{_FILTER}"STARTED"',
        f'{_FILTER}"PENDING" aria-pressed="false">Waiting</button>\n{_FILTER}"STARTED"',
    ),
)


class Loader(template.Loader):
    """Stoker's templates, else Flower's."""

    def __init__(self) -> None:
        super().__init__(str(THEIRS))

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        # All templates lie in one folder, and none names another by a path.
        return name

    def _create_template(self, name: str) -> template.Template:
        own = OWN / name
        text = own.read_text("utf-8") if own.is_file() else changed(name, (THEIRS / name).read_text("utf-8"))
        return template.Template(text, name=name, loader=self)


def changed(name: str, text: str) -> str:
    """A template of Flower's with its changes. Raises `ConfigError`."""
    for change in CHANGES:
        if change.name == name:
            if text.count(change.old) != 1:
                raise ConfigError(
                    f"Flower {flower.__version__}: its template {name} does not have, once, the line that Stoker "
                    f"changes ({change.old.strip()[:60]!r}). Install Flower 2.2: pip install '.[monitor]', "
                    "from a checkout."
                )
            text = text.replace(change.old, change.new)
    return text

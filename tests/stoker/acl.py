"""A broker with the users of `deploy/acl/users.acl.template`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from stoker.local.broker import free_port, server_binary
from stoker.settings import Settings
from tests.stoker.clocked import started

TEMPLATE = Path(__file__).parent.parent.parent / "deploy" / "acl" / "users.acl.template"
ROLES = ("admin", "client", "operator", "worker", "flower", "replica", "sentinel")


@dataclass(frozen=True)
class Guarded:
    """Where the broker is, and a client of its administrator's."""

    port: int
    home: Path
    admin: Any

    def settings(self, role: str) -> Settings:
        return Settings(url=f"redis://{role}:{role}-password@127.0.0.1:{self.port}/0", home=self.home, patience=2)

    def denied(self) -> list[str]:
        """What users have asked for and may not, since the last call."""
        found = [f"{row['username']}: {row['reason']} {row['object']}" for row in self.admin.acl_log()]
        self.admin.acl_log_reset()
        return found


def rights() -> str:
    text = TEMPLATE.read_text()
    for role in ROLES:
        assert text.count(f"@{role.upper()}_PASSWORD@") == 1
        text = text.replace(f"@{role.upper()}_PASSWORD@", f"{role}-password")
    return text


@contextmanager
def guarded_broker(folder: Path) -> Iterator[Guarded]:
    port = free_port(0)
    (folder / "users.acl").write_text(rights())
    command = [str(server_binary()), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", "",
               "--aclfile", str(folder / "users.acl")]  # fmt: skip
    admin: Any = redis.Redis(port=port, username="admin", password="admin-password", decode_responses=True)
    with started(command, admin):
        yield Guarded(port, folder, admin)

"""Certificates for tests, made by `openssl`."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: Path
    key: Path

    def server(self, clients: Pair | None = None) -> ssl.SSLContext:
        """What a server does with them. `clients`: the authority whose certificates it asks its clients for."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        if clients is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(clients.certificate)
        return context

    @property
    def options(self) -> str:
        """Of a client's URL."""
        return f"ssl_certfile={self.certificate}&ssl_keyfile={self.key}"


def authority(folder: Path, name: str) -> Pair:
    pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
    _openssl("req", "-x509", *_KEY, "-days", "2", "-subj", f"/CN={name}", "-keyout", pair.key, "-out", pair.certificate)
    return pair


def signed(by: Pair, name: str, names: str) -> Pair:
    """`names`: what the certificate is for, as `DNS:broker.example` or `IP:127.0.0.1`."""
    folder = by.key.parent
    pair, asked, more = (
        Pair(folder / f"{name}.crt", folder / f"{name}.key"),
        folder / f"{name}.csr",
        folder / f"{name}.ext",
    )
    _openssl("req", *_KEY, "-subj", f"/CN={name}", "-keyout", pair.key, "-out", asked)
    more.write_text(f"subjectAltName={names}\n")
    _openssl("x509", "-req", "-in", asked, "-CA", by.certificate, "-CAkey", by.key, "-CAcreateserial", "-days", "2",
             "-extfile", more, "-out", pair.certificate)  # fmt: skip
    return pair


def _openssl(*words: str | Path) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl")
    subprocess.run([program, *map(str, words)], check=True, capture_output=True)

"""Model sources: packages, local paths, and the hub, which a small HTTP server stands in for."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest

from engine.checkpoints.sources import resolve
from stoker.errors import ModelError

REPO = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": b"x" * 64,
        "pytorch_model.bin": b"never fetched", "onnx/model.safetensors": b"nor this", "q4.gguf": b"GGUF"}  # fmt: skip
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's interface that a download uses."""

    def do_GET(self) -> None:
        _, *parts = self.path.split("?")[0].split("/")
        if parts[:1] == ["api"]:
            return self._api("/".join(parts[2:4]))
        name = "/".join(parts[4:])
        self.server.tokens.add(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        if parts[:2] == ["org", "gated"]:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if name not in REPO:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha256(REPO[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "GET":
            self.server.fetched.append(name)  # type: ignore[attr-defined]
        if self.command == "GET" and name in self.server.broken:  # type: ignore[attr-defined]
            return self._send(403, b"", {})
        if self.command == "GET" and name == self.server.interrupted:  # type: ignore[attr-defined]
            self.server.interrupted = None  # type: ignore[attr-defined]
            return self._send(200, REPO[name], headers, sent=len(REPO[name]) // 2)
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            self.server.resumed.append((name, start))  # type: ignore[attr-defined]
            size = len(REPO[name])
            return self._send(206, REPO[name][start:], {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"})
        return self._send(200, REPO[name], headers)

    do_HEAD = do_GET

    def _api(self, repo: str) -> None:
        if repo == "org/missing":
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo == "org/gated":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if "/revision/nowhere" in self.path:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in REPO]
        files = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in REPO.items()]
        info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings}
        body = files if "/tree/" in self.path else info
        return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.fetched, server.resumed, server.tokens = [], [], set()  # type: ignore[attr-defined]
    server.broken, server.interrupted = set(), None  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def address(hub: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def resolve_elsewhere(source: str, endpoint: str, cache: Path, **more: str) -> str:
    """Resolve in a process of its own: huggingface_hub reads its environment once, at import."""
    script = (
        "import sys\nfrom engine.checkpoints.sources import resolve\nfrom stoker.errors import ModelError\n"
        "try: print(resolve([sys.argv[1]]))\nexcept ModelError as error: print('ModelError', error)\n"
        "assert 'mlx.core' not in sys.modules"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", script, source],
        env={**os.environ, **environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.strip()


def test_a_hub_repository_is_fetched_without_what_the_engine_does_not_read(
    hub: ThreadingHTTPServer, tmp_path: Path
) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    folder = Path(resolve_elsewhere("hf:org/model", endpoint, tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "config.json").read_bytes() == REPO["config.json"]
    assert "pytorch_model.bin" not in hub.fetched  # type: ignore[attr-defined]


def test_one_gguf_file_is_fetched_alone(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    path = Path(resolve_elsewhere("hf:org/model@main:q4.gguf", endpoint, tmp_path))
    assert path.read_bytes() == b"GGUF"
    assert set(hub.fetched) == {"q4.gguf"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("hf:org/missing", "no repository org/missing"),
        ("hf:org/gated", "accept its terms on the hub, then set HF_TOKEN"),
        ("hf:org/model:no.gguf", "no file no.gguf"),
        ("hf:org/model@nowhere", "no revision nowhere"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(
    hub: ThreadingHTTPServer, tmp_path: Path, source: str, cause: str
) -> None:
    answer = resolve_elsewhere(source, f"http://127.0.0.1:{hub.server_address[1]}", tmp_path)
    assert answer.startswith("ModelError")
    assert cause in answer


def test_what_is_in_the_cache_needs_no_hub(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    fetched = resolve_elsewhere("hf:org/model", address(hub), tmp_path)
    count = len(hub.fetched)  # type: ignore[attr-defined]
    assert resolve_elsewhere("hf:org/model", address(hub), tmp_path) == fetched
    assert len(hub.fetched) == count, "nothing is fetched twice"  # type: ignore[attr-defined]
    assert resolve_elsewhere("hf:org/model", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1") == fetched
    absent = resolve_elsewhere("hf:org/other", address(hub), tmp_path, HF_HUB_OFFLINE="1")
    assert absent.startswith("ModelError hf:org/other: org/other is not in the local cache")


def test_the_token_comes_from_the_environment(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    resolve_elsewhere("hf:org/model", address(hub), tmp_path, HF_TOKEN="hf_secret")
    assert "Bearer hf_secret" in hub.tokens  # type: ignore[attr-defined]


def test_a_download_that_breaks_off_goes_on_where_it_broke(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = 10 << 20  # what huggingface_hub writes at once
    monkeypatch.setitem(REPO, "model.safetensors", bytes(2 * chunk + 100))
    hub.interrupted = "model.safetensors"  # type: ignore[attr-defined]
    folder = Path(resolve_elsewhere("hf:org/model", address(hub), tmp_path))
    assert (folder / "model.safetensors").read_bytes() == REPO["model.safetensors"]
    assert hub.resumed == [("model.safetensors", chunk)]  # type: ignore[attr-defined]


def test_a_download_that_failed_keeps_what_was_whole(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    hub.broken = {"model.safetensors"}  # type: ignore[attr-defined]
    answer = resolve_elsewhere("hf:org/model", address(hub), tmp_path)
    assert answer.startswith("ModelError")
    assert "cannot be downloaded" in answer
    hub.broken = set()  # type: ignore[attr-defined]
    hub.fetched.clear()  # type: ignore[attr-defined]
    folder = Path(resolve_elsewhere("hf:org/model", address(hub), tmp_path))
    assert (folder / "model.safetensors").is_file()
    assert hub.fetched.count("model.safetensors") == 1  # type: ignore[attr-defined]
    assert len(hub.fetched) < 3  # type: ignore[attr-defined]


def test_a_hub_out_of_reach_is_one_clear_error(tmp_path: Path) -> None:
    answer = resolve_elsewhere("hf:org/model", "http://127.0.0.1:9", tmp_path)
    assert answer.startswith("ModelError hf:org/model: org/model")


@pytest.mark.parametrize("download", [True, False])
def test_the_hub_is_asked_for_what_the_source_says_and_only_if_it_may_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, download: bool
) -> None:
    asked: list[dict[str, object]] = []

    def answer(repo: str, file: str | None = None, **options: object) -> str:
        asked.append({"repo": repo, "file": file, **options})
        return str(tmp_path)

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    resolve(["hf:org/model@v2:sub/q4.gguf"], download=download)
    resolve(["hf:org/model@v2"], download=download)
    for call, file in zip(asked, ("sub/q4.gguf", None), strict=True):
        wanted = {"repo": "org/model", "file": file, "revision": "v2", "local_files_only": not download}
        assert wanted.items() <= call.items()


@pytest.mark.parametrize("file", ["../x.gguf", "a/../../x.gguf", "/etc/passwd"])
def test_a_file_beyond_the_repository_is_refused_before_the_hub_is_asked(file: str) -> None:
    with pytest.raises(ModelError, match="leads out of the repository"):
        resolve([f"hf:org/model:{file}"])


def test_a_package_resolves_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_weights" / "model").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve(["package:some_weights/model"]) == tmp_path / "some_weights" / "model"
    (tmp_path / "other").mkdir()
    for inside in ("../other", "/etc/passwd", "model/../../other", "model/../model"):
        with pytest.raises(ModelError, match="leads out of the package"):
            resolve([f"package:some_weights/{inside}"])
    with pytest.raises(ModelError, match="has no 'missing'"):
        resolve(["package:some_weights/missing"])


def test_the_first_available_source_wins_and_failures_are_all_listed(tmp_path: Path) -> None:
    assert resolve([str(tmp_path / "none"), "package:no_such_package/x", str(tmp_path)]) == tmp_path
    with pytest.raises(ModelError) as caught:
        resolve([str(tmp_path / "none"), "package:no_such_package/x", "hf:notarepo", "package:../x"])
    for part in ("none: no such file", "no_such_package is not installed", "write hf:org/name", "is no package name"):
        assert part in str(caught.value)
    with pytest.raises(ModelError, match="no source is given"):
        resolve([])


@pytest.mark.parametrize("source", ["/denied/model", "package:email/mime"])
def test_what_may_not_be_looked_at_is_refused_with_its_path_and_the_next_source_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    plain = Path.exists

    def exists(path: Path) -> bool:
        if path == tmp_path:
            return plain(path)
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", exists)
        with pytest.raises(ModelError, match=rf"{source}: it cannot be looked at \(.*Permission denied: '/.*'\)"):
            resolve([source])
        assert resolve([source, str(tmp_path)]) == tmp_path.resolve()


@pytest.mark.parametrize("source", ["~nosuchuser/model", "package:odd"])
def test_a_home_of_nobody_and_a_module_without_a_place_are_refused(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setitem(sys.modules, "odd", ModuleType("odd"))
    with pytest.raises(ModelError, match=f"{source}: it cannot be looked at"):
        resolve([source])

"""The artifact store: from where workers fetch adapters that they do not hold. The broker, or what STOKER_ARTIFACTS
names: any URL that fsspec knows, such as `s3://bucket/stoker` or a folder that workers share."""

from __future__ import annotations

from typing import Any

from stoker import keys
from stoker.errors import ConfigError
from stoker.settings import Settings


class Artifacts:
    def __init__(self, settings: Settings, redis: Any) -> None:
        self._url, self._redis = settings.artifacts, redis

    def put(self, model: str, name: str, version: int, data: bytes) -> None:
        """Keep a version; one that is there already is the same."""
        if self._url is None:
            self._redis.set(keys.artifact(model, name, version), data, nx=True)
            return
        fs, path = self._place(model, name, version)
        if not fs.exists(path):
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            # Under another name first: nobody reads half a file.
            draft = f"{path}.draft"
            with fs.open(draft, "wb") as file:
                file.write(data)
            fs.mv(draft, path)

    def get(self, model: str, name: str, version: int) -> bytes | None:
        if self._url is None:
            found: bytes | None = self._redis.get(keys.artifact(model, name, version))
            return found
        fs, path = self._place(model, name, version)
        return bytes(fs.cat_file(path)) if fs.exists(path) else None

    def _place(self, model: str, name: str, version: int) -> tuple[Any, str]:
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"STOKER_ARTIFACTS: {self._url!r} cannot be used ({error}).") from None
        return fs, f"{root.rstrip('/')}/{model}/{name}/{version}.safetensors"

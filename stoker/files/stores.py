"""Stores that fsspec knows: object stores, folders that machines share."""

from __future__ import annotations

from typing import Any

from stoker.errors import ConfigError


def opened(url: str) -> tuple[Any, str]:
    """The file system of the store that STOKER_ARTIFACTS names, and the path in it. Raises `ConfigError`."""
    try:
        import fsspec

        fs, root = _fresh(fsspec.core.url_to_fs, url)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"STOKER_ARTIFACTS: {url!r} cannot be used ({error}).") from None
    return fs, str(root)


def _fresh(open_url: Any, url: str) -> tuple[Any, str]:
    """Without listings that are kept for the life of the process: other processes write to the store too."""
    option = {"use_listings_cache": False}
    beneath = {part.partition("://")[0]: option for part in url.split("::")[1:]}
    try:
        found: tuple[Any, str] = open_url(url, **beneath, **option)
    except TypeError:
        # SFTP's hands each option on to a package that does not know this one. It keeps no listings.
        found = open_url(url)
    return found

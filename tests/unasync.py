"""`python -m tests.unasync` writes the blocking client from the asyncio one; `--check` says whether it is up to date.

Words of the source are replaced by others, and nothing else happens: what the two clients do in different ways has
the same names in `stoker/client/asynchronously.py` and `stoker/client/blocking.py`.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "stoker/client/_async"
TARGET = ROOT / "stoker/client/_sync"

#: Words that go, with the space behind them.
DROPPED = {"async", "await"}
WORDS = {
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "_async": "_sync",
    "aclose": "close",
    "aclosing": "closing",
    "anext": "next",
    "on_async": "on",
    "asynchronously": "blocking",
    "AsyncGenerator": "Generator",
    "AsyncIterator": "Iterator",
    "AnyAsyncJob": "AnyJob",
}
OURS = re.compile(r"\bAsync(?=(?:Client|Adapters|Models|Prefixes|Embedder|(?:\w+)?Client|(?:\w+)?Job|(?:\w+)?Link)\b)")
HEADER = "# Generated from stoker/client/_async/{name} by `make format`: edit that file.\n"


def blocking(source: str, name: str) -> str:
    """The text of the blocking module, as it is before ruff puts it into form."""
    lines = source.splitlines(keepends=True)
    replaced: list[tuple[tuple[int, int], tuple[int, int], str]] = []
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, following in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        if token.type == tokenize.NAME and token.string in DROPPED:
            replaced.append((token.start, following.start, ""))
        elif token.type == tokenize.NAME:
            replaced.append((token.start, token.end, _word(token.string)))
        elif token.type in (tokenize.STRING, tokenize.COMMENT):
            replaced.append((token.start, token.end, _prose(token.string)))
    for (row, start), (end_row, end), text in reversed(replaced):
        lines[row - 1 : end_row] = [lines[row - 1][:start] + text + lines[end_row - 1][end:]]
    return HEADER.format(name=name) + "".join(lines)


def _word(word: str) -> str:
    return WORDS.get(word, OURS.sub("", word))


def _prose(text: str) -> str:
    """Docstrings and comments name the blocking client's own classes."""
    return OURS.sub("", text.replace("`async with`", "`with`"))


def generated() -> dict[Path, str]:
    """Every file of the blocking client as it ought to be."""
    return {TARGET / path.name: _formed(blocking(path.read_text(), path.name), path.name) for path in _sources()}


def _sources() -> list[Path]:
    return sorted(SOURCE.glob("*.py"))


def _formed(text: str, name: str) -> str:
    """As `make format` leaves a file: imports in order, lines of the right length."""
    where = ["--stdin-filename", str(TARGET / name), "-"]
    for command in (["check", "--quiet", "--fix", "--select", "I"], ["format", "--quiet"]):
        ruff = [sys.executable, "-m", "ruff", *command, *where]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return text


def stale() -> list[str]:
    """Files of the blocking client that are not what the source says."""
    wanted = generated()
    found = {path: path.read_text() for path in TARGET.glob("*.py")}
    return sorted(path.name for path in {*wanted, *found} if wanted.get(path) != found.get(path))


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        if names := stale():
            sys.exit(f"stoker/client/_sync is not what its source says ({', '.join(names)}): run `make format`.")
        return
    TARGET.mkdir(exist_ok=True)
    wanted = generated()
    for path in TARGET.glob("*.py"):
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()

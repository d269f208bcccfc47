"""Holds every model file of mlx-lm to the checks of `tests.engine.bridged`, and prints the table of docs/models.md.

    python -m tests.models [NAME …] [--write]

Ends with 1 if a check that docs/models.md says holds does not. `--write` puts the table into it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.models.bridge import package
from tests.engine import bridged, decoder_goldens, gguf_files
from tests.models.table import CHECKS, Row, read, totals, write


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.models")
    parser.add_argument("names", nargs="*", metavar="NAME", help="model files; by default all")
    parser.add_argument("--write", action="store_true", help="put the table into docs/models.md")
    asked = parser.parse_args(arguments)
    rows = []
    for name in asked.names or sorted(package.files()):
        rows.append(checked(name))
        print(rows[-1].line(), flush=True)
    print(totals(rows))
    worse = [f"{row.name}: {check}" for row in rows for check in CHECKS if check in missing(row)]
    if asked.write:
        write(rows)
    elif worse:
        print("not as docs/models.md says: " + ", ".join(worse), file=sys.stderr)
    return int(bool(worse) and not asked.write)


def missing(row: Row) -> frozenset[str]:
    """What docs/models.md says of an architecture and does not hold."""
    stated = read().get(row.name)
    return frozenset() if stated is None else stated.passed - row.passed


def checked(name: str) -> Row:
    if name in package.REFUSED:
        return Row(name, frozenset(), f"refused: {package.REFUSED[name]}")
    with tempfile.TemporaryDirectory() as folder:
        checks: dict[str, Callable[[], None]] = {
            "generate": lambda: check_logits(name, Path(folder) / "tiny.gguf"),
            "batched": lambda: bridged.check_traffic(bridged.bridged(name), Path(folder) / "traffic", 1),
            "adapters": lambda: bridged.check_adapters(name, Path(folder) / "adapters"),
            "training": lambda: bridged.check_training(name),
        }
        passed, notes = set(), []
        for check, run in checks.items():
            try:
                run()
                passed.add(check)
            except Exception as error:
                traceback.print_exc()
                notes.append(f"{check}: {first_line(error)}")
                if check == "generate":
                    break  # nothing else can hold
    return Row(name, frozenset(passed), "; ".join([*notes, *kept(name)] if passed else notes))


def check_logits(name: str, path: Path) -> None:
    """Those of mlx-lm, those of torch transformers where `tests/goldens/decoders` has them, and those of a GGUF file of
    the same weights where one is read."""
    bridged.check_logits(name)
    for golden in goldens_of(name):
        decoder_goldens.check(golden)
    if name in gguf_files.LAYOUTS:
        gguf_files.check(name, path)


def goldens_of(name: str) -> list[str]:
    return [golden for golden in decoder_goldens.NAMES if golden.split("-")[0] == name]


def kept(name: str) -> list[str]:
    """Who else gives its logits, and what its layers keep."""
    sizes = bridged.bridged(name).decoder.kv_sizes
    words = ["transformers"] if goldens_of(name) else []
    if sizes.states:
        words.append("recurrent" if not sizes.keys else "hybrid")
    if any(keys.size != values.size for keys, values in zip(sizes.keys, sizes.values, strict=True)):
        words.append("keys and values of two sizes")
    if name in gguf_files.LAYOUTS:
        words.append("GGUF")
    return words


def first_line(error: Exception) -> str:
    said = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__} {said}"[:110].strip().replace("|", "/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

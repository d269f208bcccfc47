"""Plant each mistake of the list in a copy of the checkout, run the tests that own it, and say which were noticed.

`python -m tests.mutants [TEXT…]`: those alone whose name or file holds one of the texts. Ends with 1 if one survived.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from tests.mutants.entries import CHECKOUT, Mutant, mutants

#: Seconds that the tests of one mistake may take: one that makes them hang is noticed too.
LIMIT = 180
JOBS = int(os.environ.get("JOBS", "2"))
#: That a test fails is enough (tests/conftest.py).
PROFILE = "first-failure"
#: pytest's exit codes.
PASSED, FAILED = 0, 1


class Copy:
    """A copy of the checkout in which one mistake at a time is planted."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, ""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT, capture_output=True, check=True,
        ).stdout.decode()  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (CHECKOUT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(CHECKOUT / name, folder / name)

    def test(self, nodes: Iterable[str]) -> int:
        """pytest's exit code; a run that takes too long has failed."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--hypothesis-profile={PROFILE}",
            *nodes,
        ]
        # A changed file of the same size and second would be taken from its bytecode.
        env = os.environ | {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, check=False, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return FAILED
        self.output = done.stdout.decode(errors="replace")
        return done.returncode

    def verdict(self, mutant: Mutant) -> str:
        """`noticed`, `SURVIVED`, or what is wrong with the entry."""
        path = self.folder / mutant.file
        whole = path.read_bytes()
        mutant.plant(self.folder)
        try:
            code = self.test(mutant.tests)
        finally:
            path.write_bytes(whole)
        return reading(code, self.output)


def reading(code: int, output: str) -> str:
    """What pytest's exit code says. One that could not even collect the tests has shown nothing."""
    return {PASSED: "SURVIVED", FAILED: "noticed"}.get(code, f"ERROR: pytest ended with {code}: {output[-300:]}")


def judge(chosen: list[Mutant], folder: Path) -> dict[Mutant, str]:
    """Each with its verdict. The tests have to pass without a mistake, or their failure would say nothing."""
    copies: SimpleQueue[Copy] = SimpleQueue()
    for number in range(JOBS):
        copies.put(Copy(folder / str(number)))

    def one(mutant: Mutant) -> str:
        with taken(copies) as copy:
            began = time.monotonic()
            verdict = copy.verdict(mutant)
        print(f"{verdict:9} {time.monotonic() - began:5.1f} s  {mutant.file}: {mutant.name}", flush=True)
        return verdict

    def failing(nodes: list[str]) -> str:
        with taken(copies) as copy:
            return "" if copy.test(nodes) == PASSED else f"{' '.join(nodes)}\n{copy.output[-2000:]}"

    with ThreadPoolExecutor(JOBS) as pool:
        if failed := list(filter(None, pool.map(failing, by_file(chosen)))):
            raise SystemExit("the tests fail without any mistake:\n" + "\n".join(failed))
        return dict(zip(chosen, pool.map(one, chosen), strict=True))


@contextmanager
def taken(copies: SimpleQueue[Copy]) -> Iterator[Copy]:
    """One that no other thread uses meanwhile."""
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def by_file(chosen: Iterable[Mutant]) -> list[list[str]]:
    """The tests that own `chosen`, each once. One run per file, so that the limit of time is that of a file."""
    nodes = sorted({node for mutant in chosen for node in mutant.tests})
    return [list(found) for _, found in groupby(nodes, key=lambda node: node.partition("::")[0])]


def main(texts: list[str]) -> int:
    chosen = [one for one in mutants() if not texts or any(text in f"{one.file} {one.name}" for text in texts)]
    faults = {one: fault for one in chosen if (fault := one.fault(CHECKOUT))}
    for one, fault in faults.items():
        print(f"ERROR     {one.file}: {one.name}: {fault}")
    if faults:
        return 1
    run = [one for one in chosen if not one.equivalent]
    with TemporaryDirectory(prefix="mutants-") as folder:
        verdicts = judge(run, Path(folder)) if run else {}
    for one in chosen:
        if one.equivalent:
            print(f"equivalent  {one.file}: {one.name}: {one.equivalent}")
    noticed = sum(verdict == "noticed" for verdict in verdicts.values())
    print(f"{noticed} of {len(run)} noticed, {len(chosen) - len(run)} equivalent")
    for one, verdict in verdicts.items():
        if verdict != "noticed":
            print(f"{verdict}  {one.file}: {one.name}")
    return int(noticed < len(run))


if __name__ == "__main__":
    # A run that is told to end deletes its copies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main(sys.argv[1:]))

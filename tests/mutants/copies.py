"""Copies of the checkout, in which mistakes are planted and tests run."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from compileall import compile_dir
from contextlib import ExitStack, contextmanager
from pathlib import Path
from py_compile import PycInvalidationMode
from queue import SimpleQueue
from typing import NamedTuple

from tests.mutants.entries import Mutant
from tests.mutants.forks import Forks

#: Seconds that the tests of one mistake may take: one that makes them hang is noticed too.
LIMIT = 180
#: That a test fails is enough (tests/conftest.py).
PROFILE = "first-failure"
#: Seconds for one test: where a mistake makes it wait for ever, nothing more is learned afterwards.
PATIENCE = 30
#: That a test failed is enough: asserts stay plain, and the source of a traceback is not read. Both took longer than
#: most tests.
TERSE = ("-x", "-q", "--assert=plain", "--tb=line", f"--hypothesis-profile={PROFILE}")
OPTIONS = (*TERSE, "-p", "no:cacheprovider", "-o", f"timeout={PATIENCE}")
#: pytest's exit codes.
PASSED, FAILED, UNKNOWN = 0, 1, 4
NOTICED = "noticed"


class Copy:
    """One copy, with one mistake at a time."""

    def __init__(self, source: Path, names: Iterable[str], folder: Path) -> None:
        self.folder, self.output = folder, ""
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, folder / name)
        # Bytecode is taken only if it is of the very source: a changed file may have the same size and second.
        compile_dir(folder, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        self._forks = Forks(folder)

    def close(self) -> None:
        self._forks.close()

    def test(self, nodes: Iterable[str]) -> int:
        """pytest's exit code; a run that takes too long has failed."""
        code, self.output = self._forks.pytest([*OPTIONS, *nodes], LIMIT)
        return FAILED if code == -signal.SIGALRM else code

    def passes(self, nodes: Iterable[str]) -> bool:
        """Whether these tests do; a test that has no such name here, with all of its parameters."""
        nodes = list(nodes)
        code = self.test(nodes)
        return (self.test({node.partition("[")[0] for node in nodes}) if code == UNKNOWN else code) == PASSED

    def verdict(self, mutant: Mutant) -> Verdict:
        path = self.folder / mutant.file
        whole = path.read_bytes()
        mutant.plant(self.folder)
        try:
            code = self.test(mutant.tests)
        finally:
            path.write_bytes(whole)
        return Verdict(reading(code, self.output), failed_in(self.output) or mutant.tests)


class Verdict(NamedTuple):
    """`said`: `noticed`, `SURVIVED`, or what is wrong with the entry. `tests`: those that failed; all of the entry's
    where pytest did not name one."""

    said: str
    tests: tuple[str, ...]


def reading(code: int, output: str) -> str:
    """What pytest's exit code says. One that could not even collect the tests has shown nothing."""
    return {PASSED: "SURVIVED", FAILED: NOTICED}.get(code, f"ERROR: pytest ended with {code}: {output[-300:]}")


def failed_in(output: str) -> tuple[str, ...]:
    """The tests that failed, as pytest's summary names them."""
    return tuple(re.findall(r"^FAILED (\S+\.py::\S+)(?: - |$)", output, re.MULTILINE))


class Copies:
    """As many as there are jobs, each used by one thread at a time."""

    def __init__(self, source: Path, folder: Path, jobs: int) -> None:
        self._free: SimpleQueue[Copy] = SimpleQueue()
        self._open = ExitStack()
        names = files_of(source)
        for number in range(jobs):
            copy = Copy(source, names, folder / str(number))
            self._open.callback(copy.close)
            self._free.put(copy)

    @contextmanager
    def taken(self) -> Iterator[Copy]:
        copy = self._free.get()
        try:
            yield copy
        finally:
            self._free.put(copy)

    def close(self) -> None:
        self._open.close()


def files_of(checkout: Path) -> list[str]:
    """What Git knows or would take in."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=checkout, capture_output=True, check=True).stdout.decode()
    return [name for name in listed.split("\0") if name and (checkout / name).is_file()]

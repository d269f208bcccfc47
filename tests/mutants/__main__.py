"""Plant each mistake of the list in a copy of the checkout, run the tests that own it, and say which were noticed."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutants.copies import NOTICED, Copies, Verdict
from tests.mutants.entries import CHECKOUT, Mutant, mutants

AFTERWORD = """
The list is tests/mutants/*.jsonl. Each line of the output is a verdict: noticed (a test failed), SURVIVED (all passed),
equivalent (no test can notice it, and why; not run), or ERROR (the entry itself is wrong). Ends with 1 unless each
mistake that was run was noticed.
"""


def judge(chosen: list[Mutant], copies: Copies, jobs: int) -> dict[Mutant, str]:
    """Each with its verdict. A test that failed has to pass without a mistake, or its failure would say nothing."""

    def one(mutant: Mutant) -> Verdict:
        with copies.taken() as copy:
            began = time.monotonic()
            verdict = copy.verdict(mutant)
        print(f"{verdict.said:9} {time.monotonic() - began:5.1f} s  {mutant.file}: {mutant.name}", flush=True)
        return verdict

    def failing(nodes: list[str]) -> str:
        with copies.taken() as copy:
            return "" if copy.passes(nodes) else f"{' '.join(nodes)}\n{copy.output}"

    with ThreadPoolExecutor(jobs) as pool:
        verdicts = list(pool.map(one, chosen))
        witnesses = by_file(node for verdict in verdicts if verdict.said == NOTICED for node in verdict.tests)
        if failed := list(filter(None, pool.map(failing, witnesses))):
            raise SystemExit("tests that failed fail without any mistake:\n" + "\n".join(failed))
    return {mutant: verdict.said for mutant, verdict in zip(chosen, verdicts, strict=True)}


def by_file(tests: Iterable[str]) -> list[list[str]]:
    """Each once, those of a file together: the limit of time is that of a file."""
    return [list(found) for _, found in groupby(sorted(set(tests)), key=lambda node: node.partition("::")[0])]


def main(texts: list[str], jobs: int) -> int:
    began = time.monotonic()
    chosen = [one for one in mutants() if not texts or any(text in f"{one.file} {one.name}" for text in texts)]
    faults = {one: fault for one in chosen if (fault := one.fault(CHECKOUT))}
    for one, fault in faults.items():
        print(f"ERROR     {one.file}: {one.name}: {fault}")
    if faults:
        return 1
    run = [one for one in chosen if not one.equivalent]
    with TemporaryDirectory(prefix="mutants-") as folder, closing(Copies(CHECKOUT, Path(folder), jobs)) as copies:
        verdicts = judge(run, copies, jobs)
    for one in chosen:
        if one.equivalent:
            print(f"equivalent  {one.file}: {one.name}: {one.equivalent}")
    noticed = sum(verdict == NOTICED for verdict in verdicts.values())
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    print(f"{noticed} of {len(run)} noticed, {len(chosen) - len(run)} equivalent, in {minutes} min {seconds} s")
    for one, verdict in verdicts.items():
        if verdict != NOTICED:
            print(f"{verdict}  {one.file}: {one.name}")
    return int(noticed < len(run))


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.mutants", description=__doc__, epilog=AFTERWORD)
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="plant those alone whose file or name holds a TEXT")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time, each in a copy (default: 2)")
    return parser.parse_args()


if __name__ == "__main__":
    # A run that is asked to end deletes its copies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = asked()
    sys.exit(main(arguments.texts, arguments.jobs))

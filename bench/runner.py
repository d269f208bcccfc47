"""Every benchmark, one after the other, each in a process of its own with a time limit: `python -m bench`.

Before each one the machine rests, and is looked at until it is quiet (`bench/surroundings.py`). What disturbs is said,
and no row of a disturbed benchmark is judged. In the folder of `--out` are then the rows of each benchmark, all of
them in `all.json`, and in `all.md` for people, with what rose and fell against the committed rows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.report import COMMIT, RESULTS, machine, number
from bench.surroundings import Finding, Meanwhile, settle

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "bench"


@dataclass(frozen=True)
class Bench:
    """`python -m MODULE ARGUMENTS`, which writes `NAME.json`; seconds that it may take, and in its quick form (None: it
    has none)."""

    name: str
    module: str
    limit: int
    quick: int | None
    arguments: tuple[str, ...] = ()


ON_CPU = (
    Bench("counts", "bench.counts", 120, 120),
    Bench("generate", "bench.generate", 1500, 600),
    Bench("train", "bench.train", 900, 420),
    Bench("embed", "bench.embed", 900, 360),
    Bench("queue", "bench.queue", 1200, 240),
    Bench("scale-costs", "bench.scale_costs", 600, None),
    Bench("gateway", "bench.gateway", 900, 180),
    Bench("lookup", "bench.lookup", 1800, 180),
    Bench("prefixes", "bench.prefixes", 900, 120),
    Bench("placement", "bench.placement", 1200, 420),
    Bench("fleet", "bench.fleet", 1200, None),
)
ON_GPU = (
    Bench("decode-gpu", "bench.decode_step", 600, 240),
    Bench("generate-gpu", "bench.generate", 900, 400, ("--gpu",)),
    Bench("train-gpu", "bench.train", 600, 300, ("--gpu",)),
    Bench("embed-gpu", "bench.embed", 600, 240, ("--gpu",)),
    Bench("independence-gpu", "bench.independence", 600, None),
    Bench("kernels", "bench.kernels", 600, None, ("--gpu",)),
)


@dataclass(frozen=True)
class Ran:
    """One benchmark: what its file says, and how it went."""

    name: str
    seconds: float
    #: What went wrong, in words; empty where all went well.
    failure: str
    before: list[Finding]
    after: list[Finding]
    fields: dict[str, Any]

    @property
    def disturbances(self) -> list[str]:
        return [finding.text for finding in (*self.before, *self.after) if finding.disturbs]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """With what was measured; where something disturbed, no aim is judged."""
        rows = [dict(entry) for entry in self.fields.get("rows", ()) if "p50" in entry]
        for entry in rows if self.disturbances else ():
            if "met" in entry:
                entry["met"] = None
        return rows

    def as_json(self) -> dict[str, Any]:
        how = {"seconds": round(self.seconds, 1), "failure": self.failure}
        around = {when: [asdict(each) for each in found] for when, found in self._around.items()}
        return {**self.fields, **how, "surroundings": around, "rows": self._kept}

    @property
    def _around(self) -> Mapping[str, list[Finding]]:
        return {"before": self.before, "meanwhile and after": self.after}

    @property
    def _kept(self) -> list[dict[str, Any]]:
        return [*self.rows, *(entry for entry in self.fields.get("rows", ()) if "p50" not in entry)]


def run(bench: Bench, options: argparse.Namespace) -> Ran:
    before = settle(options.cool_down, options.patience)
    for finding in before:
        print(f"# {finding.text}{': DISTURBS, no aim is judged' if finding.disturbs else ''}", flush=True)
    file = options.out / f"{bench.name}.json"
    file.unlink(missing_ok=True)
    meanwhile, began = Meanwhile(), time.monotonic()
    failure = _process(bench, options)
    seconds, after = time.monotonic() - began, [*meanwhile.findings(), *settle(0, 0)]
    fields = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if not fields:
        failure = failure or "it wrote no rows"
    ran = Ran(bench.name, seconds, failure, before, after, fields)
    file.write_text(json.dumps(ran.as_json(), indent=1) + "\n", "utf-8")
    return ran


def _process(bench: Bench, options: argparse.Namespace) -> str:
    """What went wrong, if anything did. All that it has started ends with it: they are a group of their own."""
    quick = bench.quick if options.quick else None
    limit = bench.limit if quick is None else quick
    command = [sys.executable, "-m", bench.module, "--out", str(options.out), *bench.arguments]
    command += [] if quick is None else ["--quick"]
    print(f"# {' '.join(command[1:])}, {limit} s at most", flush=True)
    process = subprocess.Popen(command, cwd=ROOT, process_group=0, env={**os.environ, COMMIT: machine()["commit"]})
    try:
        code = process.wait(limit)
        return f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return f"ended after {limit} s, its limit"
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The whole group that it leads: brokers, workers and peers."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


# --- against the committed rows ---


@dataclass(frozen=True)
class Change:
    bench: str
    row: str
    unit: str
    was: float
    now: float
    #: rose, fell, or within the spread.
    way: str


def committed(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.json"))}


def compared(ran: Ran, old: Mapping[str, Any]) -> list[Change]:
    """Rows of the same name. Where the machine is another one, ratios alone can be compared."""
    alike = all(ran.fields.get(key) == old.get(key) for key in ("machine", "cores", "device"))
    before = {entry["name"]: entry for entry in old.get("rows", ()) if "p50" in entry}
    found = []
    for entry in ran.rows:
        other = before.get(entry["name"])
        if other is None or not (alike or entry["unit"] == "times") or entry["unit"] != other["unit"]:
            continue
        rose, fell = entry["p20"] > other["p80"], entry["p80"] < other["p20"]
        way = "rose" if rose else "fell" if fell else "within the spread"
        found.append(Change(ran.name, entry["name"], entry["unit"], other["p50"], entry["p50"], way))
    return found


# --- for people ---


def page(head: Mapping[str, Any], ran: Sequence[Ran], changes: Sequence[Change]) -> str:
    lines = ["# Benchmarks", "", ", ".join(f"{name} {value}" for name, value in head.items()), ""]
    for each in ran:
        lines += [f"## {each.name}", "", f"{each.seconds:.0f} s{f', {each.failure}' if each.failure else ''}."]
        lines += [f"Disturbed, so no aim is judged: {'; '.join(each.disturbances)}."] if each.disturbances else []
        lines += ["", "| row | median (20% to 80%) | unit | aim | met |", "|---|---|---|---|---|"]
        lines += [_line(entry) for entry in each.rows]
        lines += [
            f"| {entry['name']} | {entry['error']} | | | |" for entry in each.fields.get("rows", ()) if "error" in entry
        ]
        lines.append("")
    moved = [change for change in changes if change.way != "within the spread"]
    lines += ["## Against the committed rows", "", f"{len(changes) - len(moved)} rows are within the spread.", ""]
    if moved:
        lines += ["| benchmark | row | was | now | |", "|---|---|---|---|---|"]
        lines += [
            f"| {each.bench} | {each.row} | {number(each.was)} | {number(each.now)} {each.unit} | {each.way} |"
            for each in moved
        ]
    return "\n".join(lines) + "\n"


def _line(entry: Mapping[str, Any]) -> str:
    met = entry.get("met")
    judged = "" if "aim" not in entry else "not judged" if met is None else "yes" if met else "**no**"
    value = "not said" if judged == "not judged" else number(entry["p50"])
    counted = f", {entry['launches']} launches" if "launches" in entry else ""
    counted += f", device {number(entry['device_ms'])} ms" if "device_ms" in entry else ""
    spread = f"({number(entry['p20'])} to {number(entry['p80'])})"
    return f"| {entry['name']} | {value} {spread}{counted} | {entry['unit']} | {entry.get('aim', '')} | {judged} |"


def main(arguments: Sequence[str] | None = None) -> int:
    options = asked(arguments)
    table = [*ON_CPU, *ON_GPU] if options.only else ON_GPU if options.gpu else ON_CPU
    chosen = [bench for bench in table if bench.name in options.only or not options.only]
    if options.quick and not options.only:
        chosen = [bench for bench in chosen if bench.quick]
    if options.commit:
        os.environ[COMMIT] = options.commit
    options.out.mkdir(parents=True, exist_ok=True)
    old, head = committed(), {**machine(), "quick": options.quick, "gpu": options.gpu}
    print(f"# {', '.join(f'{name} {value}' for name, value in head.items())}")
    print(f"# {options.cool_down:g} s of rest before each, {options.patience:g} s more at most until it is quiet\n")
    ran: list[Ran] = []
    changes: list[Change] = []
    for bench in chosen:
        print(f"\n## {bench.name}", flush=True)
        ran.append(run(bench, options))
        changes += compared(ran[-1], old.get(bench.name, {}))
        # After each: a run that is cut off loses nothing before it.
        found = {"benches": {each.name: each.as_json() for each in ran}, "changes": [asdict(each) for each in changes]}
        (options.out / "all.json").write_text(json.dumps({**head, **found}, indent=1) + "\n", "utf-8")
        (options.out / "all.md").write_text(page(head, ran, changes), "utf-8")
    print(f"\n{page(head, ran, changes)}\nall of it: {options.out / 'all.json'} and all.md")
    failed = [each.name for each in ran if each.failure or any("error" in row for row in each.fields.get("rows", ()))]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    names = sorted({bench.name for bench in (*ON_CPU, *ON_GPU)})
    parser.add_argument("--quick", action="store_true", help="fewer rounds, whose spreads are wider; some are left out")
    parser.add_argument("--gpu", action="store_true", help="those that have a form for an NVIDIA GPU")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", choices=names, help=f"some of {', '.join(names)}"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="folder of all that is written")
    parser.add_argument("--commit", help="of these files, where there is no git")
    parser.add_argument("--cool-down", type=float, default=10.0, metavar="SECONDS", help="rest before each")
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS", help="how long to wait for quiet")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.out == RESULTS.resolve():
        parser.error("--out: the committed rows are there, with which these are compared; name another folder")
    return options

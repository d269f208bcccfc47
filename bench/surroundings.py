"""What else goes on at this machine while a benchmark runs: other programs, heat, power, memory, other users of a GPU.

Each finding is in plain words. One that disturbs makes ratios worthless, so that none is judged. What a command
says is read by a function of its text alone, which tests try on recorded ones.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: What makes OpenBLAS take the kernels of another processor.
CORE_TYPE = "OPENBLAS_CORETYPE"
#: Of the cores, or of the time, that others may take; of the memory that has to be free.
OTHERS, FREE = 0.1, 0.1
#: Of a GPU's time, in percent, that it may be busy while nothing of ours runs.
GPU_BUSY = 5
#: Seconds between two looks at a machine that is not quiet.
BETWEEN = 5.0
#: What macOS says of heat (`OSThermalNotification.h`).
PRESSURE = ("nominal", "moderate", "heavy", "trapping", "sleeping")


@dataclass(frozen=True)
class Finding:
    """`disturbs`: no ratio that is measured meanwhile is worth its aim. `passes`: it may end by itself."""

    text: str
    disturbs: bool = False
    passes: bool = True


def read(seconds: float = 1.0) -> list[Finding]:
    """Look for as long as this, while nothing of ours runs."""
    return [*(_mac() if sys.platform == "darwin" else _linux(seconds)), *_gpus()]


def settle(
    cool_down: float,
    patience: float,
    look: Callable[[], list[Finding]] = read,
    rest: Callable[[float], None] = time.sleep,
) -> list[Finding]:
    """Rest for `cool_down` seconds, and look until nothing disturbs, for `patience` seconds at most."""
    rest(cool_down)
    left = patience
    while True:
        found = look()
        disturbing = [finding for finding in found if finding.disturbs]
        if left <= 0 or not disturbing or not all(finding.passes for finding in disturbing):
            return found
        print(f"# {'; '.join(finding.text for finding in disturbing)}: waiting up to {left:.0f} s", flush=True)
        rest(min(BETWEEN, left))
        left -= BETWEEN


class Meanwhile:
    """What other programs take of the processors, from now on; Linux alone counts it."""

    def __init__(self) -> None:
        self._before = spent()

    def findings(self) -> list[Finding]:
        """Since the start, without what this process and those that it has waited for took."""
        return [] if self._before is None else others(self._before, spent(), "meanwhile ")


@dataclass(frozen=True)
class Spent:
    """Seconds: of the clock, and of these processors, which were busy, of the hypervisor, or counted at all; `own`:
    what this process and its children took of the busy ones."""

    clock: float
    busy: float
    stolen: float
    counted: float
    own: float
    cores: int


def others(before: Spent, after: Spent | None, when: str = "") -> list[Finding]:
    if after is None or after.counted <= before.counted:
        return [Finding(f"{when}load of other programs: unknown, /proc/stat does not count here")]
    seconds, cores = after.clock - before.clock, after.cores
    busy = max(0.0, (after.busy - before.busy - after.own + before.own) / seconds)
    stolen = (after.stolen - before.stolen) / seconds
    return [
        Finding(f"{when}other programs keep {busy:.1f} of {cores} cores busy", busy > OTHERS * cores),
        *([Finding(f"{when}the hypervisor takes {stolen:.1f} of {cores} cores", stolen > OTHERS * cores)]
          if stolen > 0.05 else []),
    ]  # fmt: skip


def processors(stat: str, cpus: set[int], ticks: int) -> tuple[float, float, float]:
    """Seconds since the machine's start that these were busy, that the hypervisor took, and all: text of /proc/stat."""
    rows = [line.split() for line in stat.splitlines() if re.match(r"cpu\d", line)]
    fields = [[int(field) / ticks for field in row[1:]] for row in rows if int(row[0][3:]) in cpus]
    # user, nice, system, idle, iowait, irq, softirq, steal
    busy = sum(sum(each[:3]) + sum(each[5:7]) for each in fields)
    return busy, sum(each[7] for each in fields if len(each) > 7), sum(sum(each[:8]) for each in fields)


def memory(free: float, total: float) -> Finding:
    """Both in bytes."""
    return Finding(f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of memory are free", free < FREE * total)


def meminfo(text: str) -> Finding:
    """Text of /proc/meminfo."""
    sizes = {name: 1024.0 * int(kib) for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return memory(sizes["MemAvailable"], sizes["MemTotal"])


def governor(name: str, driver: str) -> Finding:
    """`powersave` of these two drivers follows the load; of all others it is the lowest clock."""
    lowest = name == "powersave" and driver not in ("intel_pstate", "amd-pstate-epp")
    return Finding(f"the CPU governor is {name} ({driver})", lowest, passes=False)


def kernels(chosen: str) -> Finding:
    """The value of `OPENBLAS_CORETYPE`. What a BLAS of another kind runs is not held back with it."""
    return Finding(f"{CORE_TYPE}={chosen}: OpenBLAS has the kernels of that processor", disturbs=True, passes=False)


def battery(text: str) -> Finding:
    """Text of `pmset -g batt`."""
    drawn = re.search(r"Now drawing from '([^']+)'", text)
    if drawn is None:
        return Finding("power source: unknown, pmset does not say")
    level = re.search(r"(\d+)%", text)
    charge = f", battery at {level[1]} %" if level else ""
    return Finding(f"power: {drawn[1]}{charge}", drawn[1] == "Battery Power", passes=False)


def low_power_mode(text: str) -> Finding:
    """Text of `pmset -g`."""
    mode = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d)", text, re.MULTILINE)
    on = mode is not None and mode[1] == "1"
    return Finding(f"Low Power Mode: {'unknown' if mode is None else 'on' if on else 'off'}", on, passes=False)


def thermal_pressure(text: str) -> Finding:
    """Text of `notifyutil -g com.apple.system.thermalpressurelevel`."""
    level = re.search(r"thermalpressurelevel (\d)", text)
    if level is None:
        return Finding("thermal pressure: unknown, notifyutil does not say")
    number = min(int(level[1]), len(PRESSURE) - 1)
    return Finding(f"thermal pressure: {PRESSURE[number]}", number > 0)


def speed_limit(text: str) -> list[Finding]:
    """Text of `pmset -g therm`: it names a limit of the clock where there is one."""
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    if limit is None or limit[1] == "100":
        return []
    return [Finding(f"heat: the processor's clock is held at {limit[1]} %", True)]


def idle_share(text: str, cores: int) -> Finding:
    """Text of `top -l 2 -n 0`: its last sample, without a process of ours."""
    idle = re.findall(r"CPU usage:.* ([\d.]+)% idle", text)
    if not idle:
        return Finding("load of other programs: unknown, top does not say")
    busy = cores * (1 - float(idle[-1]) / 100)
    return Finding(f"other programs keep {busy:.1f} of {cores} cores busy", busy > OTHERS * cores)


def free_percent(level: str, total: str) -> Finding:
    """Texts of `sysctl -n kern.memorystatus_level` and `sysctl -n hw.memsize`."""
    if not (level.strip().isdigit() and total.strip().isdigit()):
        return Finding("free memory: unknown, sysctl does not say")
    return memory(int(level) / 100 * int(total), int(total))


GPU_QUERY = "name,temperature.gpu,utilization.gpu,memory.used,memory.total,clocks_throttle_reasons.hw_thermal_slowdown"


def gpus(text: str) -> list[Finding]:
    """Text of `nvidia-smi --query-gpu=GPU_QUERY --format=csv,noheader,nounits`."""
    found = []
    for line in text.strip().splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(GPU_QUERY.split(",")):
            found.append(Finding(f"GPU: unknown, nvidia-smi says {line!r}"))
            continue
        name, heat, busy, used, total, slowed = parts
        works = busy.isdigit() and int(busy) > GPU_BUSY
        found.append(Finding(f"{name}: {heat} °C, {busy} % busy, {used} of {total} MiB in use", works))
        if slowed == "Active":
            found.append(Finding(f"{name}: heat slows it down", True))
    return found


def gpu_users(text: str) -> list[Finding]:
    """Text of `nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv,noheader,nounits`."""
    return [
        Finding(f"another program is on the GPU: {', '.join(part.strip() for part in line.split(',')[:2])}", True)
        for line in text.strip().splitlines()
    ]


def _linux(seconds: float) -> Iterator[Finding]:
    before = spent()
    time.sleep(seconds)
    if before is not None:
        yield from others(before, spent())
    if (text := _text("/proc/meminfo")) is not None:
        yield meminfo(text)
    if chosen := os.environ.get(CORE_TYPE):
        yield kernels(chosen)
    frequency = "/sys/devices/system/cpu/cpu0/cpufreq"
    name, driver = _text(f"{frequency}/scaling_governor"), _text(f"{frequency}/scaling_driver")
    if name is not None:
        yield governor(name.strip(), (driver or "unknown driver").strip())


def _mac() -> Iterator[Finding]:
    yield idle_share(said("top", "-l", "2", "-n", "0", "-s", "1") or "", os.cpu_count() or 1)
    sizes = [said("sysctl", "-n", name) or "" for name in ("kern.memorystatus_level", "hw.memsize")]
    yield free_percent(*sizes)
    yield battery(said("pmset", "-g", "batt") or "")
    yield low_power_mode(said("pmset", "-g") or "")
    yield thermal_pressure(said("notifyutil", "-g", "com.apple.system.thermalpressurelevel") or "")
    yield from speed_limit(said("pmset", "-g", "therm") or "")


def _gpus() -> Iterator[Finding]:
    form = "--format=csv,noheader,nounits"
    if (text := said("nvidia-smi", f"--query-gpu={GPU_QUERY}", form)) is not None:
        yield from gpus(text)
        yield from gpu_users(said("nvidia-smi", "--query-compute-apps=pid,name,used_memory", form) or "")


def spent() -> Spent | None:
    if (text := _text("/proc/stat")) is None:
        return None
    cpus = os.sched_getaffinity(0)
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    taken = sum(use.ru_utime + use.ru_stime for use in own)
    return Spent(time.monotonic(), *processors(text, cpus, os.sysconf("SC_CLK_TCK")), taken, len(cpus))


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return None


def said(*command: str) -> str | None:
    """Its standard output; None where there is no such command, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

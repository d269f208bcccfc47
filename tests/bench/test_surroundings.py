"""What disturbs a benchmark is found in what the machine says, in its own words."""

from __future__ import annotations

import sys

import pytest

from bench import surroundings
from bench.surroundings import (
    Finding,
    Meanwhile,
    Spent,
    battery,
    free_percent,
    governor,
    gpu_users,
    gpus,
    idle_share,
    low_power_mode,
    meminfo,
    others,
    processors,
    read,
    settle,
    speed_limit,
    thermal_pressure,
)

STAT = """cpu  400 0 200 1800 100 10 20 50 7 0
cpu0 200 0 100 900 50 5 10 25 7 0
cpu1 200 0 100 900 50 5 10 25 0 0
intr 12345
"""
ON_POWER = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=22806627)\t100%; charged; 0:00 remaining\n"
ON_BATTERY = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=4653155)\t87%; discharging; 5:12 remaining\n"
COOL = "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
HOT = "2026-08-20 05:08:37 -0700 CPU Power notify\n\tCPU_Scheduler_Limit \t= 100\n\tCPU_Speed_Limit \t= 63\n"
TOP = """Processes: 512 total, 2 running, 510 sleeping, 2541 threads
CPU usage: 40.0% user, 20.0% sys, 40.0% idle
Processes: 512 total, 3 running, 509 sleeping, 2540 threads
CPU usage: 3.57% user, 2.43% sys, 94.0% idle
"""
PMSET = "System-wide power settings:\nCurrently in use:\n lowpowermode         {}\n sleep                1\n"
H200 = "NVIDIA H200, 34, {}, 612, 143771, Not Active\n"


def test_processors_are_counted_of_those_that_are_ours() -> None:
    assert processors(STAT, {0}, 100) == pytest.approx((3.15, 0.25, 12.9))
    assert processors(STAT, {0, 1}, 100) == pytest.approx((6.3, 0.5, 25.8))


def test_other_programs_disturb_and_our_own_work_does_not() -> None:
    before = Spent(clock=10.0, busy=50.0, stolen=0.0, counted=100.0, own=5.0, cores=2)
    ours = Spent(clock=20.0, busy=69.0, stolen=0.0, counted=120.0, own=24.0, cores=2)
    assert others(before, ours) == [Finding("other programs keep 0.0 of 2 cores busy")]
    theirs = Spent(clock=20.0, busy=69.0, stolen=0.0, counted=120.0, own=14.0, cores=2)
    assert others(before, theirs, "meanwhile ") == [Finding("meanwhile other programs keep 1.0 of 2 cores busy", True)]
    stolen = Spent(clock=20.0, busy=50.0, stolen=9.0, counted=120.0, own=5.0, cores=2)
    assert Finding("the hypervisor takes 0.9 of 2 cores", True) in others(before, stolen)


def test_a_machine_that_counts_nothing_is_unknown_not_quiet() -> None:
    still = Spent(clock=20.0, busy=0.0, stolen=0.0, counted=0.0, own=5.0, cores=2)
    for after in (still, None):
        (finding,) = others(Spent(10.0, 0.0, 0.0, 0.0, 4.0, 2), after)
        assert "unknown" in finding.text
        assert not finding.disturbs


def test_little_memory_disturbs() -> None:
    text = "MemTotal:       24000000 kB\nMemFree: 1 kB\nMemAvailable:   {} kB\n"
    assert meminfo(text.format(20_000_000)) == Finding("20.5 of 24.6 GB of memory are free")
    assert meminfo(text.format(2_000_000)).disturbs
    assert free_percent("57\n", "17179869184\n") == Finding("9.8 of 17.2 GB of memory are free")
    assert free_percent("7\n", "17179869184\n").disturbs
    assert free_percent("", "") == Finding("free memory: unknown, sysctl does not say")


@pytest.mark.parametrize(
    ("name", "driver", "disturbs"),
    [
        ("performance", "acpi-cpufreq", False),
        ("powersave", "acpi-cpufreq", True),
        ("powersave", "intel_pstate", False),
        ("schedutil", "cppc_cpufreq", False),
    ],
)
def test_a_governor_that_holds_the_clock_down_disturbs_and_does_not_pass(
    name: str, driver: str, disturbs: bool
) -> None:
    assert governor(name, driver) == Finding(f"the CPU governor is {name} ({driver})", disturbs, passes=False)


def test_kernels_of_another_processor_disturb_and_do_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """With them OpenBLAS is held back, and what is compared with a BLAS of another kind with it."""
    found = Finding("OPENBLAS_CORETYPE=Haswell: OpenBLAS has the kernels of that processor", True, passes=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert found in read(seconds=0.0)
    monkeypatch.delenv("OPENBLAS_CORETYPE")
    assert found not in read(seconds=0.0)


def test_a_battery_disturbs_and_the_mains_do_not() -> None:
    assert battery(ON_POWER) == Finding("power: AC Power, battery at 100 %", passes=False)
    assert battery(ON_BATTERY) == Finding("power: Battery Power, battery at 87 %", True, passes=False)
    assert battery("Now drawing from 'AC Power'\n") == Finding("power: AC Power", passes=False), "a desktop"
    assert "unknown" in battery("").text


def test_low_power_mode_disturbs() -> None:
    assert low_power_mode(PMSET.format(1)) == Finding("Low Power Mode: on", True, passes=False)
    assert low_power_mode(PMSET.format(0)) == Finding("Low Power Mode: off", passes=False)
    assert not low_power_mode(" powermode            2\n").disturbs, "High Power Mode"
    assert low_power_mode("").text == "Low Power Mode: unknown"


def test_heat_disturbs() -> None:
    name = "com.apple.system.thermalpressurelevel"
    assert thermal_pressure(f"{name} 0\n") == Finding("thermal pressure: nominal")
    assert thermal_pressure(f"{name} 2\n") == Finding("thermal pressure: heavy", True)
    assert "unknown" in thermal_pressure("").text
    assert speed_limit(COOL) == []
    assert speed_limit(HOT.replace("63", "100")) == []
    assert speed_limit(HOT) == [Finding("heat: the processor's clock is held at 63 %", True)]


def test_the_last_sample_of_top_counts() -> None:
    assert idle_share(TOP, 10) == Finding("other programs keep 0.6 of 10 cores busy")
    assert idle_share(TOP.replace("94.0", "60.0"), 10).disturbs
    assert "unknown" in idle_share("", 10).text


def test_other_users_of_a_gpu_and_its_heat_disturb() -> None:
    assert gpus(H200.format(0)) == [Finding("NVIDIA H200: 34 °C, 0 % busy, 612 of 143771 MiB in use")]
    assert gpus(H200.format(37))[0].disturbs
    assert gpus(H200.format(0).replace("Not Active", "Active"))[1] == Finding("NVIDIA H200: heat slows it down", True)
    assert "unknown" in gpus("no such field")[0].text
    assert not gpus(H200.format("[N/A]"))[0].disturbs
    assert gpu_users("4711, python3, 2048\n") == [Finding("another program is on the GPU: 4711, python3", True)]
    assert gpu_users("\n") == []


def test_this_machine_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {finding.text for finding in read(0.0)}
    assert any("of memory are free" in text for text in said)
    monkeypatch.setattr(sys, "platform", "darwin")
    texts = {"top": TOP, "sysctl": "57", "pmset": ON_BATTERY, "notifyutil": "", "nvidia-smi": None}
    monkeypatch.setattr(surroundings, "said", lambda *command: texts[command[0]])
    found = read()
    assert [finding.text for finding in found if finding.disturbs] == ["power: Battery Power, battery at 87 %"]


def test_a_command_that_is_not_there_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert all("unknown" in finding.text for finding in read())


class Clock:
    """Looks at a machine that is quiet after so many seconds."""

    def __init__(self, quiet_after: float, passes: bool = True) -> None:
        self.slept, self.looks, self._quiet, self._passes = 0.0, 0, quiet_after, passes

    def rest(self, seconds: float) -> None:
        self.slept += seconds

    def look(self) -> list[Finding]:
        self.looks += 1
        return [Finding("busy", self.slept < self._quiet, self._passes)]


@pytest.mark.parametrize(
    ("quiet_after", "passes", "slept", "disturbs"),
    [(0, True, 10, False), (18, True, 20, False), (1000, True, 40, True), (1000, False, 10, True)],
)
def test_a_machine_is_waited_for_until_it_is_quiet_and_no_longer(
    quiet_after: float, passes: bool, slept: float, disturbs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(quiet_after, passes)
    (finding,) = settle(10, 30, clock.look, clock.rest)
    assert (clock.slept, finding.disturbs) == (slept, disturbs)
    assert capsys.readouterr().out.count("busy: waiting up to") == clock.looks - 1


def test_what_others_take_meanwhile_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([Spent(0.0, 0.0, 0.0, 0.0, 0.0, 2), Spent(10.0, 12.0, 0.0, 20.0, 2.0, 2)])
    monkeypatch.setattr(surroundings, "spent", lambda: next(counts))
    assert Meanwhile().findings() == [Finding("meanwhile other programs keep 1.0 of 2 cores busy", True)]
    monkeypatch.setattr(surroundings, "spent", lambda: None)
    assert Meanwhile().findings() == []

"""Energy, temperature and frequency where the system lets them be read; otherwise the reason.

Linux only, under /sys. The energy counters (RAPL) are those of the whole processor package, the
power that a battery gives is the whole machine's: whatever else runs at that time is in them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")

_NO_ENERGY = (
    "no readable energy counter in class/powercap (Linux on x86 has them, often for root only, "
    "virtual machines have none) and no discharging battery in class/power_supply that tells its "
    "power"
)
_NO_THERMAL = "no temperature sensor in class/thermal or class/hwmon"
_NO_FREQUENCY = "the system does not say (no cpufreq)"


@dataclass(frozen=True)
class Reading:
    """The sensors at one moment (`at`, in seconds of a monotonic clock): micro-joules by RAPL zone,
    watts of all batteries that discharge, hottest degrees Celsius, mean MHz.
    """

    at: float
    energy_uj: Mapping[str, int]
    battery_w: float | None
    temperature_c: float | None
    frequency_mhz: float | None


class Sensors:
    """The sensors of this machine; `root` is where sysfs is mounted."""

    def __init__(self, root: Path = SYS) -> None:
        # Zones "intel-rapl:0", one a package; "intel-rapl:0:1" is a part of one.
        self._zones = {
            zone.name: wrap
            for zone in sorted(root.glob("class/powercap/*:*"))
            if zone.name.count(":") == 1
            and (wrap := _number(zone / "max_energy_range_uj"))
            and _number(zone / "energy_uj") is not None
        }
        self._energy = {name: root / "class/powercap" / name / "energy_uj" for name in self._zones}
        self._supplies = sorted(root.glob("class/power_supply/*"))
        self._temperatures = [
            *root.glob("class/thermal/thermal_zone*/temp"),
            *root.glob("class/hwmon/hwmon*/temp*_input"),
        ]
        self._frequencies = sorted(root.glob("devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"))

    def read(self) -> Reading:
        """Reads what there is."""
        energy = {name: _number(path) for name, path in self._energy.items()}
        heat = [t / 1e3 for path in self._temperatures if (t := _number(path))]
        clock = [f / 1e3 for path in self._frequencies if (f := _number(path))]
        drawn = [w for supply in self._supplies if (w := _watts(supply))]
        return Reading(
            time.monotonic(),
            {name: value for name, value in energy.items() if value is not None},
            sum(drawn) if drawn else None,
            max(heat, default=None),
            sum(clock) / len(clock) if clock else None,
        )

    @property
    def energy(self) -> str:
        """The sensor that `joules` reads, "" for none."""
        if self._zones:
            return "RAPL, the whole processor package"
        return "battery, the whole machine" if self.read().battery_w else ""

    def joules(self, before: Reading, after: Reading) -> float | None:
        """Energy between two readings, None where nothing tells it. A counter may wrap around once;
        a battery's power is taken to change evenly from one reading to the other.
        """
        if not self._zones:
            if before.battery_w is None or after.battery_w is None:
                return None
            return (before.battery_w + after.battery_w) / 2 * (after.at - before.at)
        if not before.energy_uj.keys() == after.energy_uj.keys():
            return None
        spent = 0
        for name, start in before.energy_uj.items():
            step = after.energy_uj[name] - start
            spent += step if step >= 0 else step + self._zones[name]
        return spent / 1e6

    def unavailable(self) -> dict[str, str]:
        """The metrics that this machine does not give, with the reason."""
        now, missing = self.read(), {}
        if not self.energy:
            missing["energy_j"] = _NO_ENERGY
        if now.temperature_c is None:
            missing["temperature_c"] = _NO_THERMAL
        if now.frequency_mhz is None:
            missing["frequency_mhz"] = _NO_FREQUENCY
        return missing


def power_mode(root: Path = SYS) -> tuple[str, ...]:
    """Known facts of the machine's power: governor, energy preference, boost, mains, battery."""
    cpu = root / "devices/system/cpu"
    found = [
        ("governor", _text(cpu / "cpu0/cpufreq/scaling_governor")),
        ("preference", _text(cpu / "cpu0/cpufreq/energy_performance_preference")),
        ("boost", _text(cpu / "cpufreq/boost")),
        ("profile", _text(root / "firmware/acpi/platform_profile")),
    ]
    for supply in sorted(root.glob("class/power_supply/*")):
        if (online := _text(supply / "online")) is not None:
            found.append((f"mains {supply.name}", "on" if online == "1" else "off"))
        elif (status := _text(supply / "status")) is not None:
            drawn = f", {watts:.1f} W" if (watts := _watts(supply)) else ""
            found.append((f"battery {supply.name}", f"{status}{drawn}"))
    return tuple(f"{name}: {value}" for name, value in found if value)


def _watts(supply: Path) -> float | None:
    """A battery's output now; None for mains, one that charges, one that does not tell."""
    if _text(supply / "status") != "Discharging":
        return None
    if power := _number(supply / "power_now"):
        return abs(power) / 1e6
    current, voltage = _number(supply / "current_now"), _number(supply / "voltage_now")
    return abs(current * voltage) / 1e12 if current and voltage else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

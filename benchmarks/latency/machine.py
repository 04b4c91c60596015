"""Machine and software that a report is from."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path

import psutil

from edgevlm.benchmarks.latency.report import Machine
from edgevlm.benchmarks.latency.sensors import SYS, power_mode
from edgevlm.machine import memory, processor_name, usable_cpus

_PACKAGES = ("edgevlm", "onnxruntime", "llama-cpp-python", "numpy", "pillow")


def this_machine(sys_root: Path = SYS) -> Machine:
    """Describes the machine that runs this."""
    return Machine(
        cpu=processor_name(),
        architecture=platform.machine(),
        flags=_flags(),
        physical_cores=psutil.cpu_count(logical=False) or 1,
        usable_cores=usable_cpus(),
        memory_bytes=memory().total_bytes,
        system=platform.platform(),
        power=power_mode(sys_root),
        load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def software() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    versions = {"python": platform.python_version()}
    return versions | {name: metadata.version(name) for name in _PACKAGES}


def differences(a: Machine, b: Machine) -> list[str]:
    """Differences that forbid a comparison of two machines; empty for the same."""
    found = []
    for name in ("cpu", "architecture", "physical_cores", "usable_cores"):
        if (x := getattr(a, name)) != (y := getattr(b, name)):
            found.append(f"{name.replace('_', ' ')} {x} and {y}")
    # Firmware and kernels keep a varying part of the memory for themselves.
    if abs(a.memory_bytes - b.memory_bytes) > 0.05 * max(a.memory_bytes, b.memory_bytes):
        sizes = (f"{m.memory_bytes / 2**30:.1f}" for m in (a, b))
        found.append(f"memory {' and '.join(sizes)} GiB")
    return found


def _flags() -> tuple[str, ...]:
    """The processor's features, in the system's words."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    flags = re.search(r"^(?:flags|Features)\s*: (.+)", text, re.MULTILINE)
    return tuple(flags[1].split()) if flags else ()

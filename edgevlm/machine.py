"""Cores and memory that this process may use.

The smallest of what the machine has, what the process is bound to, and what the control groups of
its container allow: a program in `docker run --cpus 1 --memory 4g` sees every core and all memory
of the host otherwise. Read anew at every call, since limits may be changed while a process runs.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/")
# As version 2 and version 1 of control groups call them; a folder has those of one version.
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USED = ("memory.current", "memory.usage_in_bytes")
# Pages of files, which the kernel takes back where memory is needed; version 1 counts the groups
# below in the "total" ones.
_FILE_PAGES = r"^(total_)?(?:in)?active_file (\d+)$"


@dataclass(frozen=True)
class Memory:
    """Memory that this process may use, in bytes: all of it, and what is free now."""

    total_bytes: int
    free_bytes: int


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists: a new one is going to be on its disk."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def processor_name() -> str:
    """The processor's name, as far as the system tells it."""
    # platform.processor() is empty or generic on Linux; processors of phones have no model name.
    name = re.search(r"^(?:model name|Model)\s*: (.+)", _text(_ROOT / "proc/cpuinfo"), re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def processor() -> str:
    """The processor's name and all that the system says of its instructions, so that two on which
    the same program may compute otherwise have two descriptions.
    """
    said = _text(_ROOT / "proc/cpuinfo")
    keys = r"^(?:flags|Features|CPU (?:implementer|variant|part))\s*: .+"
    return "\n".join((processor_name(), *sorted({*re.findall(keys, said, re.MULTILINE)})))


def physical_cores() -> int:
    """Physical cores that this process may keep busy: those for threads that compute."""
    physical = psutil.cpu_count(logical=False)
    return min(physical or usable_cpus(), usable_cpus())


def usable_cpus(root: Path = _ROOT) -> int:
    """Logical CPUs that this process may keep busy, at least 1.

    A quota counts as the whole CPUs in it: threads that compute one layer wait for one another, and
    one more than the quota has CPUs for stops all of them for a part of every period.
    """
    if hasattr(os, "sched_getaffinity"):
        bound = len(os.sched_getaffinity(0))
    else:
        bound = os.cpu_count() or 1
    if hasattr(os, "process_cpu_count"):  # Python 3.13; -X cpu_count and PYTHON_CPU_COUNT set it.
        bound = min(bound, os.process_cpu_count() or bound)
    quota = cpu_quota(root)
    return bound if quota is None else max(1, min(bound, int(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """CPUs whose time this process may use, such as 1.5; None where nothing limits it."""
    return min((q for folder in _groups(root, "cpu") if (q := _quota(folder))), default=None)


def memory(root: Path = _ROOT) -> Memory:
    """Memory that this process may use."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _groups(root, "memory"):
        limit = min((n for name in _LIMITS if (n := _number(folder / name)) is not None), default=0)
        if limit:
            used = next((n for name in _USED if (n := _number(folder / name)) is not None), 0)
            total = min(total, limit)
            free = min(free, max(0, limit - used + _file_pages(folder)))
    return Memory(total, free)


def free_address_space() -> int | None:
    """Bytes of address space that this process may still take under `ulimit -v`; None where
    nothing limits it. Mapped files and what threads reserve for themselves count, used or not.
    """
    if os.name == "nt":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - int(psutil.Process().memory_info().vms))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control groups, each before the one around it.

    A limit holds for all groups in a group. Where a container sees its own group as the outermost,
    or where the host's folders are not mounted in it, these are the folders that it sees.
    """
    own = dict(
        (names, path)
        for line in _text(root / "proc/self/cgroup").splitlines()
        if line.count(":") >= 2
        for _, listed, path in [line.split(":", 2)]
        for names in listed.split(",")
    )
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            path = own.get("")
        elif kind[0] == "cgroup" and controller in kind[2].split(","):
            path = own.get(controller)
        else:
            continue
        shown, place = (_unescaped(field) for field in fields[3:5])
        top = root / place.lstrip("/")
        folder = top / _below(path or "/", shown)
        yield from (f for f in (folder, *folder.parents) if f == top or top in f.parents)


def _below(path: str, shown: str) -> str:
    """A group's path below the one that is mounted; empty where it lies elsewhere."""
    parts = Path(path).parts[1:]
    mounted = Path(shown).parts[1:]
    if ".." in (*parts, *mounted) or parts[: len(mounted)] != mounted:
        return ""
    return "/".join(parts[len(mounted) :])


def _quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split() or [
        *_text(folder / "cpu.cfs_quota_us").split(),
        *_text(folder / "cpu.cfs_period_us").split(),
    ]
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None  # "max" and -1 are no limit.
    quota, period = map(int, words)
    return quota / period if quota and period else None


def _file_pages(folder: Path) -> int:
    counts = re.findall(_FILE_PAGES, _text(folder / "memory.stat"), re.MULTILINE)
    with_groups_below = any(total for total, _ in counts)
    return sum(int(n) for total, n in counts if bool(total) == with_groups_below)


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    """The content of a file of the kernel's; empty where there is none to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)

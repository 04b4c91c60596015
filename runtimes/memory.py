"""Memory that this process holds, and held at most."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import psutil

# The words of an engine that was refused memory: C++'s, C's, onnxruntime's and ggml's.
_REFUSED = re.compile(
    r"bad_alloc|cannot allocate|unable to allocate|failed to allocate|out of memory|pthread_create",
    re.IGNORECASE,
)


def was_refused(reason: str) -> bool:
    """True if an engine's message says that it got no memory, or none for a thread's stack."""
    return bool(_REFUSED.search(reason))


def resident_bytes() -> int:
    """Resident size of this process, memory-mapped weights included, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    if os.name == "nt":
        memory: Any = psutil.Process().memory_info()
        return int(memory.peak_wset)
    # On Linux ru_maxrss begins with what the parent held when it started this process.
    if sys.platform == "linux" and (kib := re.search(r"VmHWM:\s+(\d+) kB", _status())):
        return int(kib[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status() -> str:
    return Path("/proc/self/status").read_text(encoding="utf-8")

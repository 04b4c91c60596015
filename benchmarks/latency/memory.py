"""Memory of a round by component, and whether a load was really cold."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edgevlm.runtimes.memory import peak_bytes, resident_bytes

_IO = Path("/proc/self/io")
# A load counts as cold when at least this part of the bundle came from storage.
_COLD_PART = 0.5


class MemoryMarks:
    """Resident size at marks: "base", "vision" and "decoder" loaded, picture "seen", "answered".

    Pages of memory-mapped weights count once they are touched, so a component is what its load and
    its first use added. What is freed in between (the decoded picture) stays with the first.
    """

    def __init__(self) -> None:
        self._marks: dict[str, int] = {}

    def mark(self, name: str) -> None:
        """Notes the resident size now."""
        self._marks[name] = resident_bytes()

    def samples(self) -> dict[str, tuple[float, ...]]:
        """Bytes by metric, from the marks, and the peak so far."""
        parts = {
            "peak_rss_bytes": peak_bytes(),
            "memory_base_bytes": self._marks["base"],
            "memory_vision_bytes": self._added("base", "vision") + self._added("decoder", "seen"),
            "memory_decoder_bytes": self._added("vision", "decoder")
            + self._added("seen", "answered"),
        }
        return {name: (float(value),) for name, value in parts.items()}

    def _added(self, before: str, after: str) -> int:
        return max(self._marks[after] - self._marks[before], 0)

    def drop_file_cache(self, folder: Path) -> str:
        """Asks the system to forget the bundle's pages; returns why not, "" if it was asked."""
        if not hasattr(os, "posix_fadvise"):
            return "this system cannot drop single files from its cache"
        for path in _files(folder):
            with path.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return ""

    def bytes_read(self) -> int | None:
        """Bytes that storage has delivered to this process; None where it is not told."""
        try:
            match = re.search(r"^read_bytes: (\d+)", _IO.read_text(encoding="utf-8"), re.MULTILINE)
        except OSError:
            return None
        return int(match[1]) if match else None

    def why_not_cold(self, before: int | None, folder: Path) -> str:
        """The reason why the load since `before` was not a cold one; "" if it was."""
        after = self.bytes_read()
        if before is None or after is None:
            return "whether the files came from storage cannot be read here"
        size = sum(path.stat().st_size for path in _files(folder))
        if after - before < _COLD_PART * size:
            return (
                f"the system kept the files in memory ({after - before} of {size} bytes were read "
                "from storage)"
            )
        return ""


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]

"""`python child.py PEER.py`: one turn of a peer; the task as JSON in, its answer as JSON out.

Needs nothing but Python, so that a peer can live in an environment without edgevlm.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_LONGEST = 200


def turn(file: str, task: dict[str, Any]) -> dict[str, Any]:
    """The answer of the peer in `file`, with its version and this process's peak memory; or, under
    "error", why there is none, and under "state" that in two words where it is clear.
    """
    try:
        peer = runpy.run_path(file)
        found: dict[str, Any] = peer["answer"](task)
        found["version"] = metadata.version(peer["PACKAGE"])
    except ImportError as e:
        return {"error": _line(e), "state": "not installed"}
    except NotImplementedError as e:
        return {"error": _line(e), "state": "not supported"}
    except Exception as e:
        return {"error": f"{type(e).__name__}: {_line(e)}"}
    if peak := _peak_bytes():
        found["peak_rss_bytes"] = peak
    return found


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"


def _peak_bytes() -> int | None:
    """VmHWM where Linux tells it: ru_maxrss begins with what the parent held."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None


def main() -> None:
    """Asks a peer; what libraries print goes to stderr, stdout carries the answer alone."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(turn(sys.argv[1], json.loads(sys.stdin.read()))), file=out, flush=True)


if __name__ == "__main__":
    main()

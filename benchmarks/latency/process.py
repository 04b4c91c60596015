"""Child processes that see the same edgevlm as this one."""

from __future__ import annotations

import os
import sys


def environment() -> dict[str, str]:
    """The environment for a child: the parent's, with its module path."""
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

"""TinyGPT-V's downloads, made ready for export without exporting them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.export import pipeline
from edgevlm.export.components import Job
from edgevlm.export.options import ReadOptions

# Sizes of write_tinygptv for tests that look at files and not at answers.
SMALL = {"vision_layers": 1, "q_layers": 2, "mlp": 64, "middle": 16}


def prepared(source: Path, **options: Any) -> Job:
    """What `edgevlm export` knows of a source before it writes anything."""
    return pipeline.read(source, ReadOptions(**options))

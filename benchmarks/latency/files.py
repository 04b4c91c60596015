"""A report's files, and the picture that is asked about when none is named."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from edgevlm import cleanup
from edgevlm.benchmarks.latency.page import to_html
from edgevlm.benchmarks.latency.report import Report, to_json
from edgevlm.benchmarks.latency.tables import to_csv, to_markdown
from edgevlm.errors import BenchError
from edgevlm.export.parity.images import scene

# A picture of a megapixel, so that decoding and resizing cost what they cost a user.
_SCALE = 3


def make_folder(folder: Path) -> None:
    """Makes the folder of a report. Raises BenchError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BenchError(
            f"{folder}: cannot be made ({e.strerror or e}); choose another folder"
        ) from None


def write_files(report: Report, folder: Path) -> list[Path]:
    """Writes report.json, .csv, .md and .html; returns their paths. Raises BenchError."""
    formats = {"json": to_json, "csv": to_csv, "md": to_markdown, "html": to_html}
    written = []
    for suffix, write in formats.items():
        path = folder / f"report.{suffix}"
        try:
            # The command line in it may name files that are no text.
            cleanup.write_whole(path, write(report).encode(errors="backslashreplace"))
        except OSError as e:
            raise BenchError(
                f"{path}: cannot be written ({e.strerror or e}); choose another folder"
            ) from None
        written.append(path)
    return written


def default_picture(folder: Path) -> Path:
    """Writes the drawn scene as a JPEG of 1200 x 900 pixels into `folder`."""
    small = Image.fromarray(scene())
    path = folder / "drawn-scene.jpg"
    small.resize((small.width * _SCALE, small.height * _SCALE)).save(path, quality=90)
    return path

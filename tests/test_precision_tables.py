"""The page of precisions: its tables are replaced where they stand, and say what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm.benchmarks.quality import MeasuredQuality
from edgevlm.bundle import open_bundle
from edgevlm.errors import ExportError
from edgevlm.models import resolve
from workshop import precisions


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"# Title\n\n{precisions._BEGIN}\nold\n{precisions._END}\n\nEnd\n", encoding="utf-8"
    )
    for _ in range(2):
        precisions.write(page, "| new \\1 |")
        found = page.read_text(encoding="utf-8")
        assert found.startswith("# Title\n") and found.endswith("\nEnd\n")
        assert "old" not in found and found.count("| new \\1 |") == 1
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ExportError, match="has no lines"):
        precisions.write(page, "text")
    assert page.read_text(encoding="utf-8") == "no marks"


def test_a_line_says_how_far_a_precision_is_from_the_reference() -> None:
    row = precisions.Row("vision", "int8", open_bundle(resolve(None)))
    near = MeasuredQuality(0.99984, 0.99991, 0.0029, 0.98, 100, {"all": 0.94})
    reference = precisions.Measured(row, replace(near, accuracy={"all": 0.95}), None)
    section = precisions._vision([reference, precisions.Measured(row, near, None)], "T", 0.95)
    assert len(section.head) == len(section.rows[1])
    line = dict(zip(section.head, section.rows[1], strict=True))
    assert line["precision"] == "int8" and line["size"].endswith(" MB")
    assert line["features"] == "0.99984" and line["KL, nats"] == "0.0029"
    assert (line["top-1"], line["accuracy"], line["change"]) == ("98.0 %", "94.0 %", "-1.0")


def test_every_row_but_those_of_another_cache_is_timed(tmp_path: Path) -> None:
    pico = open_bundle(resolve(None))
    made = [
        precisions.Row("vision", "int8", pico),
        precisions.Row("decoder", "q8_0", pico, kv="q8_0"),
    ]
    (result,) = precisions.speeds(made, tmp_path, runs=1).results
    assert result.name == "vision int8" and "vision_ms" in result.metrics

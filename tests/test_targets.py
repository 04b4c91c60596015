"""What a kind of device gets, and that explicit options come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click.testing
import pytest

from edgevlm.cli import cli
from edgevlm.errors import ExportError
from edgevlm.export import TARGETS, export_bundle, pipeline, precisions
from edgevlm.export.options import WriteOptions


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[WriteOptions]:
    """The options with which exports were started; none runs."""
    seen: list[WriteOptions] = []

    def run(source: Any, out: Any, read: Any, options: WriteOptions, report: Any) -> None:
        seen.append(options)
        raise ExportError("seen enough")

    monkeypatch.setattr(pipeline, "run", run)
    return seen


def names(options: WriteOptions) -> tuple[str, ...]:
    return tuple(v.name for v in options.vision)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_picks_both_halves(asked: list[WriteOptions], name: str) -> None:
    target = TARGETS[name]
    assert precisions.quant(target.quant) and precisions.vision_precisions(target.vision)
    # Every set runs on a plain processor, too.
    assert {"int8", "fp16", "fp32"} & set(target.vision)
    with pytest.raises(ExportError, match="seen enough"):
        export_bundle("source", "out", target=name)
    assert (asked[0].quant.name, names(asked[0])) == (target.quant, target.vision)


def test_laptop_is_the_default(asked: list[WriteOptions]) -> None:
    with pytest.raises(ExportError, match="seen enough"):
        export_bundle("source", "out")
    assert (asked[0].quant.name, names(asked[0])) == ("q4_k_m", ("int8",))


def test_explicit_options_come_first(asked: list[WriteOptions], tmp_path: Path) -> None:
    words = ["export", "source", str(tmp_path), "--target", "npu", "--quant", "q6_k"]
    more = ["--vision-precision", "int4", "--vision-precision", "fp16"]
    runner = click.testing.CliRunner()
    for options in ([], more):
        with pytest.raises(ExportError, match="seen enough"):
            runner.invoke(cli, [*words, *options], catch_exceptions=False, standalone_mode=False)
    assert [o.quant.name for o in asked] == ["q6_k", "q6_k"]
    assert [names(o) for o in asked] == [TARGETS["npu"].vision, ("int4", "fp16")]


def test_an_unknown_target() -> None:
    with pytest.raises(ExportError, match="target 'fridge' is not known; choose from laptop"):
        export_bundle("source", "out", target="fridge")

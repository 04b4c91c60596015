"""edgevlm doctor"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

import edgevlm
from edgevlm import store
from edgevlm.cli.common import model_option
from edgevlm.cli.signals import Aside
from edgevlm.models import BUILT_IN, installed, is_dual

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edgevlm.types import Placement

_BY_THE_RULES = "those above; `edgevlm tune` measures them"


@click.command(cls=Aside)
@model_option
def doctor(model: str | None) -> None:
    """Show what this machine has and lacks, and what a model would use of it.

    For what is missing, the line that installs it.
    """
    model = model if model is not None else store.default()
    console = Console(markup=False, highlight=False)
    _print(console, "", (*_machine(), *_packages()))
    _print(console, "Vision encoder", _vision())
    _print(console, "Vision encoder: what is missing", _vision_missing())
    _print(console, "Decoder", _decoder())
    _print(console, "Decoder: what is missing", _decoder_missing())
    _print(console, "Settings where you choose none", _settings())
    _print(console, f"{model or 'The built-in model'} uses", _used(model))


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    if not table.row_count:
        return
    if title:
        console.print()
        console.print(title, style="bold")
    console.print(table)


def _machine() -> list[tuple[str, str]]:
    import psutil

    from edgevlm.machine import memory, physical_cores, processor_name

    free, all_of_it = memory().free_bytes, memory().total_bytes
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return [
        ("edgevlm", edgevlm.__version__),
        ("system", platform.platform()),
        ("python", platform.python_version()),
        ("processor", processor_name()),
        ("cores", f"{physical_cores()} of {physical} for this process"),
        ("memory", f"{free / 2**30:.1f} of {all_of_it / 2**30:.1f} GiB free"),
    ]


def _vision() -> list[tuple[str, str]]:
    from edgevlm.runtimes.vision.ort import Ort

    return [
        (o.word, " ".join(filter(None, (o.provider.name, o.version, o.hardware))))
        for o in Ort().offers()
    ]


def _vision_missing() -> list[tuple[str, str]]:
    from edgevlm.runtimes.vision import ort
    from edgevlm.runtimes.vision.providers import label, missing

    offers, broken = ort.Ort().offers(), ort.broken_plugins()
    names: dict[str, list[str]] = {}
    for p in missing(offers):
        line = f"its library does not load: {broken[p.name]}" if p.name in broken else p.install
        names.setdefault(line, []).append(label(p))
    return [("\n".join(words), line) for line, words in names.items()]


def _decoder() -> list[tuple[str, str]]:
    from edgevlm.runtimes.llama import ggml

    version = importlib.metadata.version("llama-cpp-python")
    rows = [("cpu", f"llama-cpp-python {version}: {' '.join(ggml.cpu_features())}")]
    for d in ggml.devices():
        memory = f"{d.free_bytes / 2**30:.1f} of {d.total_bytes / 2**30:.1f} GiB free"
        rows.append((d.backend.word, f"{d.name}: {d.description}, {memory}"))
    return rows


def _decoder_missing() -> list[tuple[str, str]]:
    from edgevlm.runtimes.llama import backends, ggml

    there = {d.backend for d in ggml.devices()}
    lacking = [b for b in backends.BACKENDS if b not in there and sys.platform in b.systems]
    return [
        (b.word, b.install if i == 0 else f"likewise with -D{b.switch}=on")
        for i, b in enumerate(lacking)
    ]


def _settings() -> list[tuple[str, str]]:
    from edgevlm.runtimes import rules

    facts = rules.this_machine("q4_k_m")
    rows = []
    for name, what in (
        ("threads", "of both engines"),
        ("repacking", "of q4_k_m weights, of a copy for decode alone or of all"),
        ("spinning", "onnxruntime's workers wait busily"),
        ("vision", "precision on the CPU"),
    ):
        found = rules.rule(name, facts)
        value = found.value(facts)
        shown = " ".join(value) if isinstance(value, tuple) else str(value)
        shown = {"True": "on", "False": "off", "": "the main one"}.get(shown, shown)
        rows.append((name, f"{shown} ({what}); {found.evidence}"))
    return rows


def _used(model: str | None) -> list[tuple[str, str]]:
    named = Path(model or BUILT_IN)
    if is_dual(named if named.exists() else installed().get(str(model), named)):
        assert model is not None
        with edgevlm.load_dual(model) as dual:
            return [*_part("vision", dual.placement), ("text", "cpu")]
    rows = []
    with edgevlm.load(model) as vlm:
        for part, placement in (("vision", vlm.devices.vision), ("decoder", vlm.devices.decoder)):
            rows += _part(part, placement)
        measured = (
            "measured here" if vlm.settings.tuned else "by the rules; `edgevlm tune` measures"
        )
        rows.append(("settings", measured))
    return rows


def _part(name: str, placement: Placement) -> list[tuple[str, str]]:
    precision = f", {placement.precision}" if placement.precision else ""
    skipped = [("", f"skipped {note}") for note in placement.notes]
    return [(name, f"{placement}{precision}"), *skipped]


def _packages() -> list[tuple[str, str]]:
    """Each extra: complete, or the line that installs what is missing."""
    missing: dict[str, list[str]] = {}
    for line in importlib.metadata.requires("edgevlm") or []:
        if (extra := re.search(r'extra == "(\w+)"', line)) is None:
            continue
        name = re.match(r"[\w.-]+", line)
        assert name is not None
        lacking = missing.setdefault(extra[1], [])
        if name[0] != "edgevlm" and not _installed(name[0]):
            lacking.append(name[0])
    return [
        (
            f"[{extra}]",
            f'lacks {", ".join(names)}: pip install "edgevlm[{extra}]"' if names else "ok",
        )
        for extra, names in missing.items()
    ]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

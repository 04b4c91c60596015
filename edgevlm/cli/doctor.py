"""edgevlm doctor"""

from __future__ import annotations

import importlib.metadata
import platform
import re

import click
from rich.console import Console
from rich.table import Table

import edgevlm


@click.command()
def doctor() -> None:
    """Show what this machine has and lacks.

    For what is missing, the line that installs it.
    """
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in (*_machine(), *_engines(), *_packages()):
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


def _machine() -> list[tuple[str, str]]:
    import psutil

    from edgevlm.runtimes.loading import default_threads

    memory = psutil.virtual_memory()
    return [
        ("edgevlm", edgevlm.__version__),
        ("system", platform.platform()),
        ("python", platform.python_version()),
        ("processor", _processor()),
        ("threads used", str(default_threads())),
        ("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
    ]


def _processor() -> str:
    """The processor's name; platform.processor() is empty or generic on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            if match := re.search(r"model name\s*: (.+)", f.read()):
                return match[1]
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _engines() -> list[tuple[str, str]]:
    import llama_cpp
    import onnxruntime

    from edgevlm.runtimes.decoder import cpu_features, default_repack

    providers = ", ".join(onnxruntime.get_available_providers())
    return [
        ("vision", f"onnxruntime {onnxruntime.__version__}, CPU (offered: {providers})"),
        ("decoder", f"llama-cpp-python {llama_cpp.__version__}, CPU"),
        ("llama.cpp", " ".join(cpu_features())),
        ("repacking", "on" if default_repack() else "off (AVX-512 VNNI)"),
    ]


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

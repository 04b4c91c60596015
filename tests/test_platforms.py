"""Windows and macOS, as far as stand-ins for them go: libraries, processors, folders, consoles."""

from __future__ import annotations

import io
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import platformdirs
import psutil
import pytest
from platformdirs.macos import MacOS
from platformdirs.windows import Windows

from edgevlm import gguf_file, machine, models
from edgevlm.cli import streams
from edgevlm.errors import EngineMissing
from edgevlm.gguf_file import Library
from edgevlm.runtimes import memory


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the libraries of an installed llama_cpp that holds none yet."""
    package = tmp_path / "Program Files" / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    spec = ModuleSpec("llama_cpp", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: spec)
    return package / "lib"


@pytest.mark.parametrize(
    ("system", "names"),
    [
        ("linux", ["libggml.so"]),
        ("win32", ["ggml.dll", "libggml.dll"]),
        ("darwin", ["libggml.dylib", "libggml.so"]),
        ("android", ["libggml.so"]),
    ],
)
def test_libraries_have_each_systems_names(
    llama_cpp: Path, monkeypatch: pytest.MonkeyPatch, system: str, names: list[str]
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with pytest.raises(EngineMissing, match=f"{names[0]} of llama.cpp is missing"):
        _ = Library("ggml").folder
    for name in reversed(names):  # the first is preferred
        (llama_cpp / name).touch()
        assert gguf_file._path("ggml") == llama_cpp / name
    assert Library("ggml").folder == llama_cpp


@pytest.mark.parametrize(
    "said",
    [
        "processor\t: 0\nBogoMIPS\t: 38.40\nFeatures\t: fp asimd aes\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n",
        "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: sse avx2\n",
        "",  # macOS and Windows have no such file
    ],
)
def test_a_processor_is_told_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr("platform.processor", lambda: "arm")
    (tmp_path / "proc" / "cpuinfo").write_text(said, encoding="utf-8")
    mine = machine.processor()
    assert mine == machine.processor() and mine
    assert all(word in mine for word in ("asimd", "0xd0b") if "asimd" in said)
    for old, new in (("aes", "aes i8mm"), ("0xd0b", "0xd46"), ("avx2", "avx512f")):
        if old in said:
            changed = said.replace(old, new)
            (tmp_path / "proc" / "cpuinfo").write_text(changed, encoding="utf-8")
            assert machine.processor() != mine


@pytest.mark.parametrize(
    ("system", "data", "cache"),
    [
        (MacOS, "Library/Application Support/edgevlm", "Library/Caches/edgevlm"),
        (Windows, "Local/edgevlm", "Local/edgevlm/Cache"),
    ],
)
def test_folders_are_where_the_system_has_such(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    system: type[MacOS] | type[Windows],
    data: str,
    cache: str,
) -> None:
    home = tmp_path / "Jürgen Müller"
    monkeypatch.delenv("EDGEVLM_HOME")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda _: str(home / "Local"))

    def found(kind: str) -> object:
        return lambda *args, **options: getattr(system(*args, **options), kind)

    monkeypatch.setattr(platformdirs, "user_data_dir", found("user_data_dir"))
    monkeypatch.setattr(platformdirs, "user_cache_dir", found("user_cache_dir"))
    assert models.directory() == home / data / "models"
    assert Path(os.path.normpath(models.cache_directory())) == home / cache


@pytest.mark.parametrize("encoding", ["cp437", "cp850", "cp1252"])
def test_a_console_of_windows_takes_what_its_encoding_lacks(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    class Console(io.RawIOBase):
        """Not a file: it has no descriptor."""

        def __init__(self) -> None:
            self.written = b""

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.written += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    out, err = Console(), Console()
    for name, raw in (("stdout", out), ("stderr", err)):
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, name, stream)
    with streams.prepared():
        print("a caf\u00e9 \u2603 \u732b")
        print("\u2603", file=sys.stderr)
    assert out.written.decode(encoding) == "a caf\u00e9 ? ?\n"
    assert err.written == b"\\u2603\n"


def test_the_peak_of_memory_is_windows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def memory_info(self) -> object:
            return type("Info", (), {"peak_wset": 12345, "rss": 1})()

    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(psutil, "Process", Process)
    assert memory.peak_bytes() == 12345

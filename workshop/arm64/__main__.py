"""`make arm64`, or `python -m workshop.arm64`: edgevlm on aarch64, without an aarch64 machine.

    python -m workshop.arm64 [--cpu NAME]... [--write]

An arm64 Debian under qemu-user, with llama.cpp cross-compiled for every generation of ARM
processors and edgevlm from a wheel of this tree; in there the core of the test suite and bundles of
every family, compared with this machine's answers on several processors that the emulator knows.
Everything lies in build/arm64; what is made is kept, and made again where the tree changed.
`--write` puts the results into docs/arm64.md. Needs root, debootstrap, a cross compiler and cmake;
missing ones are named with the line that installs them. An hour or more the first time.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import click
import filelock

from edgevlm import machine
from edgevlm.errors import EdgeVLMError
from workshop import wheels
from workshop.arm64 import compare, space
from workshop.arm64.compare import Compared
from workshop.arm64.space import Space

ROOT = Path(__file__).parent.parent.parent
BUILD = wheels.BUILD / "arm64"
# No dot products; dot products; i8mm. With SVE, as neoverse-v1 has, all takes ten times as long.
CPUS = ("cortex-a53", "cortex-a76", "max,sve=off,sme=off,pauth-impdef=on")
_BEGIN, _END = "<!-- results of `make arm64` -->\n", "<!-- end of results -->\n"
# The core: what needs neither torch nor another package of the extras.
TESTS = (
    "runtime",
    "session",
    "conversations",
    "bundle",
    "disk_cache",
    "image",
    "prompt",
    "cli",
    "chat",
    "extra_norms",
    "structured",
    "self_check",
    "pico",
)
# Tiny checkpoints are written with these; torch is not there.
_TESTED_WITH = (
    "pydantic",
    "pytest",
    "pytest-timeout",
    "safetensors",
    "tokenizers",
    "transformers<4.58",
)
# Beside what is installed: the wheel's own packages must not be found here.
_CHECKOUT = ("tests", "workshop", "examples", "docs", "setup.cfg", "README.md")
_ENVIRONMENT = "/opt/edgevlm"
_PYTHON = f"{_ENVIRONMENT}/bin/python"
_GLIBC = 36
_MINUTE = 60
Made = TypeVar("Made")


def main() -> None:
    """Runs the command; an error is one line."""
    try:
        command(standalone_mode=False)
    except EdgeVLMError as e:
        sys.exit(f"arm64: {e}")
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)


@click.command()
@click.option("--cpu", "cpus", multiple=True, default=CPUS, show_default=True)
@click.option("--write", is_flag=True, help="Put the results into docs/arm64.md.")
def command(cpus: Sequence[str], write: bool) -> None:
    """Proves edgevlm on aarch64, emulated."""
    if os.geteuid():
        raise EdgeVLMError("this needs root, for mounts and debootstrap; try sudo")
    shared = BUILD / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with filelock.FileLock(BUILD / "lock"):
        qemu = _step("emulator", lambda: space.emulator(BUILD))
        wheel = _step("llama.cpp for aarch64", _llama_wheel)
        with space.registered(qemu):
            inside = _step("user space", lambda: space.user_space(BUILD, shared))
            _step("packages", lambda: _packages(inside, wheel))
            _step("edgevlm", lambda: _edgevlm(inside))
            _step("bundles", _bundles)
            _step("answers here", lambda: _here(BUILD / "here"))
            found = [_step(cpu, partial(_on, inside, cpu)) for cpu in cpus]
            passed = _step(f"tests on {cpus[-1]}", lambda: _tests(inside, cpus[-1]))
    minutes = (time.monotonic() - start) / _MINUTE
    text = _report(dict(zip(cpus, found, strict=True)), passed, space.version(qemu), minutes)
    print(text)
    if write:
        _write(text)


def _step(name: str, work: Callable[[], Made]) -> Made:
    start = time.monotonic()
    print(f"{name} ...", flush=True)
    result = work()
    print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return result


def _tracked(folders: Iterable[str]) -> list[Path]:
    """The tree's own files, new ones included, without what git ignores."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    done = subprocess.run(
        [*command, "--exclude-standard", *folders], cwd=ROOT, capture_output=True, check=True
    )
    names = filter(None, done.stdout.decode().split("\0"))
    return sorted(path for name in names if (path := ROOT / name).exists())


def _digest(*folders: str) -> str:
    digest = hashlib.sha256()
    for path in _tracked(folders):
        held = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + held)
    return digest.hexdigest()


def _unless_done(name: str, of: str, work: Callable[[], object]) -> None:
    """Does the work unless it was done for the same inputs, which `of` is a digest of."""
    stamp = BUILD / f"{name}.ready"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == of:
        return
    stamp.unlink(missing_ok=True)
    work()
    stamp.write_text(of, encoding="utf-8")


def _llama_wheel() -> Path:
    """The wheel of the version that this environment has, built the first time."""
    made = wheels.BUILD / "wheels"
    pattern = f"llama_cpp_python-{wheels.llama_version()}-*_aarch64.whl"
    if not any(made.glob(pattern)):
        made.mkdir(exist_ok=True)
        jobs = machine.usable_cpus()
        folder = wheels.BUILD / "llama" / "aarch64"
        shutil.copy2(wheels.build("aarch64", folder, jobs, mtmd=False), made)
    return next(made.glob(pattern))


def _copy(paths: Iterable[Path], target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in paths:
        there = target / path.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, there, follow_symlinks=False)


def _packages(inside: Space, llama: Path) -> None:
    """All that edgevlm and the tests need, as aarch64's wheels, in an environment in there.

    Wheels are only unpacked: this machine's pip does that, a hundred times faster.
    """
    # The same releases on both machines: what differs then is the processor.
    same = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime", "pillow")]
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = config["options"]["install_requires"].split("\n")
    needed = [line for line in needed if line and not line.startswith("#")]

    def work() -> None:
        environment = ["python3", "-m", "venv", "--clear", "--without-pip", _ENVIRONMENT]
        inside.run(environment, BUILD / "venv.log")
        install = [*_pip(inside), "--find-links", llama.parent, *needed, *same, *_TESTED_WITH]
        wheels.run(install, BUILD / "install.log")

    of = [*needed, *same, *_TESTED_WITH, hashlib.sha256(llama.read_bytes()).hexdigest()]
    _unless_done("packages", "\n".join(of), work)


def _edgevlm(inside: Space) -> None:
    """edgevlm from a wheel of this tree, in the same environment."""
    folders = ("edgevlm", "export", "runtimes", "benchmarks", "setup.cfg", "pyproject.toml")

    def work() -> None:
        source, found = BUILD / "source", BUILD / "wheel"
        _copy(_tracked(()), source)
        shutil.rmtree(found, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", found]
        wheels.run([*pip, source], BUILD / "wheel.log")
        (wheel,) = found.glob("edgevlm-*.whl")
        again = ["--no-deps", "--upgrade", wheel]
        wheels.run([*_pip(inside), *again], BUILD / "edgevlm.log")

    stamps = (BUILD / "packages.ready").stat().st_mtime_ns
    _unless_done("edgevlm", f"{_digest(*folders)} {stamps}", work)


def _pip(inside: Space) -> list[object]:
    """The command that unpacks aarch64's wheels into the environment."""
    (packages,) = (inside.root / _ENVIRONMENT.lstrip("/")).glob("lib/python3.*/site-packages")
    kinds = [f"manylinux_2_{minor}_aarch64" for minor in range(17, _GLIBC + 1)]
    options = [f"--platform={kind}" for kind in (*kinds, "manylinux2014_aarch64")]
    options += ["--only-binary=:all:", f"--python-version={packages.parent.name[6:]}"]
    return [sys.executable, "-m", "pip", "install", "--no-compile", "--target", packages, *options]


def _bundles() -> None:
    folder = BUILD / "shared" / "bundles"

    def work() -> None:
        for left in (folder, BUILD / "shared" / "checkpoints"):
            shutil.rmtree(left, ignore_errors=True)
        folder.mkdir()
        for _ in compare.write_bundles(folder):
            pass

    _unless_done("bundles", _digest("edgevlm", "export", "tests/checkpoints"), work)


def _here(out: Path) -> None:
    """This machine's answers, in a process of their own."""
    bundles = BUILD / "shared" / "bundles"
    command = [sys.executable, "-m", "workshop.arm64.answers", bundles, out]
    wheels.run(command, BUILD / "here.log", cwd=ROOT)


def _on(inside: Space, cpu: str) -> Compared:
    """One processor's answers beside this machine's; raises EdgeVLMError where they differ."""
    _copy(_tracked(_CHECKOUT), inside.shared / "checkout")
    shutil.copytree(BUILD / "here", inside.shared / "here", dirs_exist_ok=True)
    folders = ["/work/bundles", f"/work/{cpu}", "/work/here"]
    command = [_PYTHON, "-m", "workshop.arm64.answers", *folders]
    inside.run(command, BUILD / f"{cpu}.log", cpu=cpu, env={"PYTHONPATH": "/work/checkout"})
    found = compare.beside(inside.shared / "bundles", BUILD / "here", inside.shared / cpu)
    try:
        found.check()
    except EdgeVLMError as e:
        raise EdgeVLMError(f"{cpu}: {e}") from None
    return found


def _tests(inside: Space, cpu: str) -> str:
    """The core of the suite; the line that pytest ends with."""
    files = [f"/work/checkout/tests/test_{name}.py" for name in TESTS]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "timeout=3600",
        "-c",
        "/work/checkout/setup.cfg",
    ]
    log = BUILD / "tests.log"
    inside.run(
        [
            "taskset",
            "-c",
            str(min(os.sched_getaffinity(0))),
            _PYTHON,
            "-m",
            "pytest",
            *options,
            *files,
        ],
        log,
        cpu=cpu,
        env={"PYTHONPATH": "/work/checkout"},
    )
    return log.read_text(encoding="utf-8").strip().splitlines()[-1].strip("= ")


def _report(found: Mapping[str, Compared], passed: str, qemu: int, minutes: float) -> str:
    """The results as Markdown."""
    said = next(iter(found.values())).machine
    versions = ", ".join(f"{name} {v}" for name, v in said["versions"].items())
    lines = [
        f"{time.strftime('%Y-%m-%d')}: {machine.processor_name()}, {machine.usable_cpus()} cores, "
        f"{platform.system()}; qemu-user {qemu}, Python {said['python']}, {versions}. "
        f"{minutes:.0f} minutes.",
        "",
        "| processor | ggml's back end | same tokens in f32 | "
        + "".join(f"worst {quant} | " for quant in compare.PRECISIONS)
        + "pico, right answers (x86-64) |",
        "|---" * (4 + len(compare.PRECISIONS)) + "|",
    ]
    for cpu, it in found.items():
        n = sum(d.bundle.endswith("-f32") for d in it.differences)
        worst = [
            f"{d.share:.2f} ({d.here:.2f}; {d.stage})" for d in map(it.worst, compare.PRECISIONS)
        ]
        there, here, of = it.pico
        cells = [cpu, f"`{it.machine['back_end']}`", f"{it.same} of {n}", *worst]
        lines.append(f"| {' | '.join(cells)} | {there} ({here}) of {of} |")
    *_, last = found
    return "\n".join([*lines, "", f"The core of the suite, on {last}: {passed}.", ""])


def _write(text: str) -> None:
    path = ROOT / "docs" / "arm64.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    path.write_text(f"{before}{_BEGIN}{text}{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

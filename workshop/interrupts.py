"""Interrupts at random moments: does `edgevlm export` leave anything behind, does `requantize`?

    python -m workshop.interrupts [--times 100] [--seed 0]

A tiny checkpoint is exported, and its bundle requantized, again and again; each run gets a signal
at a random moment after the program has begun (before that it is Python's own start, which no
program can answer for), every second one another shortly after the first. What must hold: the exit
code is 128 plus the signal's number, or 0 where the bundle stood already; nothing else lies beside
OUT or in the folder for temporary files; no process is left; no traceback was printed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

from edgevlm.bundle import open_bundle
from edgevlm.errors import BundleError
from edgevlm.export import export_bundle
from tests.checkpoints.paligemma import write_paligemma

# Ctrl-C above all.
_SIGNALS = (signal.SIGINT,) * 7 + (signal.SIGTERM,) * 2 + (signal.SIGHUP,)
# What onnxruntime and torch make for themselves when they are imported.
_CACHES = (".ses", "torchinductor_")
_POLL_S = 0.002
_LONGEST_S = 120.0
_AGAIN_S = 0.05


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run; `faults` are what must not be."""

    code: int
    seconds: float
    faults: tuple[str, ...]


def interrupted(
    arguments: list[str], scratch: Path, after_s: float, number: int, again_s: float | None = None
) -> Outcome:
    """Runs `edgevlm ARGUMENTS` with a new OUT in `scratch`, and interrupts it `after_s` seconds
    after it has begun, a second time `again_s` later.
    """
    place, temporary = scratch / "place", scratch / "temporary"
    place.mkdir()
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "edgevlm", *arguments, str(place / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)},
        start_new_session=True,
    ) as process:
        assert process.stderr
        _wait_for_handlers(process)
        start = time.perf_counter()
        _signal_after(process, after_s, number)
        if again_s is not None:
            _signal_after(process, again_s, number)
        try:
            errors = process.communicate(timeout=_LONGEST_S)[1].decode(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            return Outcome(-1, _LONGEST_S, ("did not end",))
        seconds = time.perf_counter() - start
    faults = tuple(_faults(process.returncode, number, place, temporary, errors))
    return Outcome(process.returncode, seconds, faults)


def _wait_for_handlers(process: subprocess.Popen[bytes]) -> None:
    """Waits until the program handles SIGTERM itself, where Linux tells; a second elsewhere."""
    status, bit = Path(f"/proc/{process.pid}/status"), 1 << (signal.SIGTERM - 1)
    if not status.exists():
        time.sleep(1)
        return
    while process.poll() is None:
        caught = next(
            line for line in status.read_text(encoding="ascii").splitlines() if "SigCgt" in line
        )
        if int(caught.split()[1], 16) & bit:
            return
        time.sleep(_POLL_S)


def _signal_after(process: subprocess.Popen[bytes], seconds: float, number: int) -> None:
    """Sends it to the whole group, as a terminal does."""
    end = time.perf_counter() + seconds
    while process.poll() is None and time.perf_counter() < end:
        time.sleep(_POLL_S)
    if process.poll() is None:
        os.killpg(process.pid, number)


def _faults(code: int, number: int, place: Path, temporary: Path, errors: str) -> list[str]:
    left = sorted(path.name for path in place.iterdir())
    faults = [f"left beside OUT: {name}" for name in left if name != "out"]
    rest = [path.name for path in temporary.iterdir() if not path.name.startswith(_CACHES)]
    faults += [f"left in TMPDIR: {name}" for name in rest]
    faults += [f"left running: {' '.join(command)}" for command in _running(place)]
    if code not in (0, 128 + number):
        faults.append(f"exit code {code}")
    if code == 0 and not left:
        faults.append("exit code 0 without a bundle")
    if left == ["out"]:
        try:
            open_bundle(place / "out", "full")
        except BundleError as error:
            faults.append(str(error))
    if "Traceback" in errors or "Error" in errors or "ignored" in errors:
        faults.append(f"said: {errors.strip()[-500:]}")
    return faults


def _running(place: Path) -> list[list[str]]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if any(str(place) in word for word in command):
            found.append(command)
    return found


def _try(name: str, arguments: list[str], scratch: Path, times: int, rng: random.Random) -> int:
    """Interrupts a command that often; returns the number of runs with a fault."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        whole = interrupted(arguments, Path(folder), _LONGEST_S, signal.SIGINT)
    if whole.code or whole.faults:
        raise click.ClickException(f"{name} fails without an interrupt: {whole}")
    codes, bad = Counter[int](), 0
    for i in range(times):
        number, after_s = rng.choice(_SIGNALS), rng.uniform(0, whole.seconds)
        again_s = rng.uniform(0, _AGAIN_S) if i % 2 else None
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            outcome = interrupted(arguments, Path(folder), after_s, number, again_s)
        codes[outcome.code] += 1
        click.echo(f"\r{name}: {i + 1} of {times}", nl=False, err=True)
        if outcome.faults:
            bad += 1
            signalled = signal.Signals(number).name
            click.echo(f"{name}, {signalled} after {after_s:.3f} s: {'; '.join(outcome.faults)}")
    click.echo(err=True)
    ended = ", ".join(f"{n} with {code}" for code, n in sorted(codes.items()))
    click.echo(f"{name}: {times} interrupts over {whole.seconds:.1f} s, {bad} with faults; {ended}")
    return bad


@click.command()
@click.option("--times", default=100, show_default=True, help="Runs of each command.")
@click.option("--seed", default=0, show_default=True, help="Random seed.")
def main(times: int, seed: int) -> None:
    """Interrupts an export and a requantize at random moments; the exit code is 1 after a fault."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoint = write_paligemma(scratch / "checkpoint")
        whole = scratch / "whole"
        export_bundle(checkpoint, whole, quant="f32", vision_precision="fp32", verify=False)
        export = ["export", str(checkpoint)]
        requantize = ["requantize", str(whole), "--quant", "q4_k_m", "--vision-precision", "int8"]
        requantize += ["--imatrix"]
        bad = _try("export", export, scratch, times, rng)
        bad += _try("requantize", requantize, scratch, times, rng)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()

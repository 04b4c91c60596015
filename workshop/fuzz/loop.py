"""The parent of a target's child process: feeds its tally, sees it die or hang, starts another."""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from workshop.fuzz.outcomes import Outcome, Tally

# Of processor time, since a loaded machine may let a process wait for long.
_CPU_SECONDS = 30.0
_WALL_SECONDS = 300.0
_LOOK_SECONDS = 2.0
ROOM_BYTES = 3 << 30
# Lines by which native code and Python's faulthandler say where a process ended.
_SAID = re.compile(r"GGML_ASSERT|fatal error|what\(\)|ABORT|out of bounds|  File ")


class Loop:
    """Tries inputs of a target for some minutes; `findings` is the folder where inputs are kept."""

    def __init__(self, name: str, seed: int, findings: Path) -> None:
        self.tally = Tally(name, seed)
        self._findings = findings
        self._first = 0
        # When the first input began; to make a target may take a while.
        self._start = math.inf

    def run(self, minutes: float) -> Tally:
        """All outcomes of so many minutes, from the first input on."""
        with tempfile.TemporaryDirectory() as folder:
            while time.monotonic() < self._start + 60 * minutes:
                with _worker(
                    self.tally.target, Path(folder), self.tally.seed, self._first
                ) as child:
                    self._follow(child, minutes)
        self.tally.minutes = round((time.monotonic() - self._start) / 60, 2)
        return self.tally

    def _follow(self, child: _Child, minutes: float) -> None:
        """Reads what a child says until it dies, hangs or the time is over."""
        begun = False
        while time.monotonic() < self._start + 60 * minutes:
            said = child.next()
            if isinstance(said, dict):
                self._start = min(self._start, time.monotonic())
                begun, self._first = True, said["begins"] + 1
                continue
            if not begun:
                raise RuntimeError(f"the worker cannot start: {child.log()}")
            found = child.folder / f"found-{self._first - 1}"
            tried = found if found.exists() else child.folder / "input"
            self.tally.add(said, tried.read_bytes(), self._findings)
            if said.kind in ("abort", "hang"):
                return


def replay(name: str, data: bytes) -> Outcome:
    """The outcome of one input."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "input").write_bytes(data)
        with _worker(name, Path(folder), 0, -1) as child:
            while isinstance(said := child.next(), dict):
                pass
            return said


@dataclass
class _Child:
    """A worker process, its folder, and what was read of its pipe and is not a line yet."""

    process: subprocess.Popen[bytes]
    folder: Path
    rest: bytes = b""

    def next(self) -> dict[str, Any] | Outcome:
        """The beginning of an input, or an outcome, also of a process that died or hangs."""
        begun, cpu = time.monotonic(), self._cpu()
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                if selector.select(_LOOK_SECONDS):
                    block = os.read(self.process.stdout.fileno(), 1 << 16)
                    if not block:
                        return self._dead()
                    self.rest += block
                waited, worked = time.monotonic() - begun, self._cpu() - cpu
                if worked > _CPU_SECONDS or waited > _WALL_SECONDS:
                    return Outcome("hang", f"after {worked:.0f} s of processor time", "hang")
        line, _, self.rest = self.rest.partition(b"\n")
        said: dict[str, Any] = json.loads(line)
        return said if "begins" in said else Outcome(**said)

    def _dead(self) -> Outcome:
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = next((line for line in self.log().splitlines() if _SAID.search(line)), "").strip()
        return Outcome("abort", f"{name} {said}", f"{name} {said[-120:]}")

    def _cpu(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return float(times.user + times.system)

    def log(self) -> str:
        """The end of what it wrote to stdout and stderr since its last input began."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-5000:]


@contextmanager
def _worker(name: str, folder: Path, seed: int, first: int) -> Iterator[_Child]:
    arguments = [name, str(folder), str(seed), str(first), str(ROOM_BYTES)]
    process = subprocess.Popen(
        [sys.executable, "-m", "workshop.fuzz.worker", *arguments], stdout=subprocess.PIPE
    )
    try:
        yield _Child(process, folder)
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()

"""Peers in turns, each turn a process of its own, on what one bundle and maybe its checkpoint give.

A round asks edgevlm and then every peer; one that fails is not asked again.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgevlm.benchmarks import peers
from edgevlm.benchmarks.latency.report import Beside, PeerResult
from edgevlm.benchmarks.latency.stats import metric
from edgevlm.benchmarks.peers.material import NO_CHECKPOINT, material
from edgevlm.bundle import Bundle
from edgevlm.errors import BenchError
from edgevlm.export import child
from edgevlm.machine import physical_cores

OURS = "ours"
_UNITS = dict.fromkeys(peers.METRICS, "ms") | {"peak_rss_bytes": "B"}
# A turn of the slowest peer takes minutes; beyond this nobody waits for it.
_LONGEST_S = 900.0
_ASSERTION = "GGML_ASSERT("
# The folders of a path in a message.
_FOLDERS = re.compile(r"(?<![\w/:.])/(?:[^\s/'\"()]+/)+")


@dataclass(frozen=True)
class Peer:
    """A module of this package that answers; see the package's docstring."""

    name: str
    title: str
    install: str
    needs: tuple[str, ...]
    file: str


@dataclass(frozen=True)
class Comparison:
    """A comparison to make: a bundle, the checkpoint that it came from (None: what can be done
    without), the vision tower that this one leaves out, a picture, the user's words; over `rounds`
    turns, `tokens` after the first. `pythons` names the Python of a peer that has one of its own;
    `only` names the peers to ask, () for all.
    """

    bundle: Bundle
    image: Path
    words: str
    checkpoint: Path | None = None
    tower: Path | None = None
    rounds: int = 3
    tokens: int = 32
    threads: int | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()


def known() -> dict[str, Peer]:
    """All peers by module name, edgevlm first."""
    found = {}
    for module in pkgutil.iter_modules(peers.__path__):
        if module.name.startswith("_"):
            continue
        peer = importlib.import_module(f"{peers.__name__}.{module.name}")
        if hasattr(peer, "TITLE"):
            file, needs = Path(str(peer.__file__)).absolute(), getattr(peer, "NEEDS", ())
            found[module.name] = Peer(module.name, peer.TITLE, peer.INSTALL, needs, str(file))
    return dict(sorted(found.items(), key=lambda item: (item[0] != OURS, item[0])))


def own_pythons(given: Sequence[str]) -> dict[str, str]:
    """PEER=PYTHON, parsed: the Python that a peer has to itself. Raises BenchError."""
    pairs = dict(text.partition("=")[::2] for text in given)
    for name, python in pairs.items():
        if name not in known():
            raise BenchError(f"unknown peer {name!r}; there are {', '.join(known())}")
        if not shutil.which(python):
            raise BenchError(f"{python or name!r} cannot be run as a Python; write PEER=PYTHON")
    return pairs


def beside(
    comparison: Comparison, name: str, progress: Callable[[str], None] = lambda _: None
) -> Beside:
    """Asks all peers; `name` is the configuration's. Raises BenchError if edgevlm itself fails.

    Ctrl-C ends it with what there is, and the result says so; it goes on if there is nothing.
    """
    asked, complete = [_Asked(peer) for peer in _chosen(comparison)], True
    threads = comparison.threads or physical_cores()
    with tempfile.TemporaryDirectory() as scratch:
        progress(f"peers: weights of {name} in their formats")
        task, missing = material(
            comparison.bundle, comparison.checkpoint, comparison.tower, Path(scratch)
        )
        for one in asked:
            one.error = next((missing[key] for key in one.peer.needs if not task[key]), "")
            if one.error:
                one.state = "not asked" if one.error == NO_CHECKPOINT else "not supported"
        task |= {
            "image": str(comparison.image.absolute()),
            "words": comparison.words,
            "prompt": _whole_prompt(comparison),
            "threads": threads,
            "n_tokens": comparison.tokens,
        }
        try:
            for one in _turns(asked, comparison, progress):
                found = _turn(one.peer, task, comparison.pythons.get(one.peer.name))
                one.add(found)
                if one.peer.name == OURS:
                    if one.error:
                        raise BenchError(f"edgevlm itself cannot be compared: {one.error}")
                    task |= {k: found[k] for k in ("before", "after", "image_tokens")}
        except KeyboardInterrupt:
            if not asked[0].samples:
                raise
            complete = False
    results = tuple(one.result() for one in asked if one.samples or one.error)
    return Beside(name, threads, comparison.tokens + 1, complete, results)


def _chosen(comparison: Comparison) -> Iterator[Peer]:
    found = known()
    for name in comparison.only:
        if name not in found:
            raise BenchError(f"unknown peer {name!r}; there are {', '.join(found)}")
    for name, peer in found.items():
        if name == OURS or not comparison.only or name in comparison.only:
            yield peer


def _turns(
    asked: Sequence[_Asked], comparison: Comparison, progress: Callable[[str], None]
) -> Iterator[_Asked]:
    for i in range(comparison.rounds):
        for one in asked:
            if not one.error:
                progress(f"peers: {one.peer.title}, round {i + 1} of {comparison.rounds}")
                yield one


@dataclass
class _Asked:
    """A peer and what its turns have brought."""

    peer: Peer
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    last: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    state: str = ""

    def add(self, found: dict[str, Any]) -> None:
        """Takes in the answer of one turn; folders of this machine are nobody's business."""
        self.error = _FOLDERS.sub("", found.get("error", ""))
        if self.error:
            self.state = found.get("state", "failed")
        if self.state == "not installed":
            self.error += f"; {self.peer.install}"
        if not self.error:
            self.last = found
            for name in _UNITS:
                if found.get(name) is not None:
                    self.samples[name].append(float(found[name]))

    def result(self) -> PeerResult:
        return PeerResult(
            title=self.peer.title,
            version=self.last.get("version", ""),
            how=self.last.get("how", ""),
            error=self.error,
            installed=self.state != "not installed",
            positions=self.last.get("positions", 0),
            metrics={name: metric(_UNITS[name], "lower", v) for name, v in self.samples.items()},
            state=self.state,
        )


def _whole_prompt(comparison: Comparison) -> str:
    """The words in the model's template, with markers for its picture and its begin token."""
    markers = {"{image}": peers.PICTURE, "{bos}": peers.BEGIN}
    parts = (markers.get(part, part) for part in comparison.bundle.manifest.prompt.template)
    return "".join(parts).replace("{prompt}", comparison.words)


def _turn(peer: Peer, task: dict[str, Any], python: str | None) -> dict[str, Any]:
    """One answer, or {"error": why there is none}."""
    program, env = child.command(f"{peers.__name__}.child"), None
    if python:
        # It has packages of its own: nothing of this one's may come before them.
        program = [python, "-I", str(Path(peers.__path__[0]) / "child.py")]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # Unbuffered, or what a peer writes right before its process ends at once is lost.
    program.insert(1, "-u")
    try:
        command = [*program, peer.file]
        done = child.run(command, input=json.dumps(task), timeout=_LONGEST_S, env=env)
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {_LONGEST_S:.0f} s"}
    except OSError as e:
        return {"error": f"{python} cannot be started ({e.strerror or e})"}
    with suppress(ValueError, IndexError):
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    return {"error": _end(done.returncode, done.stderr.strip().splitlines() or ["no message"])}


def _end(status: int, said: list[str]) -> str:
    """The end of a process that did not answer; ggml prints a backtrace behind its reason."""
    for line in said:
        if _ASSERTION in line:
            return f"aborts: {line[-300:]}"
    return f"its process ended with status {status} ({said[-1][:300]})"

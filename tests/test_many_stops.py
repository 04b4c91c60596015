"""Many pictures whose run is stopped, killed or out of room."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgevlm
from edgevlm.cli import many
from edgevlm.cli.jsonl import AnswerFile
from edgevlm.runtimes import fakes
from edgevlm.runtimes.session import VLM
from tests.test_cli import Terminal
from tests.test_many import ABC, edge, files, photos

__all__ = ["edge", "photos"]


@pytest.mark.fault(
    "Command line",
    "the disk fills up during `ask --jsonl`",
    "one line, no half record",
)
def test_a_full_disk_leaves_no_half_line(
    edge: Terminal, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = AnswerFile._locked

    class Full:
        """A file that takes one line and ten bytes."""

        def __init__(self, file: Any) -> None:
            self._file, self._calls = file, 0

        def write(self, data: memoryview) -> int:
            self._calls += 1
            if self._calls > 2:
                raise OSError(28, "No space left on device")
            return int(self._file.write(data if self._calls == 1 else data[:10]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(AnswerFile, "_locked", lambda file: Full(written(file)))
    code, _, err = edge("ask", "x", "-i", photos, "--jsonl", "out.jsonl")
    assert (code, err) == (1, "edgevlm: out.jsonl: No space left on device\n")
    assert files() == ABC[:1]


def test_few_pictures_are_read_ahead_in_another_thread(
    monkeypatch: pytest.MonkeyPatch, photos: Path
) -> None:
    vlm, seen = fakes.vlm(), list[tuple[str, str]]()
    chat = VLM.chat

    def counted(self: VLM, image: Any, *, system: str | None) -> Any:
        seen.append((str(image), threading.current_thread().name))
        return chat(self, image, system=system)

    monkeypatch.setattr(VLM, "chat", counted)
    sources = [many.NamedPicture(name, Path(name)) for name in ABC * 3]
    for i, (source, reading) in enumerate(many._read_ahead(vlm, sources, None)):
        assert reading.result()[0].image == Path(source.file)
        assert len(seen) <= i + 1 + many._AHEAD
    assert len(seen) == 9 and not any(name == "MainThread" for _, name in seen)


# A model whose third answer ends the process, by the signal that is named, or never comes.
STOPPED = """
import os, signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
import edgevlm
from edgevlm import cli
from edgevlm.runtimes import fakes

class Stopped(fakes.FakeDecoder):
    def prefill(self, blocks, **options):
        if len(self.prefills) == 2:
            os.kill(os.getpid(), signal.{name})
            threading.Event().wait()
        return super().prefill(blocks, **options)

fakes.FakeDecoder = Stopped
edgevlm.load = lambda *_, **__: fakes.vlm("an answer")
cli.main()
"""


@pytest.fixture
def stopped(photos: Path) -> Iterator[Any]:
    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-c", STOPPED.format(name=name), "ask", "x", "-i", "photos"]
        environment = os.environ | {"EDGEVLM_MODEL": str(edgevlm.models.built_in())}
        ended = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=environment, timeout=120
        )
        return ended.returncode, ended.stdout, ended.stderr

    yield run


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_keeps_what_was_done_and_says_how_to_go_on(edge: Terminal, stopped: Any) -> None:
    code, _, err = stopped("SIGINT", "--jsonl", "out.jsonl")
    assert code == 130 and files() == ABC[:2]
    assert err == (
        "edgevlm: 2 of 3 pictures are answered; the same command goes on from there (out.jsonl)\n"
    )
    _, _, err = edge("ask", "x", "-i", "photos", "--jsonl", "out.jsonl")
    assert err.startswith("1 answered, 2 were before") and files() == ABC
    code, out, err = stopped("SIGINT", "--each")
    assert code == 130 and out.count("an answer\n") == 2
    assert re.search("2 of 3 .*--jsonl OUT keeps answers", err)


@pytest.mark.fault(
    "Command line",
    "kill -9 during `ask --jsonl`",
    "the same command goes on from there",
)
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_run_goes_on(edge: Terminal, stopped: Any) -> None:
    assert stopped("SIGKILL", "--jsonl", "out.jsonl")[0] == -9
    assert files() == ABC[:2]
    assert edge("ask", "x", "-i", "photos", "--jsonl", "out.jsonl")[0] == 0 and files() == ABC

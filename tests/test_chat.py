"""A chat ends when it is told to: not by a picture, a question, a home, or a defect."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

import edgevlm
from edgevlm import cli
from edgevlm.cli.chat.history import history
from edgevlm.cli.chat.talk import Talk
from edgevlm.cli.common import Run
from edgevlm.image import read
from edgevlm.runtimes import fakes
from edgevlm.runtimes.engines import Block
from edgevlm.sampling import SamplingOptions

Ran = tuple[str | int | None, str, str]
Typed = Callable[..., Ran]


class Tty(io.TextIOWrapper):
    """A standard input that says that a person types into it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Typed:
    """Runs `edgevlm chat` on lines of bytes, or on typed text; its exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGEVLM_MODEL", raising=False)

    def run(
        lines: bytes = b"", *, typed: str = "", answers: Sequence[str] = ("one", "two", "three")
    ) -> Ran:
        monkeypatch.setattr(edgevlm, "load", lambda *_, **__: fakes.vlm(answers))
        stdin = Tty if typed else io.TextIOWrapper
        monkeypatch.setattr(sys, "stdin", stdin(io.BytesIO(lines), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["edgevlm", "chat", "-m", "mine"])
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(typed)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return ended.value.code, *capsys.readouterr()

    return run


def picture(path: Path, size: tuple[int, int] = (80, 60)) -> None:
    Image.fromarray(np.full((*size[::-1], 3), 200, np.uint8)).save(path)


@pytest.mark.skipif(os.name == "nt", reason="backslashes are part of names on Windows")
def test_dropped_files_are_looked_at(chat: Typed, tmp_path: Path) -> None:
    for name in ("my photo.png", "~photo.png", "b.png"):
        picture(tmp_path / name)
    code, out, err = chat(
        b"/image my\\ photo.png \n/image ~photo.png\n/image 'my photo.png'\n"
        b"/image file://" + str(tmp_path).encode() + b"/my%20photo.png\n"
        b"/image my\\ photo.png b.png\nwhat?\n"
    )
    assert (code, out) == (0, "one\n")
    one = "Looking at my photo.png (80 x 60)."
    assert err.splitlines()[1:] == [
        one,
        "Looking at ~photo.png (80 x 60).",
        one,
        f"Looking at {tmp_path}/my photo.png (80 x 60).",
        "Looking at my photo.png (80 x 60), b.png (80 x 60).",
    ]


def test_pictures_that_cannot_be_had_are_one_line_each(
    chat: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.png").write_bytes(b"<html>")
    lines = [
        b"/image http://127.0.0.1:9/a b.png",
        b"/image http://me:secret@[::1/a.png",
        b"/image caf\xe9.png",
        b"/image \x00",
        b"/image " + b"x" * 100_000,
        b"/image data:image/png;base64,####",
        b"/image page.png",
        b"/image ~",
        b"/image",
        b"caf\xe9?",
        b"nul \x00?",
        b"still there?",
    ]
    code, out, err = chat(b"\n".join(lines))
    assert (code, out) == (0, "one\n")
    said = err.splitlines()[1:]
    assert len(said) == len(lines) - 1 and "Traceback" not in err and "secret" not in err
    assert "Looking at no picture." in said


@pytest.mark.fault("Pictures", "a picture larger than the memory", "one line, the chat goes on")
def test_a_picture_that_memory_does_not_hold_is_one_line(
    chat: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise MemoryError("Unable to allocate 716. MiB")

    picture(tmp_path / "a.png")
    monkeypatch.setattr(read, "eight_bit", full)
    code, out, err = chat(b"/image a.png\nstill there?\n")
    assert (code, out) == (0, "one\n")
    assert "a.png: does not fit into memory; scale it down" in err


def test_a_defect_is_shown_whole_and_the_chat_goes_on(
    chat: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Defective(fakes.FakeDecoder):
        def prefill(self, blocks: Sequence[Block], **options: Any) -> int:
            if not self.prefills:
                self.prefills.append(np.empty((0, 4), np.float32))
                raise RuntimeError("a defect")
            return super().prefill(blocks, **options)

    monkeypatch.setattr(fakes, "FakeDecoder", Defective)
    code, out, err = chat(b"first?\nsecond?\n")
    assert code == 0 and out.endswith("\n") and len(out) > 1
    assert "Traceback" in err and "RuntimeError: a defect" in err and "the chat goes on" in err


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_an_output_that_is_gone_is_no_defect(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = fakes.vlm()
    chat = vlm.chat()

    def gone(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(chat, "stream", gone)
    with pytest.raises(type(error)):
        run = Run(None, False, SamplingOptions(), {})
        Talk(vlm, run, chat, plain=True, previews=False).turn("first?")


def test_a_chat_keeps_its_history_without_passwords(chat: Typed, tmp_path: Path) -> None:
    code, out, err = chat(typed="hello\r/image http://me:secret@127.0.0.1:9/a.png\r/exit\r")
    assert (code, out) == (0, "one\n") and "secret" not in err
    kept = (tmp_path / "home" / "chat-history").read_text(encoding="utf-8")
    assert "+hello\n" in kept and "+/image http://127.0.0.1:9/a.png\n" in kept


def homes(folder: Path) -> dict[str, str | Path]:
    (folder / "file").write_text("not a folder", encoding="utf-8")
    (folder / "taken" / "chat-history").mkdir(parents=True)
    return {"file": folder / "file", "taken": folder / "taken", "none": "/proc/none"}


@pytest.mark.fault("Home", "a home that cannot be written", "a chat works, without history")
@pytest.mark.parametrize("home", ["file", "taken", "none"])
def test_a_home_that_keeps_nothing_costs_the_history_alone(
    chat: Typed, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = homes(tmp_path)[home]
    if home == "none" and not os.path.isdir("/proc"):
        pytest.skip("no /proc here")
    monkeypatch.setenv("EDGEVLM_HOME", str(place))
    code, out, err = chat(typed="hello\r/exit\r")
    assert (code, out) == (0, "one\n")
    assert [line for line in err.splitlines() if "history" in line] == [
        line for line in err.splitlines()[1:]
    ]
    assert err.count("this chat's history is not kept") == 1


@pytest.mark.parametrize("expanded", [lambda path: path, None])
def test_a_user_without_a_home(
    chat: Typed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expanded: Callable[[str], str] | None,
) -> None:
    """As a system's user: no HOME, and no entry that says where one is."""
    monkeypatch.delenv("EDGEVLM_HOME")
    for name in ("HOME", "USERPROFILE", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if expanded:
        monkeypatch.setattr(os.path, "expanduser", expanded)
    else:  # As older releases of platformdirs answer.
        monkeypatch.setattr(
            platformdirs, "user_data_dir", lambda *_, **__: "~/.local/share/edgevlm"
        )
    code, out, err = chat(typed="hello\r/exit\r")
    assert (code, out) == (0, "one\n") and "history is not kept" in err
    assert list(tmp_path.iterdir()) == []


def test_a_history_that_fills_up_or_goes_away_is_let_go(tmp_path: Path) -> None:
    path = tmp_path / "home" / "chat-history"
    kept = history(path)
    assert isinstance(kept, FileHistory)
    kept.store_string("one\udce9")
    kept.store_string("two")
    assert [*kept.load_history_strings()][0] == "two"
    path.unlink()
    path.mkdir()
    kept.store_string("three")
    assert [*kept.load_history_strings()] == []


def test_a_history_that_is_no_text_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "chat-history"
    path.write_bytes(b"\n# 1\n+caf\xe9\n\n# 2\n+tea\n\xff\xfe")
    assert [*history(path).load_history_strings()] == ["tea", "caf\ufffd"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_history_that_may_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat-history"
    path.write_text("", encoding="utf-8")
    path.chmod(stat.S_IRUSR)
    assert isinstance(history(path), InMemoryHistory)
    assert capsys.readouterr().err == (
        f"{path}: this chat's history is not kept (Permission denied)\n"
    )

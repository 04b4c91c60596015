"""Ctrl-C, SIGTERM and a closed terminal: the exit code, and nothing left whichever moment it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from edgevlm.bundle import Bundle, open_bundle
from edgevlm.cli import signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

ROOT = Path(__file__).parent.parent
# The command line, which says on stdout what it is about to do.
ANNOUNCED = """
import hashlib, signal, sys, threading
# The suite may have been started where they are ignored: by nohup, or behind a shell's &.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from edgevlm import cli
from edgevlm import progress
from edgevlm.export import components

reach = progress.Stage.reach
def announced(stage, done):
    print(stage._name, flush=True)
    reach(stage, done)
progress.Stage.reach = announced
{more}
cli.main()
"""
# A native call of minutes, and code that drops every exception; it says so when the call runs.
DEAF = """
def deaf(*_):
    while True:
        try:
            threading.Timer(0.2, print, ["deaf"], {"flush": True}).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
        except BaseException:
            pass
components._write_vision = deaf
"""

# What onnxruntime and torch make for themselves when they are imported.
CACHES = (".ses", "torchinductor_")

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the command line in a group of its own, with its own folder for temporary files."""
    (tmp_path / "place").mkdir()
    (tmp_path / "temporary").mkdir()
    processes: list[subprocess.Popen[str]] = []

    def started(*arguments: object, more: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", ANNOUNCED.format(more=more), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(tmp_path / "temporary")},
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield started
    for process in processes:
        process.kill()


def end(process: subprocess.Popen[str], moment: str, number: int, tmp_path: Path) -> int:
    """Signals the process when it has said `moment`; checks what is left, returns its code."""
    assert process.stdout
    for line in process.stdout:
        if line.strip() == moment:
            break
    else:
        pytest.fail(f"never came to {moment}: {process.communicate()[1]}")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    errors = process.communicate(timeout=60)[1]
    assert psutil.wait_procs(children, timeout=10)[1] == []
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert [name for name in left if not name.startswith(CACHES)] == []
    assert list((tmp_path / "place").iterdir()) == []
    assert "Traceback" not in errors and "Error" not in errors
    return process.returncode


@pytest.mark.fault(
    "Export",
    "SIGINT, SIGTERM or SIGHUP at any moment",
    "the signal's exit code, nothing is left, temporary files included",
)
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("decoder", signal.SIGINT),
        ("quantize", signal.SIGTERM),
        ("hash source", signal.SIGINT),
        ("verify", signal.SIGHUP),
    ],
)
def test_an_export_leaves_nothing(
    paligemma_checkpoint: Path, start: Start, tmp_path: Path, moment: str, number: int
) -> None:
    process = start("export", paligemma_checkpoint, tmp_path / "place" / "new" / "out")
    assert end(process, moment, number, tmp_path) == 128 + number


@pytest.mark.fault(
    "Export",
    "a signal during `requantize`",
    "the signal's exit code, nothing is left",
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_requantize_leaves_nothing(
    paligemma_bundle: Bundle, start: Start, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "place" / "out"
    process = start("requantize", paligemma_bundle.folder, out, "--quant", "q4_k_m", "--imatrix")
    assert end(process, "importance", number, tmp_path) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_code_that_hears_nothing_does_not_hold_it_up(
    paligemma_checkpoint: Path, start: Start, tmp_path: Path, number: int
) -> None:
    process = start("export", paligemma_checkpoint, tmp_path / "place" / "out", more=DEAF)
    assert end(process, "deaf", number, tmp_path) == 128 + number


@pytest.mark.fault(
    "Export",
    "a second Ctrl-C while the first one's files are removed",
    "they are removed",
)
def test_a_second_ctrl_c_does_not_stop_the_cleaning(
    paligemma_checkpoint: Path, start: Start, tmp_path: Path
) -> None:
    twice = (
        "import os, signal\n"
        "from edgevlm import cleanup\n"
        "everything = cleanup.everything\n"
        "def interrupted():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    everything()\n"
        "cleanup.everything = interrupted\n"
    )
    process = start("export", paligemma_checkpoint, tmp_path / "place" / "out", more=DEAF + twice)
    assert end(process, "deaf", signal.SIGINT, tmp_path) == 130


@pytest.mark.fault("Export", "a signal while a bundle is replaced", "the old bundle stands, whole")
def test_the_old_bundle_stays_when_a_new_one_is_interrupted(
    paligemma_checkpoint: Path, paligemma_bundle: Bundle, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "old"
    out.mkdir()
    for file in paligemma_bundle.folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    process = start("export", paligemma_checkpoint, out, more=DEAF)
    assert end(process, "deaf", signal.SIGTERM, tmp_path) == 143
    assert open_bundle(out, "full").manifest == paligemma_bundle.manifest
    assert {file.name for file in out.iterdir()} == {
        file.name for file in paligemma_bundle.folder.iterdir()
    }


@pytest.mark.fault("Command line", "a signal that `nohup` ignores", "stays ignored")
def test_what_is_ignored_stays_ignored(
    paligemma_checkpoint: Path, start: Start, tmp_path: Path
) -> None:
    """By nohup, for one."""
    nohup = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = start("export", paligemma_checkpoint, tmp_path / "out", "--no-verify", more=nohup)
    assert process.stdout and process.stdout.readline() == "decoder\n"
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=120)
    assert process.returncode == 0 and open_bundle(tmp_path / "out")


@pytest.mark.fault(
    "Command line",
    "SIGTERM or SIGHUP during a chat",
    "it ends with the signal's exit code, without a traceback",
)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_chat_ends_without_a_word(start: Start, number: int, code: int) -> None:
    process = start("chat", "-m", "pico")
    assert process.stderr
    while "ask away" not in process.stderr.readline():
        pass
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (code, "", "")


@pytest.mark.fault("Command line", "a signal during `bench`", "its worker ends with it")
def test_a_measurement_ends_with_its_worker(start: Start, tmp_path: Path) -> None:
    started = (
        "from edgevlm.benchmarks.latency import gather\n"
        "add = gather.Gathered.add\n"
        "def heard(gathered, event): print('event', flush=True); add(gathered, event)\n"
        "gather.Gathered.add = heard\n"
    )
    process = start("bench", "pico", "--quick", more=started)
    assert end(process, "event", signal.SIGTERM, tmp_path) == 143


def test_ctrl_c_is_an_exception_for_a_command_that_goes_on() -> None:
    before = signal.getsignal(signal.SIGINT)
    with signals.handling():
        with pytest.raises(KeyboardInterrupt), signals.raising():
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(SystemExit) as ended, signals.raising():
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 143
        with signals.raising():
            pass  # Nothing is remembered.
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("made", [TypeError("expected str"), ImportError("half"), OSError(4, "x")])
def test_an_interrupt_that_native_code_made_another_exception_of_is_one(made: Exception) -> None:
    with signals.handling(), pytest.raises(KeyboardInterrupt), signals.raising():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise made from None


def test_a_bug_stays_a_bug() -> None:
    with signals.handling(), pytest.raises(AttributeError), signals.raising():
        raise AttributeError("ours")

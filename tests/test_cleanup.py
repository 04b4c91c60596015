"""What must not outlive a process: its temporary folders and its children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from edgevlm import cleanup
from edgevlm.export import child

ROOT = Path(__file__).parent.parent
# A child that says that it runs by opening a pipe, and would run on for long.
SLEEPER = "open({pipe!r}, 'w').close(); import time; time.sleep(60)"


@pytest.fixture
def pipe(tmp_path: Path) -> str:
    path = str(tmp_path / "pipe")
    os.mkfifo(path)
    return path


def sleeper(pipe: str) -> list[str]:
    return child.command("timeit", "-n", "1", "-r", "1", SLEEPER.format(pipe=pipe))


def test_a_temporary_folder_goes_with_what_it_holds_and_was_made_for(tmp_path: Path) -> None:
    with cleanup.temporary_folder(tmp_path / "a" / "b") as folder:
        (folder / "c").mkdir()
        (folder / "c" / "file").write_text("x", encoding="utf-8")
        assert folder.parent == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []
    with cleanup.temporary_folder() as folder:
        assert folder.stat().st_mode & 0o77 == 0
    assert not folder.exists()


@pytest.mark.fault(
    "Export",
    "a signal while the system's temporary folder is looked for",
    "no probe file is left there",
)
def test_the_search_for_the_systems_folder_is_not_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes a file to find out whether it can, which an end amid the search would leave."""

    def free() -> bool:
        if taken := cleanup.lock.acquire(blocking=False):
            cleanup.lock.release()
        return taken

    with ThreadPoolExecutor(1) as other:

        def search() -> str:
            assert not other.submit(free).result()
            return str(tmp_path)

        monkeypatch.setattr(tempfile, "gettempdir", search)
        with cleanup.temporary_folder() as folder:
            assert folder.parent == tmp_path


def test_a_child_ends_with_the_block(pipe: str) -> None:
    with pytest.raises(KeyboardInterrupt), cleanup.process(sleeper(pipe)) as process:
        open(pipe, "rb").close()
        raise KeyboardInterrupt
    assert process.returncode == -signal.SIGKILL


def test_a_command_that_takes_too_long_is_ended(pipe: str) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        child.run(sleeper(pipe), timeout=0.1)


def test_a_child_has_this_processes_import_path_and_nothing_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("edgevlm", "json", "runpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = "import edgevlm, json, sys; print(json.dumps([sys.path, edgevlm.__file__]))"
    done = child.run(child.command("timeit", "-n", "1", "-r", "1", code))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in done.stdout and "edgevlm/__init__.py" in done.stdout


# Makes a folder and a child, and then, in the main thread, waits or removes them.
OWNER = """
import sys, threading
from edgevlm import cleanup
from tests.test_cleanup import sleeper
ready = threading.Event()
def work():
    with cleanup.temporary_folder(), cleanup.process(sleeper(sys.argv[1])) as process:
        open(sys.argv[1], "rb").close()
        print(process.pid, flush=True)
        ready.set()
        process.wait()
        while True:
            with cleanup.temporary_folder():
                pass
threading.Thread(target=work, daemon=True).start()
ready.wait()
if sys.argv[2] == "clean":
    cleanup.everything()
    __import__("os")._exit(0)
threading.Event().wait()
"""


def owner(pipe: str, temporary: Path, how: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    temporary.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, pipe, how],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout
    return process, psutil.Process(int(process.stdout.readline()))


def test_everything_goes_while_another_thread_is_at_work(pipe: str, tmp_path: Path) -> None:
    process, sleeping = owner(pipe, tmp_path / "temporary", "clean")
    process.communicate(timeout=60)
    assert process.returncode == 0
    psutil.wait_procs([sleeping], timeout=10)
    assert not sleeping.is_running()
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.fault("Export", "kill -9 of a command with children", "the children end")
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's end")
def test_a_child_does_not_outlive_a_parent_that_is_killed(pipe: str, tmp_path: Path) -> None:
    process, sleeping = owner(pipe, tmp_path / "temporary", "wait")
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs([sleeping], timeout=10)[1] == []


def test_nothing_is_made_once_everything_was_removed() -> None:
    """In a process of its own: there is no way back."""
    code = (
        "import threading\n"
        "from edgevlm import cleanup\n"
        "cleanup.everything()\n"
        "def make():\n"
        "    with cleanup.temporary_folder(): print('made')\n"
        "thread = threading.Thread(target=make, daemon=True)\n"
        "thread.start(); thread.join(0.2); print(thread.is_alive())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n"


def test_the_lock_lets_the_thread_that_holds_it_remove_everything() -> None:
    """A signal's handler runs in the main thread wherever that is, so also within the lock."""
    with cleanup.lock:
        assert cleanup.lock.acquire(blocking=False)
        cleanup.lock.release()

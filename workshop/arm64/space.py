"""An arm64 Debian user space in a folder, run by qemu-user on this machine's kernel.

Needs root: for debootstrap, for mounts and to tell the kernel who runs aarch64's programs
(binfmt_misc). Mounts are made in namespaces that end with each command.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgevlm.errors import EdgeVLMError
from workshop.wheels import require, run

# qemu-user 7.2, Debian 12's, computes pico's int8 encoder wrongly without a word.
OLDEST = 10
_SUITE, _EMULATORS_SUITE = "bookworm", "trixie"
_MIRROR = "http://deb.debian.org/debian"
_PACKAGES = "python3,python3-venv,ca-certificates,libgomp1"
_BINFMT, _ENTRY = Path("/proc/sys/fs/binfmt_misc"), "edgevlm-arm64"
# ELF, 64 bit, little-endian, executable or shared object, for machine 183; F: the emulator is
# opened now, so that it is found in every root.
_MAGIC = r"\x7fELF\x02\x01\x01" + r"\x00" * 9 + r"\x02\x00\xb7\x00"
_MASK = r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff"
_ENTER = """\
set -e
mount -t proc proc "$1/proc"
mount -t sysfs sysfs "$1/sys"
for name in null zero full random urandom; do
  : >"$1/dev/$name"; mount --bind "/dev/$name" "$1/dev/$name"
done
mkdir -p "$1/dev/shm" "$1/work"
mount -t tmpfs tmpfs "$1/dev/shm"
mount --bind "$2" "$1/work"
root=$1; shift 2
exec chroot "$root" "$@"
"""
_STANDARD = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


@dataclass(frozen=True)
class Space:
    """A user space at `root`; `shared` is what its programs see as /work."""

    root: Path
    shared: Path

    def run(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cpu: str = "max",
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Runs one of its programs on a processor that the emulator knows, in /work.

        Raises EdgeVLMError that names the log where it fails.
        """
        said = {**_STANDARD, "QEMU_CPU": cpu, **(env or {})}
        inside = ["/usr/bin/env", "-i", "-C", "/work", *(f"{k}={v}" for k, v in said.items())]
        enter = ["sh", "-c", _ENTER, "sh", str(self.root), str(self.shared)]
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        # The first program in there is the emulator's already, and looks for its processor.
        run([*apart, *enter, *inside, *command], log, env=os.environ | {"QEMU_CPU": cpu})


def emulator(folder: Path) -> Path:
    """A qemu-user that computes rightly: this machine's, or Debian's newer one in `folder`.

    Raises EdgeVLMError where there is none.
    """
    for name in ("qemu-aarch64-static", "qemu-aarch64"):
        found = shutil.which(name)
        if found and version(Path(found)) >= OLDEST:
            return Path(found)
    own = folder / "qemu" / "usr" / "bin" / "qemu-aarch64"
    if not own.exists():
        _fetch_emulator(folder)
    if version(own) < OLDEST:
        raise EdgeVLMError(f"{own}: qemu {version(own)} computes wrongly, {OLDEST} is needed")
    return own


def version(qemu: Path) -> int:
    """The major version of an emulator."""
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"version (\d+)", said)
    return int(match[1]) if match else 0


def _fetch_emulator(folder: Path) -> None:
    """Takes qemu-user, one static program, out of a package; nothing is installed."""
    require("apt-get", "dpkg", install=f"install qemu-user {OLDEST} or newer yourself")
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    line = f"deb [signed-by={key}] {_MIRROR} {_EMULATORS_SUITE} main\n"
    (apt / "sources.list").write_text(line, encoding="utf-8")
    places = (
        f"Dir::Etc::sourcelist={apt / 'sources.list'}",
        "Dir::Etc::sourceparts=-",
        f"Dir::State::lists={apt / 'lists'}",
        f"Dir::Cache={apt / 'cache'}",
        # This folder need not be readable for apt's own user.
        "APT::Sandbox::User=root",
    )
    command = ["apt-get", *(word for place in places for word in ("-o", place))]
    run([*command, "update"], folder / "apt-update.log")
    run([*command, "download", "qemu-user"], folder / "apt-download.log", cwd=apt)
    run(["dpkg", "-x", next(apt.glob("qemu-user_*.deb")), folder / "qemu"], folder / "dpkg.log")


@contextmanager
def registered(qemu: Path) -> Iterator[None]:
    """While the block runs, the kernel runs aarch64's programs by this emulator.

    Raises EdgeVLMError where it cannot: without root, or in a container.
    """
    mounted = (_BINFMT / "register").exists()
    try:
        if not mounted:
            subprocess.run(
                ["mount", "-t", "binfmt_misc", "none", _BINFMT], capture_output=True, check=True
            )
        # A run that was killed left it.
        _unregister()
        text = f":{_ENTRY}:M::{_MAGIC}:{_MASK}:{qemu.absolute()}:F"
        (_BINFMT / "register").write_text(text, encoding="utf-8")
    except (OSError, subprocess.CalledProcessError) as e:
        raise EdgeVLMError(
            f"{_BINFMT}: cannot be used ({e}); this needs root and binfmt_misc"
        ) from e
    try:
        yield
    finally:
        _unregister()
        if not mounted:
            subprocess.run(["umount", _BINFMT], check=False)


def _unregister() -> None:
    if (_BINFMT / _ENTRY).exists():
        (_BINFMT / _ENTRY).write_text("-1", encoding="utf-8")


def user_space(folder: Path, shared: Path) -> Space:
    """The user space in `folder`, made the first time, with the emulator registered."""
    root = folder / "root"
    space = Space(root, shared)
    if (folder / "root.ready").exists():
        return space
    require("debootstrap", "unshare", install="apt-get install debootstrap util-linux")
    # What an interrupted run left has no mounts: those ended with it.
    shutil.rmtree(root, ignore_errors=True)
    first = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={_PACKAGES}"]
    run(["debootstrap", *first, _SUITE, root, _MIRROR], folder / "debootstrap.log")
    space.run(["/debootstrap/debootstrap", "--second-stage"], folder / "second-stage.log")
    (folder / "root.ready").touch()
    return space

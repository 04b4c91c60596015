"""The folder of cached pictures: damage, room, several writers, disks that do not take it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgevlm import disk_cache
from edgevlm.byte_sizes import byte_size, in_gb
from edgevlm.cli import cli
from edgevlm.disk_cache import DiskCache
from edgevlm.errors import PromptError

DATA = bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "home" / "pictures", 100_000)


def got(cache: DiskCache, key: str) -> bytes | None:
    found = cache.get(key)
    return None if found is None else bytes(found)


def entries(cache: DiskCache) -> list[Path]:
    return sorted(cache.folder.iterdir())


def test_what_was_put_is_there_for_another(cache: DiskCache) -> None:
    assert got(cache, "a") is None
    cache.put("a", b"begin ", memoryview(DATA))
    assert got(DiskCache(cache.folder, 100_000), "a") == b"begin " + DATA
    assert got(cache, "b") is None
    cache.put("a", b"other")
    assert got(cache, "a") == b"other" and len(entries(cache)) == 1


@pytest.mark.fault("Caches", "other users of the machine", "cannot read what is kept of pictures")
def test_nobody_else_may_look(cache: DiskCache) -> None:
    cache.put("a", DATA)
    if os.name == "posix":
        assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
        assert stat.S_IMODE(entries(cache)[0].stat().st_mode) == 0o600


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1],
    "half of the head": lambda data: data[:20],
    "empty": lambda data: b"",
    "a bit": lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
    "another version": lambda data: data.replace(b"cache 1", b"cache 9", 1),
    "longer": lambda data: data + b"x",
    "of nobody": lambda data: b"hello",
}


@pytest.mark.fault("Caches", "a damaged entry of any kind", "counts as none and is replaced")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_none_and_is_replaced(
    cache: DiskCache, damage: Callable[[bytes], bytes]
) -> None:
    cache.put("a", DATA)
    (path,) = entries(cache)
    path.write_bytes(damage(path.read_bytes()))
    assert got(cache, "a") is None
    cache.put("a", DATA)
    assert got(cache, "a") == DATA and entries(cache) == [path]


def test_an_entry_of_another_key_is_none(cache: DiskCache) -> None:
    cache.put("a", DATA)
    (a,) = entries(cache)
    cache.put("b", b"b")
    (b,) = {*entries(cache)} - {a}
    shutil.copy(a, b)
    assert got(cache, "b") is None and got(cache, "a") == DATA


def test_the_least_recently_used_go_first(cache: DiskCache) -> None:
    for i, key in enumerate("abcdefgh"):
        cache.put(key, DATA)
        (fresh,) = (p for p in entries(cache) if p.stat().st_mtime > 1e6)
        os.utime(fresh, (i, i))
    assert got(cache, "a") == DATA  # used now
    cache.put("i", DATA)
    cache.put("j", DATA)
    assert {key for key in "abcdefghij" if got(cache, key)} == set("acdefghij")
    assert cache.bytes() <= cache.max_bytes


def test_what_is_larger_than_the_cache_is_not_written(cache: DiskCache) -> None:
    cache.put("a", DATA)
    cache.put("b", bytes(100_000))
    assert got(cache, "a") == DATA and got(cache, "b") is None


@pytest.mark.fault("Caches", "kill -9 while an entry is written", "what it left is removed later")
def test_what_a_killed_writer_left_goes_later(cache: DiskCache) -> None:
    cache.put("a", DATA)
    old, new = cache.folder / "old.part", cache.folder / "new.part"
    for path in (old, new):
        path.write_bytes(DATA)
    os.utime(old, (1e9, 1e9))
    foreign = cache.folder / "notes.txt"
    foreign.write_text("mine", encoding="utf-8")
    assert cache.bytes() > 3 * len(DATA)
    cache.put("b", DATA)
    assert not old.exists() and new.exists()
    cache.clear()
    assert entries(cache) == [foreign]
    foreign.unlink()
    cache.clear()
    assert cache.bytes() == 0 and got(cache, "a") is None


@pytest.mark.fault("Caches", "several processes write the same entry", "each reads a whole one")
def test_several_processes_write_at_once(cache: DiskCache) -> None:
    script = """
import sys
from pathlib import Path
from edgevlm.disk_cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 50_000)
for i in range(150):
    key = str(i % 7)
    found = cache.get(key)
    assert found is None or found == key.encode() * 9000
    cache.put(key, key.encode() * 9000)
assert not cache._unwritable
"""
    command = [sys.executable, "-c", script, str(cache.folder)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
    assert all(path.suffix == ".entry" for path in entries(cache))


@pytest.mark.parametrize("place", ["a file", "below a file", "nowhere"])
def test_a_folder_that_cannot_be_made(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    folder = {"a file": "file", "below a file": "file/x/y", "nowhere": "x" * 300}[place]
    cache = DiskCache(tmp_path / folder, 100_000)
    cache.put("a", DATA)
    assert got(cache, "a") is None and cache.bytes() == 0
    cache.clear()


@pytest.mark.fault("Caches", "the disk is full", "answers as without a cache, nothing half-written")
def test_a_full_disk_is_left_as_it_was(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put("a", DATA)
    tries = []

    def full(source: Path, _: Path) -> None:
        tries.append(source)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for _ in range(3):
        cache.put("b", DATA)
    assert len(tries) == 1  # it is not tried again and again
    assert got(cache, "a") == DATA and len(entries(cache)) == 1


def test_du_shows_it_and_gc_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    run = CliRunner()
    assert "pictures" not in run.invoke(cli, ["du"]).output
    disk_cache.pictures_folder().put("a", bytes(3 << 20))
    (line,) = (x for x in run.invoke(cli, ["du"]).output.splitlines() if "pictures" in x)
    assert "cache" in line and "3" in line
    assert "cached pictures: 3" in run.invoke(cli, ["gc", "--dry-run"]).output
    assert got(disk_cache.pictures_folder(), "a")
    run.invoke(cli, ["gc"])
    assert disk_cache.pictures_folder().bytes() == 0
    assert "pictures" not in run.invoke(cli, ["du"]).output


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0), (7, 7), ("0", 0), ("1500", 1500), ("1500 B", 1500), ("500MB", 500_000_000),
        ("500 mb", 500_000_000), ("2G", 2_000_000_000), ("1.5GiB", 3 << 29), ("1 KiB", 1024),
        (".5 TB", 500_000_000_000),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(written: int | str, size: int) -> None:
    assert byte_size(written, "x") == size


@pytest.mark.parametrize("written", ["", "lots", "-1", "1e9", "2 XB", "GB", "nan", "١GB", -1, True])
def test_what_is_no_size_is_named(written: int | str) -> None:
    with pytest.raises(PromptError, match=r"^max_memory .* is not a size; write one such as"):
        byte_size(written, "max_memory")


def test_sizes_for_people_are_enough() -> None:
    assert (in_gb(1), in_gb(340_000_000), in_gb(1_250_000_001)) == ("1 MB", "340 MB", "1.26 GB")

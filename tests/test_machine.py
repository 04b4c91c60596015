"""Cores and memory of this process, from fake trees of the kernel's files and from real groups."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from edgevlm import machine
from edgevlm.machine import Memory, cpu_quota, memory, physical_cores, usable_cpus

GIB = 1 << 30
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
HYBRID = "38 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate"


def v1(controllers: str, shown: str = "/", folder: str = "") -> str:
    place = f"/sys/fs/cgroup/{folder or controllers}"
    return f"32 31 0:29 {shown} {place} rw,relatime shared:9 - cgroup cgroup rw,{controllers}"


V1 = (v1("cpu,cpuacct"), v1("memory"), v1("cpuset"))
# The groups of a process, its mounts, and files of their folders -> the root of all.
Tree = Callable[[str, tuple[str, ...], dict[str, str]], Path]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Writes the kernel's files of a process; the machine has 8 cores, 32 GiB, 20 of them free."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delattr(os, "process_cpu_count", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    free = SimpleNamespace(total=32 * GIB, available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    def write(cgroup: str, mounts: tuple[str, ...], files: dict[str, str]) -> Path:
        for name, text in {
            "proc/self/cgroup": cgroup,
            "proc/self/mountinfo": "\n".join(mounts) + "\n",
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


QUOTAS = {
    "v2": ("0::/app\n", (V2,), {"app/cpu.max": "150000 100000\n"}, 1.5),
    "v2, unlimited": ("0::/app\n", (V2,), {"app/cpu.max": "max 100000\n"}, None),
    "v2, namespace": ("0::/\n", (V2,), {"cpu.max": "200000 100000\n"}, 2.0),
    "v2, an ancestor": (
        "0::/a/b/c\n",
        (V2,),
        {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000",
         "a/b/c/cpu.max": "400000 100000"},
        0.5,
    ),
    "v2, outside its namespace": (
        "0::/../other\n",
        (V2,),
        {"cpu.max": "300000 100000", "../other/cpu.max": "100000 100000"},
        3.0,
    ),
    "v2, a mount of a part": (
        "0::/docker/1\n",
        (V2.replace(" / ", " /docker/1 ", 1),),
        {"cpu.max": "100000 50000"},
        2.0,
    ),
    "v2, a part that is another's": (
        "0::/docker/12\n",
        (V2.replace(" / ", " /docker/1 ", 1),),
        {"cpu.max": "100000 50000", "2/cpu.max": "1 100000"},
        2.0,
    ),
    "v1": (
        "4:cpu,cpuacct:/box\n2:memory:/\n",
        V1,
        {"cpu,cpuacct/box/cpu.cfs_quota_us": "100000",
         "cpu,cpuacct/box/cpu.cfs_period_us": "50000"},
        2.0,
    ),
    "v1, unlimited": (
        "4:cpu,cpuacct:/\n",
        V1,
        {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "v1, as docker mounts it": (
        "4:cpu,cpuacct:/docker/abc\n",
        (v1("cpu,cpuacct", "/docker/abc"),),
        {"cpu,cpuacct/cpu.cfs_quota_us": "300000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
        3.0,
    ),
    "v1, an ancestor": (
        "4:cpuacct,cpu:/a/b\n",
        (v1("cpuacct,cpu"),),
        {"cpuacct,cpu/a/cpu.cfs_quota_us": "100000", "cpuacct,cpu/a/cpu.cfs_period_us": "100000",
         "cpuacct,cpu/a/b/cpu.cfs_quota_us": "-1", "cpuacct,cpu/a/b/cpu.cfs_period_us": "100000"},
        1.0,
    ),
    "v1, cpuset is no cpu": (
        "5:cpuset:/x\n",
        (v1("cpuset"),),
        {"cpuset/x/cpu.cfs_quota_us": "1000", "cpuset/x/cpu.cfs_period_us": "100000"},
        None,
    ),
    "hybrid": (
        "4:cpu,cpuacct:/box\n1:name=systemd:/\n0::/box\n",
        (*V1, HYBRID),
        {"cpu,cpuacct/box/cpu.cfs_quota_us": "100000",
         "cpu,cpuacct/box/cpu.cfs_period_us": "100000"},
        1.0,
    ),
    "a mount with a space": (
        "0::/\n",
        (V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/my\040groups"),),
        {"my groups/cpu.max": "100000 100000"},
        1.0,
    ),
    "no groups": ("", (), {}, None),
    "no mount": ("0::/app\n", ("22 1 8:1 / / rw - ext4 /dev/sda1 rw",), {}, None),
    "no files": ("0::/app\n", (V2,), {}, None),
    "nonsense": ("x\n::::\n0:\n\n7:cpu", ("", "a b c", "- - -", V2), {"cpu.max": "a lot"}, None),
    "half a line": ("0::/\n", (V2,), {"cpu.max": "100000"}, None),
    "a period of nothing": ("0::/\n", (V2,), {"cpu.max": "100000 0"}, None),
    "negative": ("0::/\n", (V2,), {"cpu.max": "-5 100000"}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas(case: str, tree: Tree) -> None:
    cgroup, mounts, files, expected = QUOTAS[case]
    root = tree(cgroup, mounts, files)
    assert cpu_quota(root) == expected
    assert usable_cpus(root) == (8 if expected is None else max(1, int(expected)))


def test_no_proc_at_all(tmp_path: Path, tree: Tree) -> None:
    assert cpu_quota(tmp_path / "nowhere") is None
    assert memory(tmp_path / "nowhere") == Memory(32 * GIB, 20 * GIB)


def test_a_quota_counts_like_affinity(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree("0::/\n", (V2,), {"cpu.max": "550000 100000"})
    monkeypatch.setattr(machine, "_ROOT", root)
    assert usable_cpus(root) == 5
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 6})
    assert usable_cpus(root) == 3


@pytest.mark.parametrize(
    ("physical", "bound", "expected"), [(4, 8, 4), (8, 2, 2), (None, 8, 8), (8, 0, 1)]
)
def test_physical_cores(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, physical: int | None, bound: int, expected: int
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else physical)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(max(1, bound))))
    monkeypatch.setattr(machine, "cpu_quota", lambda _: None)
    assert physical_cores() == expected


@pytest.mark.parametrize(("counted", "expected"), [(2, 2), (64, 8), (None, 8)])
def test_pythons_own_count_is_a_limit(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, counted: int | None, expected: int
) -> None:
    root = tree("", (), {})
    monkeypatch.setattr(os, "process_cpu_count", lambda: counted, raising=False)
    assert usable_cpus(root) == expected


def test_systems_without_affinity(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    root = tree("0::/\n", (V2,), {"cpu.max": "max 100000"})
    assert usable_cpus(root) == 6


V2_STAT = f"anon 5\nfile 77\ninactive_file {GIB}\nactive_file {GIB}\nslab 9\n"
V1_STAT = (
    f"cache 1\ninactive_file 1\nactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n"
)
MEMORIES = {
    "v2": (
        "0::/app\n", (V2,),
        {"app/memory.max": f"{4 * GIB}", "app/memory.current": f"{3 * GIB}",
         "app/memory.stat": V2_STAT, "app/memory.high": "max"},
        (4, 3),
    ),
    "v2, unlimited": (
        "0::/app\n", (V2,), {"app/memory.max": "max", "app/memory.current": f"{3 * GIB}"}, (32, 20)
    ),
    "v2, slowed down": (
        "0::/\n", (V2,), {"memory.max": f"{8 * GIB}", "memory.high": f"{6 * GIB}",
                          "memory.current": f"{GIB}"}, (6, 5),
    ),
    "v2, an ancestor": (
        "0::/a/b\n", (V2,),
        {"a/memory.max": f"{2 * GIB}", "a/memory.current": f"{GIB}", "a/b/memory.max": f"{9 * GIB}",
         "a/b/memory.current": "0"},
        (2, 1),
    ),
    "v2, an ancestor that others filled": (
        "0::/a/b\n", (V2,),
        {"a/memory.max": f"{8 * GIB}", "a/memory.current": f"{8 * GIB}",
         "a/b/memory.max": f"{6 * GIB}", "a/b/memory.current": "0"},
        (6, 0),
    ),
    "v2, over its limit": (
        "0::/\n", (V2,), {"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"}, (1, 0)
    ),
    "v2, more than there is": (
        "0::/\n", (V2,), {"memory.max": f"{64 * GIB}", "memory.current": "0"}, (32, 20)
    ),
    "v1": (
        "2:memory:/box\n", V1,
        {"memory/box/memory.limit_in_bytes": f"{4 * GIB}",
         "memory/box/memory.usage_in_bytes": f"{3 * GIB}", "memory/box/memory.stat": V1_STAT},
        (4, 2),
    ),
    "v1, unlimited": (
        "2:memory:/box\n", V1,
        {"memory/box/memory.limit_in_bytes": "9223372036854771712",
         "memory/box/memory.usage_in_bytes": f"{3 * GIB}"},
        (32, 20),
    ),
    "v1, as docker mounts it": (
        "2:memory:/docker/abc\n", (v1("memory", "/docker/abc"),),
        {"memory/memory.limit_in_bytes": f"{2 * GIB}", "memory/memory.usage_in_bytes": f"{GIB}"},
        (2, 1),
    ),
    "hybrid": (
        "2:memory:/box\n0::/box\n", (*V1, HYBRID),
        {"memory/box/memory.limit_in_bytes": f"{4 * GIB}",
         "memory/box/memory.usage_in_bytes": "0"},
        (4, 4),
    ),
    "no use told": ("0::/\n", (V2,), {"memory.max": f"{4 * GIB}"}, (4, 4)),
    "nonsense": ("0::/\n", (V2,), {"memory.max": "plenty", "memory.current": "x"}, (32, 20)),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORIES)
def test_memories(case: str, tree: Tree) -> None:
    cgroup, mounts, files, (total, free) = MEMORIES[case]
    assert memory(tree(cgroup, mounts, files)) == Memory(total * GIB, free * GIB)


@contextlib.contextmanager
def group(controller: str, name: str, text: str) -> Iterator[Path]:
    """A real control group of this test's own with a limit; skips where none can be made."""
    own = next(machine._groups(Path("/"), controller), None)
    if own is None:
        pytest.skip("no control groups are mounted here")
    folder = own / f"edgevlm-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"no control group can be made here ({e})")
    try:
        (folder / name).write_text(text, encoding="utf-8")
        yield folder
    except OSError as e:
        pytest.skip(f"no limit can be set here ({e})")
    finally:
        folder.rmdir()


def inside(folder: Path, expression: str) -> str:
    """What a process in a control group evaluates an expression to."""
    code = f"open('{folder}/cgroup.procs', 'w').write('0')\nimport edgevlm.machine as m\n"
    return subprocess.run(
        [sys.executable, "-c", f"{code}print({expression})"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    ).stdout.strip()


V2_HERE = os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def test_a_real_quota() -> None:
    limit = ("cpu.max", "50000 100000") if V2_HERE else ("cpu.cfs_quota_us", "50000")
    with group("cpu", *limit) as folder:
        assert inside(folder, "m.cpu_quota(), m.usable_cpus(), m.physical_cores()") == "0.5 1 1"


def test_a_real_memory_limit() -> None:
    name = "memory.max" if V2_HERE else "memory.limit_in_bytes"
    with group("memory", name, str(GIB)) as folder:
        total, free = map(int, inside(folder, "*vars(m.memory()).values()").split())
        assert total == GIB and 0 < free <= GIB


def test_everybody_asks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgevlm.benchmarks.latency.machine import this_machine
    from edgevlm.runtimes import rules

    monkeypatch.setattr(machine, "cpu_quota", lambda _: 1.7)
    assert rules.decide("threads", rules.this_machine()) == 1
    assert this_machine().usable_cores == 1
    assert machine.physical_cores() == 1

"""Downloads from a small hub on this machine, whatever goes wrong on their way."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from edgevlm.errors import HubError
from edgevlm.export.checkpoint.hub import locate
from edgevlm.hub.download import snapshot
from edgevlm.hub.repository import RemoteFile, Repository
from tests.hub import COMMIT, ROOT, TINY, WEIGHTS, Fault, Hub


@pytest.mark.parametrize(
    ("fault", "requests"),
    [
        (Fault(f"GET /{TINY}/resolve/{COMMIT}/{WEIGHTS}", cut_at=5000), 2),
        (Fault(f"GET /{TINY}/resolve/{COMMIT}/{WEIGHTS}", times=3, cut_at=5000), 4),
        (Fault("GET /api/models", status=429, headers={"Retry-After": "0"}), 1),
        (Fault(f"HEAD /{TINY}", times=2, status=429, headers={"Retry-After": "0"}), 1),
        (Fault(f"GET /{TINY}", status=503, headers={"Retry-After": "0"}), 1),
        (Fault(f"HEAD /{TINY}/resolve/{COMMIT}/config.json", status=500), 1),
        (Fault(f"GET /{TINY}/resolve/{COMMIT}/{WEIGHTS}", wrong=True), 2),
        (Fault(f"GET /{TINY}/resolve/{COMMIT}/config.json", wrong=True), 1),
    ],
    ids=["cut", "cut thrice", "429 listing", "429 file", "503", "500", "wrong", "wrong small"],
)
def test_what_fails_in_passing_is_tried_again(
    hub: Hub, smolvlm_checkpoint: Path, tmp_path: Path, fault: Fault, requests: int
) -> None:
    hub.faults.append(fault)
    done = download(hub, tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and fault.times == 0
    folder = Path(done.stdout.strip())
    for path in smolvlm_checkpoint.glob("*.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert (folder / WEIGHTS).read_bytes() == (smolvlm_checkpoint / WEIGHTS).read_bytes()
    assert len(hub.downloads) >= requests


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(f"HEAD /{TINY}/resolve/{COMMIT}/{WEIGHTS}", 99, 403), "403"),
        (Fault(f"GET /{TINY}/resolve/{COMMIT}/{WEIGHTS}", 99, wrong=True), "its hash differs"),
        (Fault(f"HEAD /{TINY}/resolve/{COMMIT}/{WEIGHTS}", 99, 404), "404"),
        (Fault("GET /api/models", 99, 429, {"Retry-After": "86400"}), "429"),
        (Fault("GET /api/models", 99, 401), "hf auth login"),
    ],
    ids=["403", "wrong", "404", "come back tomorrow", "401"],
)
def test_what_fails_for_good_is_one_line(hub: Hub, tmp_path: Path, fault: Fault, says: str) -> None:
    hub.faults.append(fault)
    done = download(hub, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"HubError: {TINY}: ") and says in done.stderr
    hub.faults.clear()
    assert download(hub, tmp_path).returncode == 0


def test_access_is_asked_for_before_a_download(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    done = download(hub, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"accept its licence at {hub.address}/{TINY} and log in with `hf" in done.stderr
    assert not any("/resolve/" in path for path in hub.asked)


def test_a_mirror_without_sizes_and_hashes(
    hub: Hub, smolvlm_checkpoint: Path, tmp_path: Path
) -> None:
    hub.hashes = False
    done = download(hub, tmp_path)
    assert done.returncode == 0
    found = Path(done.stdout.strip()) / WEIGHTS
    assert found.read_bytes() == (smolvlm_checkpoint / WEIGHTS).read_bytes()


@pytest.mark.fault(
    "Pull",
    "a download that broke off, or left too much",
    "goes on where it ended; what does not fit is fetched anew",
)
@pytest.mark.parametrize("there", ["half", "all", "too much"])
def test_a_broken_download_goes_on_where_it_ended(
    hub: Hub, smolvlm_checkpoint: Path, tmp_path: Path, there: str
) -> None:
    data = (smolvlm_checkpoint / WEIGHTS).read_bytes()
    left = {"half": data[:5000], "all": data, "too much": data + b"more"}[there]
    blob = tmp_path / f"hub/hub/models--org--tiny-smolvlm/blobs/{hashlib.sha256(data).hexdigest()}"
    blob.parent.mkdir(parents=True)
    blob.with_name(f"{blob.name}.edgevlm.part").write_bytes(left)
    done = download(hub, tmp_path)
    assert done.returncode == 0 and blob.read_bytes() == data
    assert (Path(done.stdout.strip()) / WEIGHTS).resolve() == blob
    assert hub.ranges == {"half": ["bytes=5000-"], "all": [], "too much": []}[there]
    assert len(hub.downloads) == (0 if there == "all" else 1)


def locate_it() -> None:
    """Downloads the checkpoint alone, without an export; says what came of it."""
    try:
        print(locate(TINY)[0])
    except HubError as e:
        sys.exit(f"HubError: {e}")


@pytest.mark.fault("Pull", "the disk fills up", "one line; the same command goes on")
def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("edgevlm.hub.download._Counted.write", full)
        done = download(hub, tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "cannot be kept on this disk" in done.stderr and len(hub.downloads) == 1
    assert download(hub, tmp_path).returncode == 0


def test_a_hub_that_falls_silent(hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault(f"GET /{TINY}/resolve/{COMMIT}/{WEIGHTS}", silent=True))
    assert download(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1").returncode == 0
    assert len(hub.downloads) == 2


def download(hub: Hub, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return hub.run(locate_it, home, **more)


def test_a_proxy_is_asked(hub: Hub, tmp_path: Path) -> None:
    """By another process: the hub client may keep a connection that knows no proxy."""
    proxied = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": hub.address}
    done = subprocess.run(
        [sys.executable, "-c", "from tests import test_download\ntest_download.locate_it()"],
        env=hub.environment(tmp_path, **proxied),
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0 and len(hub.downloads) == 1


@pytest.mark.fault(
    "Pull",
    "a disk too small for the files",
    "refused in numbers before the first byte",
)
def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    huge = RemoteFile(WEIGHTS, 1 << 60, "0" * 64)
    with pytest.raises(HubError, match=r"needs 1152921504\.61 GB in .*HF_HOME"):
        snapshot(Repository("org/huge", COMMIT, (huge,)), [huge])

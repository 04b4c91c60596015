"""Models on the hub, played by a small server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.hub import locate

COMMIT = "1" * 40
REPO = "org/tiny-paligemma"
# What the hub says of repositories that cannot be read: status and error code.
REFUSED = {
    "org/unknown": (404, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/broken": (500, ""),
}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (f"models--org--tiny-paligemma/snapshots/{COMMIT}", "tiny-paligemma"),
        (f"models--gpt2/snapshots/{'abc4' * 10}", "gpt2"),
        (f"other/snapshots/{COMMIT}/", "other"),
        (f"org/{COMMIT}", COMMIT),
        ("models--org--name/snapshots/mine", "mine"),
    ],
)
def test_a_folder_of_the_hubs_cache_has_the_models_name(
    tmp_path: Path, folder: str, name: str
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    assert locate(tmp_path / folder) == (tmp_path / folder, name)
    (tmp_path / "link").symlink_to(folder)
    assert locate(tmp_path / "link")[1] == name


def test_a_source_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    with pytest.raises(SourceError, match="not UTF-8"):
        locate(folder)


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub's API that a download of a snapshot needs."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        type(self).asked.append(self.path)
        for repo, (status, code) in REFUSED.items():
            if repo in self.path:
                return self._send(status, {"X-Error-Code": code}, b"{}", body)
        if "/revision/nowhere" in self.path:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        if self.path.startswith("/api/models/"):
            names = sorted(p.name for p in self.folder.iterdir())
            info = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self._send(200, {}, json.dumps(info).encode(), body)
        data = (self.folder / self.path.rsplit("/", 1)[1]).read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        return self._send(200, headers, data, body)

    def _send(self, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(paligemma_checkpoint: Path) -> Iterator[tuple[str, list[str]]]:
    """The server's address and the paths it was asked for."""
    with serve(paligemma_checkpoint) as served:
        yield served


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub whose one repository is a folder."""

    class Tiny(Hub):
        asked = []

    Tiny.folder = folder
    with ThreadingHTTPServer(("127.0.0.1", 0), Tiny) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Tiny.asked
        server.shutdown()


def locate_in_child(source: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The hub client reads its address and its cache's place when it is imported."""
    code = (
        "import sys\n"
        "from edgevlm.errors import SourceError\n"
        "from edgevlm.export.checkpoint.hub import locate\n"
        "steps = []\n"
        "try: print(*locate(sys.argv[1], steps.append), steps[-1].done, sep='\\n')\n"
        "except SourceError as e: sys.exit(f'SourceError: {e}')\n"
    )
    env = {
        **{
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and "proxy" not in k.lower()
        },
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, source],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parent.parent,
        check=False,
    )


def test_a_model_is_downloaded(
    hub: tuple[str, list[str]], paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    endpoint, asked = hub
    (paligemma_checkpoint / "pytorch_model.bin").write_bytes(b"not wanted")
    done = locate_in_child(f"{REPO}@main", endpoint, tmp_path)
    (paligemma_checkpoint / "pytorch_model.bin").unlink()
    assert done.returncode == 0 and done.stderr == ""
    folder, name, files = done.stdout.splitlines()
    assert int(files) == len(list(Path(folder).iterdir()))
    assert name == "tiny-paligemma"
    for wanted in ("config.json", "model.safetensors", "tokenizer.model"):
        expected = (paligemma_checkpoint / wanted).read_bytes()
        assert (Path(folder) / wanted).read_bytes() == expected
    assert not any("pytorch_model.bin" in path for path in asked)


def test_torchs_files_are_taken_where_there_are_no_others(tmp_path: Path) -> None:
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("config.json", *shards, "training_args.bin"):
        (repository / name).write_bytes(name.encode())
    with serve(repository) as (endpoint, asked):
        done = locate_in_child(REPO, endpoint, tmp_path / "home")
    assert done.returncode == 0 and done.stderr == ""
    folder = Path(done.stdout.splitlines()[0])
    assert sorted(p.name for p in folder.glob("*.bin")) == shards
    assert (folder / shards[1]).read_bytes() == shards[1].encode()
    assert (folder / "config.json").is_file()
    assert not any("training_args" in path for path in asked)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("org/unknown", "is neither a folder here nor a model on the hub"),
        ("org/gated", "access is restricted; accept its licence"),
        ("org/broken", "cannot be downloaded"),
        (f"{REPO}@nowhere", "has no such revision"),
        ("org/--bad..name", "is not a valid name on the hub"),
    ],
)
def test_models_that_cannot_be_had(
    hub: tuple[str, list[str]], tmp_path: Path, source: str, says: str
) -> None:
    done = locate_in_child(source, hub[0], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"SourceError: {source}: ") and says in done.stderr
    assert done.stderr.count("\n") == 1


def test_no_network(tmp_path: Path) -> None:
    done = locate_in_child(REPO, "http://127.0.0.1:9", tmp_path)
    assert "SourceError: org/tiny-paligemma: cannot be downloaded" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("home", ["file", "none"])
def test_a_cache_that_cannot_be_written(
    hub: tuple[str, list[str]], tmp_path: Path, home: str
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    place = tmp_path / "file" if home == "file" else Path("/proc/none")
    if not place.parent.is_dir():
        pytest.skip("no /proc here")
    done = locate_in_child(REPO, hub[0], place)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"SourceError: {REPO}: cannot be kept in the hub's cache (")
    assert str(place) in done.stderr and done.stderr.endswith("HF_HOME names another folder\n")


@pytest.mark.parametrize("source", ["./org/name", "nowhere", "a/b/c", "../x/y"])
def test_what_looks_like_a_folder_is_not_asked_of_the_hub(source: str) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        locate(source)

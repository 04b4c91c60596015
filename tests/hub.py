"""A small hub on this machine: the part of its API that edgevlm and the hub client use, with faults
to order.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from edgevlm import cli
from edgevlm.hub import patience
from tests import inside

COMMIT = "1" * 40
# As on the hub, where .gitattributes says so.
LARGE = (".safetensors", ".bin", ".gguf", ".onnx", ".data", ".model")
# The status and the error code of repositories that cannot be read.
REFUSED = {
    "org/unknown": (404, "RepoNotFound"),
    "org/gated": (403, "GatedRepo"),
    "org/private": (401, "RepoNotFound"),
    "org/broken": (500, ""),
}
# The repository of conftest's hub, and its large file.
TINY = "org/tiny-smolvlm"
WEIGHTS = "model.safetensors"
ROOT = Path(__file__).parent.parent


@dataclass
class Fault:
    """Something that goes wrong with requests whose path contains `path`, the first `times` times.

    status: the answer's instead of 200; headers: more of them; cut_at: bytes after which the
    connection ends; wrong: other bytes than the file's; silent: none, until the client hangs up.
    """

    path: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    wrong: bool = False
    silent: bool = False


@dataclass
class Hub:
    """A running hub: repositories are folders, `asked` the requests, as "METHOD PATH".

    The listing of a `gated` one is public, its files are not; without `hashes` it states neither
    those nor sizes, as some mirrors.
    """

    address: str = ""
    repositories: dict[str, Path] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    gated: bool = False
    hashes: bool = True

    @property
    def downloads(self) -> list[str]:
        """The requests for the weights' bytes."""
        return [path for path in self.asked if path.startswith("GET") and path.endswith(WEIGHTS)]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a child process that uses this hub and `home`, nothing of the user's."""
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "EDGEVLM_")) and "proxy" not in k.lower()
        }
        return kept | {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home / "hub"),
            "EDGEVLM_HOME": str(home / "edgevlm"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **more,
        }

    def edgevlm(self, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line against this hub, in this process."""
        return self.run(cli.main, home, *arguments, **more)

    def run(
        self, action: Callable[[], object], home: Path, *arguments: str, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Calls `action` in this process as a child with `environment` would: the hub client is
        imported anew, as it reads its variables then. Nobody waits before a further attempt.
        """
        log = logging.getLogger("huggingface_hub")
        with ExitStack() as stack:
            variables = self.environment(home, **more)
            stack.enter_context(mock.patch.dict(os.environ, variables, clear=True))
            stack.enter_context(inside.children())
            stack.enter_context(mock.patch.object(patience, "time"))
            stack.enter_context(mock.patch.object(log, "handlers", []))
            stack.enter_context(_imported_anew("huggingface_hub"))
            return inside.called(action, arguments)

    def fault(self, path: str) -> Fault | None:
        """The next fault that this request meets."""
        for found in self.faults:
            if found.path in path and found.times > 0:
                found.times -= 1
                return found
        return None


@contextmanager
def _imported_anew(package: str) -> Iterator[None]:
    """Whoever imports the package within the block gets another one than before and after it."""
    before = _taken_out(package)
    try:
        yield
    finally:
        _taken_out(package)
        sys.modules.update(before)


def _taken_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


@contextmanager
def serve(**repositories: Path) -> Iterator[Hub]:
    """A hub whose repositories org/NAME are folders; underscores in names stand for dashes."""
    hub = Hub(repositories={f"org/{n.replace('_', '-')}": f for n, f in repositories.items()})

    class Handler(_Handler):
        pass

    Handler.hub = hub
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"POST {self.path}")
        if (fault := self.hub.fault(f"POST {self.path}")) and fault.status:
            return self._send(fault.status, fault.headers, b"{}", True)
        self._json(self._posted(data))

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"PUT {self.path}")
        if (fault := self.hub.fault(f"PUT {self.path}")) and fault.status:
            return self._send(fault.status, fault.headers, b"{}", True)
        _uploaded(self.hub, self.path.rsplit("/", 1)[1]).write_bytes(data)
        self._send(200, {}, b"", True)

    def _answer(self, body: bool) -> None:
        # To a proxy a client names the whole address.
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        for repo, (status, code) in REFUSED.items():
            if repo in path:
                return self._send(status, {"X-Error-Code": code}, b"{}", body)
        if "/revision/nowhere" in path:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body)
        fault = self.hub.fault(f"{self.command} {path}")
        if fault and fault.status:
            return self._send(fault.status, fault.headers, b"{}", body)
        if fault and fault.silent:
            self.rfile.read(1)
            return None
        for name, folder in self.hub.repositories.items():
            if self.hub.gated and (path.endswith("/auth-check") or path.startswith(f"/{name}/")):
                return self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}", body)
            if path.startswith(f"/api/models/{name}"):
                return self._json(_listing(self.hub, name))
            if path.startswith(f"/{name}/"):
                return self._file(folder / path.partition(f"/{COMMIT}/")[2], fault)
        return self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body)

    def _file(self, file: Path, fault: Fault | None) -> None:
        if not file.is_file():
            return self._send(404, {"X-Error-Code": "EntryNotFound"}, b"{}", True)
        data = file.read_bytes()
        headers = {"ETag": f'"{_etag(file, data)}"', "X-Repo-Commit": COMMIT}
        if fault and fault.wrong:
            data = bytes(byte ^ 1 for byte in data)
        start = 0
        if wanted := self.headers.get("Range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = fault.cut_at if fault else None
        self._send(206 if start else 200, headers, data[start:], self.command == "GET", cut)

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), True)

    def _send(
        self, status: int, headers: dict[str, str], data: bytes, body: bool, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
            if cut is not None:
                self.close_connection = True

    def _posted(self, data: bytes) -> Any:
        """Answers to an upload: a repository, how files go, where large ones go, a commit."""
        if self.path.endswith("/repos/create"):
            name = "/".join(
                filter(None, (json.loads(data).get("organization"), json.loads(data)["name"]))
            )
            if name not in self.hub.repositories:
                raise AssertionError(f"no folder for {name}")
            return {"url": f"{self.hub.address}/{name}"}
        if "/preupload/" in self.path:
            files = json.loads(data)["files"]
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for f in files
            ]
            return {"files": modes}
        if self.path.endswith("/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{self.hub.address}/put/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]
            return {"transfer": "basic", "objects": objects}
        if "/commit/" in self.path:
            return self._committed([json.loads(line) for line in data.splitlines() if line])
        return {}

    def _committed(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        repo = next(r for r in self.hub.repositories if f"/{r}/" in self.path)
        folder = self.hub.repositories[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
            if line["key"] == "lfsFile":
                _uploaded(self.hub, value["oid"]).rename(folder / value["path"])
        return {
            "commitUrl": f"{self.hub.address}/{repo}/commit/{COMMIT}",
            "commitOid": COMMIT,
            "success": True,
        }

    def log_message(self, format: str, *args: object) -> None:
        pass


def _uploaded(hub: Hub, oid: str) -> Path:
    return next(iter(hub.repositories.values())).parent / f"upload-{oid}"


def _listing(hub: Hub, repo: str) -> dict[str, Any]:
    folder = hub.repositories[repo]
    siblings = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        found: dict[str, Any] = {"rfilename": name}
        if hub.hashes:
            found |= {"size": len(data), "blobId": _git_sha1(data)}
            if name.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                found["lfs"] = {"size": len(data), "sha256": digest, "pointerSize": 134}
        siblings.append(found)
    return {
        "id": repo,
        "sha": COMMIT,
        "private": False,
        "gated": "manual" if hub.gated else False,
        "tags": ["license:apache-2.0"],
        "siblings": siblings,
    }


def _etag(file: Path, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if file.name.endswith(LARGE) else _git_sha1(data)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()

"""Requests to a server: each is answered with 200, or refused with 4xx in OpenAI's shape."""

from __future__ import annotations

import base64
import io
import random
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from edgevlm.runtimes import fakes
from tests.serving import serving
from workshop.fuzz.mutate import changed, damaged, dumped
from workshop.fuzz.outcomes import Wrong
from workshop.fuzz.samples import PICTURE

_SECONDS = 60.0
_PATHS = (
    *("/v1/chat/completions", "/v1/models", "/v1/models/%00", "/v1/models/../../etc/passwd", "/"),
    *(
        "/metrics",
        "/v1/models/" + "a" * 5000,
        "/%ff",
        "//",
        "/v1/chat/completions/",
        "*",
        "/?" + "x" * 900,
    ),
)
_METHODS = ("POST", "GET", "PUT", "HEAD", "OPTIONS", "DELETE", "X" * 300, "post", "")
_HEADERS = (
    *("Content-Type: text/plain", "Content-Type: \xff", "Content-Length: 5", "Content-Length: -1"),
    *("Content-Length: 99999999999999999999", "Transfer-Encoding: chunked", "Expect: 100-continue"),
    *("Authorization: Bearer \xff\xfe", "Origin: http://x", "Host: a, b", "Content-Encoding: gzip"),
    *(
        "X: " + "y" * 70_000,
        "Connection: Upgrade\r\nUpgrade: websocket",
        "Range: bytes=0-",
        ": x",
        "x",
    ),
)


class Fuzzed:
    """A server of a fake model, asked over a socket."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        made = partial(fakes.vlm, "a red circle", films=True)
        served = self._stack.enter_context(serving({"m": made}))
        self._port = int(served.base.rpartition(":")[2])
        buffer = io.BytesIO()
        PICTURE.save(buffer, "PNG")
        self._png = buffer.getvalue()

    def case(self, rng: random.Random) -> bytes:
        """See Target."""
        body = self._body(rng)
        path = rng.choice(_PATHS) if rng.random() < 0.1 else _PATHS[0]
        method = rng.choice(_METHODS) if rng.random() < 0.1 else "POST"
        headers = ["Host: 127.0.0.1", "Connection: close", f"Content-Length: {len(body)}"]
        if rng.random() < 0.15:
            headers.insert(rng.randrange(4), rng.choice(_HEADERS))
        if rng.random() < 0.05:
            headers.pop(rng.randrange(len(headers)))
        head = "\r\n".join((f"{method} {path} HTTP/1.1", *headers, "", "")).encode("latin-1")
        whole = head + body
        return damaged(whole, rng) if rng.random() < 0.05 else whole

    def _body(self, rng: random.Random) -> bytes:
        data = damaged(self._png, rng) if rng.random() < 0.3 else self._png
        if rng.random() < 0.05:
            data = _large(rng)
        url = (
            f"data:image/{rng.choice(('png', 'jpeg', 'x' * 99))};base64,"
            + base64.b64encode(data).decode()
        )
        if rng.random() < 0.1:
            url = damaged(url.encode(), rng).decode(errors="replace")
        picture: dict[str, Any] = {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}
        if rng.random() < 0.2:
            film = url.replace("data:image", "data:video")
            picture = {"type": "video_url", "video_url": {"url": film, "fps": 0.5}}
        many = rng.choice((1, 1, 1, 2, 50))
        request: dict[str, Any] = {
            **{"model": "m", "max_tokens": 3, "temperature": 0.5, "stop": ["x"], "seed": 1},
            **{"stream": rng.random() < 0.3, "logprobs": False, "n": 1, "top_p": 0.9, "user": "u"},
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "what?"}, *[picture] * many]},
            ],
        }
        if rng.random() < 0.2:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "array", "items": {"enum": [1]}}},
            }
        return dumped(changed(request, rng) if rng.random() < 0.9 else request, rng)

    def check(self, data: bytes) -> None:
        """See Target."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=_SECONDS) as client:
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # It was refused, and the connection closed, before it was read.
            answer = _received(client)
        status = answer.partition(b" ")[2][:3]
        # Who sends half a request and hangs up gets no answer.
        if answer and status[:1] not in (b"2", b"4") and status != b"307":
            raise Wrong(f"status {status!r}")
        if status == b"200" and b'"code": "defect"' in answer:
            raise Wrong("a defect in a stream")


def _received(client: socket.socket) -> bytes:
    blocks = []
    try:
        while block := client.recv(1 << 16):
            blocks.append(block)
    except ConnectionResetError:
        pass
    return b"".join(blocks)


def _large(rng: random.Random) -> bytes:
    side = rng.choice((3000, 9000))
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, rng.choice(("PNG", "TIFF", "GIF")))
    return buffer.getvalue()

"""Pictures from web servers and data URLs: what is asked for, what is shown, what goes wrong."""

from __future__ import annotations

import base64
import gzip
import io
import re
import socketserver
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import edgevlm
from edgevlm.errors import ImageError
from edgevlm.image import fetch, read_image
from edgevlm.image.urls import Address, without_credentials

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)


def png(rgb: NDArray[np.uint8] = RGB) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = png()


def response(body: bytes = PICTURE, status: str = "200 OK", **headers: object) -> bytes:
    lines = {"Content_Length": len(body), "Connection": "close", **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


class Server:
    """Answers each request with the raw bytes of its path, or a picture; keeps what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.may_end = threading.Event()
        self.may_end.set()

    @contextmanager
    def running(self) -> Iterator[str]:
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                line = self.rfile.readline().decode("latin-1").split()
                headers = {}
                while (row := self.rfile.readline().decode("latin-1").strip()) != "":
                    name, _, value = row.partition(": ")
                    headers[name.lower()] = value
                outer.asked.append((line[1], headers))
                self.wfile.write(outer.answers.get(line[1], response()))
                outer.may_end.wait()

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    served = Server()
    with served.running() as base:
        yield served, base


def refused(source: str) -> str:
    """The message of the refusal: always one short line."""
    with pytest.raises(ImageError) as caught:
        read_image(source)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("/my photo.png", "/my%20photo.png"),
        ("/my%20photo.png", "/my%20photo.png"),
        ("/100% real.png", "/100%25%20real.png"),
        ("/größe/写真.png", "/gr%C3%B6%C3%9Fe/%E5%86%99%E7%9C%9F.png"),
        ("/a.png?q=ä b&c=d%2Fe?f", "/a.png?q=%C3%A4%20b&c=d%2Fe?f"),
        ("/a.png#part", "/a.png"),
        ("/a\tb\n.png", "/ab.png"),
        ("/a\"b<c>|`{d}\\e.png", "/a%22b%3Cc%3E%7C%60%7Bd%7D%5Ce.png"),
        ("/bytes\udce9.png", "/bytes%E9.png"),
        ("?only=query", "/?only=query"),
        ("", "/"),
    ],
)  # fmt: skip
def test_urls_are_sent_percent_encoded(server: tuple[Server, str], typed: str, sent: str) -> None:
    served, base = server
    np.testing.assert_array_equal(read_image(base + typed), RGB)
    assert [path for path, _ in served.asked] == [sent]


def test_a_space_in_a_url_to_nobody_is_one_line() -> None:
    assert "cannot be downloaded" in refused("http://127.0.0.1:9/my photo.png")


def test_hosts_in_other_alphabets_are_asked_for_in_punycode(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, base = server
    monkeypatch.setenv("http_proxy", base)
    monkeypatch.setenv("no_proxy", "")
    read_image("http://bücher.example/ein bild.png")
    asked, headers = served.asked[0]
    assert asked == "http://xn--bcher-kva.example/ein%20bild.png"
    assert headers["host"] == "xn--bcher-kva.example"


def test_servers_are_told_who_asks(server: tuple[Server, str]) -> None:
    served, base = server
    read_image(f"{base}/a.png")
    agent = served.asked[0][1]["user-agent"]
    assert agent.startswith(f"edgevlm/{edgevlm.__version__} ")
    assert re.fullmatch(r"[\w.-]+/[\w.]+( [\w.-]+/[\w.]+)*", agent)


def test_credentials_are_sent_as_basic_authentication_and_never_shown(
    server: tuple[Server, str],
) -> None:
    served, base = server
    host = base.removeprefix("http://")
    read_image(f"http://me:se%40cret@{host}/a.png")
    asked, headers = served.asked[0]
    assert (asked, headers["host"]) == ("/a.png", host)
    assert headers["authorization"] == "Basic " + base64.b64encode(b"me:se@cret").decode()
    served.answers["/no.png?key=hidden"] = response(b"", "401 Unauthorized")
    message = refused(f"http://me:secret@{host}/no.png?key=hidden#x")
    assert message == f"http://{host}/no.png?...: the server answered 401 Unauthorized"


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@127.0.0.1:9/a.png",
        "http://me:secret@[::1/a.png",
        "http://me:sec/ret@127.0.0.1/a.png",
        "http://me:sec#ret@127.0.0.1/a.png",
        "http://me:sec?ret@127.0.0.1/a.png",
        "http://me:secret@ex\u2100mple.com/a.png",
        "http://me:secret@127.0.0.1:99999/a.png",
        "http://me:secret@/a.png",
        "HTTPS://secret@127.0.0.1:9/a.png?token=secret",
        "http://me:se cret@127.0.0.1:9/a.png",
    ],
)
def test_no_message_shows_a_password(url: str) -> None:
    message = refused(url)
    for word in ("me:", "sec", "ret", "cret"):
        assert word not in message.replace("is not a valid URL (a / or # in a password", "")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://", "names no host"),
        ("http:///a.png", "names no host"),
        ("http://[::1/a.png", "Invalid IPv6 URL"),
        ("http://127.0.0.1:99999/a.png", "not a valid URL"),
        ("http://127.0.0.1:port/a.png", "not a valid URL"),
        ("http://a b/x.png", "cannot be downloaded"),
        ("http://" + "a" * 64 + ".example/x.png", "label"),
        ("http://" + "ä" * 80 + "/x.png", "label"),
        ("http://..../x.png", "cannot be downloaded"),
        ("http://127.0.0.1:9/" + "long/" * 2000, "cannot be downloaded"),
        ("http://127.0.0.1:9/\ud800.png", "not a valid URL"),
        ("https://127.0.0.1:9/x.png", "cannot be downloaded"),
    ],
)
def test_invalid_urls_are_one_line(url: str, reason: str) -> None:
    assert reason in refused(url)


ANSWERS = {
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be downloaded"),
    "nothing": (b"", "cannot be downloaded"),
    "a header line without end": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000, "cannot be down"),
    "101 headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n", "cannot be downloaded"),
    "half a body": (
        response(PICTURE[:50], Content_Length=len(PICTURE)),
        f"broke off after 50 of {len(PICTURE)} bytes",
    ),
    "a bad chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc", "cannot be downloaded",
    ),
    "half a chunk": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc", "cannot be downloaded",
    ),
    "no gzip": (response(b"plain", Content_Encoding="gzip"), "cannot be downloaded"),
    "half a gzip": (
        response(gzip.compress(PICTURE)[:-9], Content_Encoding="gzip"), "content is truncated",
    ),
    "an unknown encoding": (response(b"x", Content_Encoding="br"), "encoded as br"),
    "no content": (response(b"", "204 No Content"), "is empty"),
    "forbidden": (response(b"", "403 Forbidden"), "the server answered 403 Forbidden"),
    "gone": (response(b"", "410"), "the server answered 410"),
    "not modified": (response(b"", "304 Not Modified"), "the server answered 304"),
    "a web page": (
        response(b"<!DOCTYPE html>\n<title>Log in</title>", Content_Type="text/html"),
        "looks like a web page",
    ),
    "to a file": (response(b"", "302 Found", Location="file:///etc/passwd"), "a file: address"),
    "to ftp": (response(b"", "307 Moved", Location="ftp://127.0.0.1/a.png"), "a ftp: address"),
    "to data": (response(b"", "302 Found", Location="data:,x"), "a data: address"),
    "to nowhere": (response(b"", "302 Found", Location="http://[::1/"), "no valid URL"),
    "in a circle": (response(b"", "302 Found", Location="/x"), "redirects more than 10 times"),
    "without a place": (response(b"", "302 Found"), "the server answered 302 Found"),
}  # fmt: skip


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_that_are_no_picture(server: tuple[Server, str], case: str) -> None:
    served, base = server
    served.answers["/x"], reason = ANSWERS[case]
    message = refused(f"{base}/x")
    assert message.startswith(f"{base}/x: ") and reason in message


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", response()[:-50]])
def test_a_server_that_falls_silent_is_not_waited_for(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    served, base = server
    monkeypatch.setattr(fetch, "_TIMEOUT_S", 0.2)
    served.answers["/x"] = answer
    served.may_end.clear()
    assert "timed out" in refused(f"{base}/x")
    served.may_end.set()


def test_large_downloads_are_refused(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, base = server
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 1 << 20)
    served.answers["/x"] = response(bytes((1 << 20) + 1))
    assert "is larger than 1 MiB" in refused(f"{base}/x")
    served.answers["/x"] = response(gzip.compress(bytes(1 << 21)), Content_Encoding="gzip")
    assert "is larger than 1 MiB" in refused(f"{base}/x")


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_compressed_answers_are_unpacked(
    server: tuple[Server, str], pack: Callable[[bytes], bytes]
) -> None:
    served, base = server
    encoding = "gzip" if pack is gzip.compress else "deflate"
    served.answers["/x"] = response(pack(PICTURE), Content_Encoding=encoding)
    np.testing.assert_array_equal(read_image(f"{base}/x"), RGB)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 T", "308 P"])
def test_redirects_are_followed_percent_encoded(server: tuple[Server, str], status: str) -> None:
    served, base = server
    served.answers["/x"] = response(b"", status, Location="/neues bild ä.png".encode().decode("l1"))
    np.testing.assert_array_equal(read_image(f"{base}/x"), RGB)
    assert served.asked[-1][0] == "/neues%20bild%20%C3%A4.png"


def test_credentials_stay_with_their_host(server: tuple[Server, str]) -> None:
    served, base = server
    other = Server()
    with other.running() as elsewhere:
        served.answers["/x"] = response(b"", "302 Found", Location="/y")
        served.answers["/y"] = response(b"", "302 Found", Location=f"{elsewhere}/z")
        read_image(base.replace("//", "//me:secret@") + "/x")
    assert ["authorization" in headers for _, headers in served.asked] == [True, True]
    assert ["authorization" in headers for _, headers in other.asked] == [False]


def test_addresses_keep_ports_and_ipv6() -> None:
    assert Address.of("http://[::1]:8080/a b").url == "http://[::1]:8080/a%20b"
    assert Address.of("HTTP://EXAMPLE.com:80/A").url == "http://example.com:80/A"
    assert Address.of("http://@example.com/a").authorization == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/image http://me:pw@host/a.png", "/image http://host/a.png"),
        ("see https://a@b@c/d@e and f@g", "see https://c/d@e and f@g"),
        ("no@url here", "no@url here"),
    ],
)
def test_credentials_are_left_out_of_texts(text: str, kept: str) -> None:
    assert without_credentials(text) == kept


ENCODED = base64.b64encode(PICTURE).decode()
PERCENT = "".join(f"%{byte:02x}" for byte in PICTURE)


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{ENCODED}",
        f"DATA:image/PNG;BASE64,{ENCODED}",
        f"data:;base64,{ENCODED}",
        f"data:image/png;name=a.png; base64 ,{ENCODED}",
        f"data:image/png;base64,{ENCODED.rstrip('=')}",
        f"data:image/png;base64,{ENCODED.replace('+', '%2B').replace('=', '%3D')}",
        f"data:image/png;base64,{ENCODED.translate(str.maketrans('+/', '-_'))}",
        "data:image/png;base64,\n" + "\n".join(re.findall(".{1,76}", ENCODED)) + "\n",
        f"  data:image/png;base64,{ENCODED}  ",
        f"data:image/png,{PERCENT}",
        f"data:,{PERCENT}",
    ],
)
def test_data_urls(url: str) -> None:
    np.testing.assert_array_equal(read_image(url), RGB)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,####", "valid base64"),
        ("data:image/png;base64,\ud800", "valid base64"),
        ("data:image/png;base64,ä", "valid base64"),
        ("data:image/png;base64,A", "valid base64"),
        ("data:image/png;base64", "has no comma"),
        ("data:", "has no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:,hello", "not a picture"),
        ("data:image/svg+xml,<svg xmlns='x'/>", "SVG drawing"),
        ("data:image/png;base64," + "x" * 3_000_001, "valid base64"),
    ],
)
def test_bad_data_urls_are_one_line(url: str, reason: str) -> None:
    message = refused(url)
    assert message.startswith("the data URL: ") and reason in message

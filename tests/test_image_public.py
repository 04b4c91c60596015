"""Pictures for servers: addresses of the internet alone, and no longer than was allowed."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import ExifTags, Image

from edgevlm.errors import ImageError
from edgevlm.image import picture_size, public, read_image
from edgevlm.image.public import download_public, is_public
from tests.test_image_urls import PICTURE, Server, response


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    served = Server()
    with served.running() as base:
        yield served, base


@pytest.fixture
def open_to_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public, "is_public", lambda address: address == "127.0.0.1")


def fetched(url: str, max_bytes: int = 1 << 20, seconds: float = 30) -> bytes:
    return download_public(url, max_bytes=max_bytes, seconds=seconds)[0]


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.9.9.9 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 100.64.0.1 169.254.169.254
    192.0.2.1 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 fe80::1 fe80::1%eth0 fec0::1
    fd00::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:8.8.8.8 ::127.0.0.1 2002:7f00:1::
    2001:0:7f00:1:: 64:ff9b::7f00:1 64:ff9b:1::a00:1""".split(),
)
def test_addresses_that_are_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "0"]
)
def test_this_machine_is_not_asked(server: tuple[Server, str], host: str) -> None:
    served, base = server
    with pytest.raises(ImageError, match=r"cannot be downloaded \("):
        fetched(f"http://{host}:{base.rpartition(':')[2]}/picture.png")
    assert not served.asked


def test_proxies_are_passed_by(server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    served, base = server
    monkeypatch.setenv("http_proxy", base)
    monkeypatch.setenv("HTTP_PROXY", base)
    with pytest.raises(ImageError, match="not a public one"):
        fetched("http://10.0.0.1/picture.png")
    assert not served.asked


def test_a_host_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(ImageError, match="not a public one"):
        fetched("http://two.example/picture.png")


def test_the_address_that_was_checked_is_connected_to(
    server: tuple[Server, str], open_to_loopback: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that says something else the second time is not asked a second time."""
    served, base = server
    port = int(base.rpartition(":")[2])
    answers = ["127.0.0.1", "10.0.0.1"]
    real = socket.getaddrinfo

    def resolve(host: Any, *args: Any, **options: Any) -> Any:
        return real(answers.pop(0) if host == "rebinding.example" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert fetched(f"http://rebinding.example:{port}/picture.png") == PICTURE
    assert answers == ["10.0.0.1"]
    assert served.asked[0][1]["host"] == f"rebinding.example:{port}"


def test_redirects_are_checked_too(server: tuple[Server, str], open_to_loopback: None) -> None:
    served, base = server
    there = base.replace("127.0.0.1", "127.0.0.2")
    served.answers["/away"] = response(b"", "302 Found", Location=f"{there}/secret")
    served.answers["/near"] = response(b"", "302 Found", Location="/picture.png")
    assert fetched(f"{base}/near") == PICTURE
    with pytest.raises(ImageError, match="not a public one"):
        fetched(f"{base}/away")
    assert [path for path, _ in served.asked] == ["/near", "/picture.png", "/away"]


def test_large_pictures_are_refused(server: tuple[Server, str], open_to_loopback: None) -> None:
    served, base = server
    served.answers["/large"] = response(bytes(2 << 20))
    with pytest.raises(ImageError, match="larger than 1 MiB"):
        fetched(f"{base}/large")


def test_a_server_that_dawdles_is_left(server: tuple[Server, str], open_to_loopback: None) -> None:
    served, base = server
    served.answers["/slow"] = response()[:-1]
    served.may_end.clear()
    with pytest.raises(ImageError, match=r"was not downloaded within 0.05 seconds"):
        fetched(f"{base}/slow", seconds=0.05)
    served.may_end.set()


def test_sizes_are_told_without_decoding() -> None:
    cut = PICTURE[: len(PICTURE) // 2]
    assert picture_size(PICTURE) == picture_size(cut) == (5, 6)
    with pytest.raises(ImageError, match="not a picture"):
        picture_size(b"neither")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_picture(orientation: int) -> None:
    picture, exif, buffer = Image.new("RGB", (8, 5)), Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    picture.save(buffer, "JPEG", exif=exif)
    height, width = read_image(buffer.getvalue()).shape[:2]
    assert picture_size(buffer.getvalue()) == (width, height)

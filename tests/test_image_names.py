"""Pictures named as people, terminals, file managers and other APIs name them, or held open."""

from __future__ import annotations

import base64
import io
import os
import pathlib
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.image import ImageSource, fetch, names, read_image
from edgevlm.image.names import each_located, located

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, which is the home as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def refused(source: object) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(source)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


posix = pytest.mark.skipif(os.name == "nt", reason="backslashes are part of names on Windows")


@posix
@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("my photo.png", "my photo.png"),
        ("my photo.png", r"my\ photo.png"),
        ("my photo.png", "'my photo.png'"),
        ("my photo.png", '"my photo.png"'),
        ("my photo.png", r"my\ photo.png "),
        ("my photo.png", " 'my photo.png' \n"),
        ("my photo.png", "~/my photo.png"),
        ("my photo.png", r"~/my\ photo.png"),
        ("my photo.png", "'file:{folder}/my%20photo.png'"),
        ("a (1).png", r"a\ \(1\).png"),
        ("it's.png", "it's.png"),
        ("it's.png", r"it\'s.png"),
        ("it's.png", r"'it'\''s.png'"),
        ('a "b" & $c;d.png', r"a\ \"b\"\ \&\ \$c\;d.png"),
        ("~photo.png", "~photo.png"),
        ("~photo.png", r"\~photo.png"),
        ("~nobody-of-this-name", "~nobody-of-this-name"),
        (r"back\slash.png", r"back\slash.png"),
        (r"back\slash.png", r"back\\slash.png"),
        (r"my\ photo.png", r"my\ photo.png"),
        ("'quoted'.png", "'quoted'.png"),
        (" spaced .png ", " spaced .png "),
        ("größe 写真.png", r"größe\ 写真.png"),
        ("größe 写真.png", "file://{folder}/gr%C3%B6%C3%9Fe%20%E5%86%99%E7%9C%9F.png"),
        ("a b.png", "file:{folder}/a%20b.png"),
        ("a b.png", "file:a%20b.png"),
        ("a b.png", "FILE://localhost{folder}/a%20b.png"),
        ("a b.png", "file://{host}{folder}/a%20b.png"),
        ("a#b?c.png", "file://{folder}/a#b?c.png"),
        ("a#b?c.png", "file://{folder}/a%23b%3Fc.png"),
        ("100%.png", "file://{folder}/100%.png"),
        ("a%20b.png", "a%20b.png"),
        ("http:picture.png", "http:picture.png"),
        ("data:,picture.png", "data:,picture.png"),
        ("file:picture.png", "file:picture.png"),
    ],
)
def test_names_of_files(folder: Path, file: str, named: str) -> None:
    (folder / file).write_bytes(png())
    named = named.format(folder=folder, host=socket.gethostname()) if "{" in named else named
    np.testing.assert_array_equal(read_image(named), RGB)


@posix
def test_a_file_of_exactly_that_name_wins(folder: Path) -> None:
    Image.fromarray(RGB).save(folder / "my photo.png")
    literal = np.zeros((2, 2, 3), np.uint8)
    Image.fromarray(literal).save(folder / r"my\ photo.png")
    np.testing.assert_array_equal(read_image(r"my\ photo.png"), literal)
    np.testing.assert_array_equal(read_image("my photo.png"), RGB)
    np.testing.assert_array_equal(read_image(pathlib.Path("my photo.png")), RGB)


@posix
def test_a_name_that_is_not_text_in_the_systems_encoding(folder: Path) -> None:
    name = b"caf\xe9.png"
    try:
        with open(name, "wb") as file:
            file.write(png())
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    for source in (os.fsdecode(name), f"file://{folder}/caf%E9.png", os.fsdecode(name) + " "):
        np.testing.assert_array_equal(read_image(source), RGB)
    for entry in os.scandir(os.fsencode(folder)):
        np.testing.assert_array_equal(read_image(entry), RGB)
    assert "no such file" in refused("caf\udce8.png")


def test_backslashes_are_kept_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "nt")
    monkeypatch.setattr(os.path, "exists", lambda path: str(path).startswith("C:"))
    monkeypatch.setattr(names, "Path", str)
    monkeypatch.setattr(urllib.request, "url2pathname", lambda p: p[1:].replace("%20", " "))
    assert located(r"C:\my\new photo.png") == r"C:\my\new photo.png"
    assert located(r'"C:\my\new photo.png"') == r"C:\my\new photo.png"
    assert located("file:///C:/my%20photo.png") == "C:/my photo.png"
    assert each_located(r'"C:\a b.png" C:\c.png') == [r"C:\a b.png", r"C:\c.png"]


@posix
def test_several_names_in_a_line(folder: Path) -> None:
    for name in ("a b.png", "c.png"):
        (folder / name).write_bytes(png())
    both = ["a b.png", "c.png"]
    assert each_located(r"a\ b.png c.png ") == both
    assert each_located(f"'{folder}/a b.png' 'c.png'") == [f"{folder}/a b.png", "c.png"]
    assert each_located("c.png http://host/d.png") == ["c.png", "http://host/d.png"]
    assert each_located("http://host/e.png http://host/d.png")[1] == "http://host/d.png"
    for whole in ("a b.png", "http://host/a b.png", "no such.png", "c.png and more", "it's"):
        assert each_located(whole) == [whole]


def test_names_that_name_nothing(folder: Path) -> None:
    assert refused("nowhere.png") == "nowhere.png: no such file"
    assert refused("'no where.png'") == "'no where.png': no such file"
    assert refused("file:///no%20where.png") == "/no where.png: no such file"
    assert "no such file" in refused("file://elsewhere/a.png")
    assert "no such file" in refused("~nobody-of-this-name/a.png")
    for empty in ("", "  ", "\n"):
        assert refused(empty) == "the picture's name: is empty; name a file or a URL"
    assert "is a folder" in refused(".") and "is a folder" in refused(folder)
    assert "cannot be read" in refused("a\0b.png")
    assert "cannot be read" in refused("\ud800.png")
    assert "cannot be read (File name too long)" in refused("two words " * 1000)
    assert refused("two\nlines.png") == r"two\nlines.png: no such file"
    assert "a URL is passed as a str" in refused(pathlib.Path("https://host/a.png"))


def test_base64_is_not_repeated_and_its_cure_is_named(folder: Path) -> None:
    encoded = base64.b64encode(png()).decode()
    noise = base64.b64encode(np.random.default_rng(0).bytes(3 << 20)).decode()
    for text in (encoded, "/9j/" + noise, noise, noise.replace("+", "-"), encoded[:-4] + "\n"):
        message = refused(text)
        assert message.startswith(f"a text of {len(text)} characters: is base64, not a name")
        assert "data:image/png;base64," in message
        assert "looks like base64 text" in refused(text.encode())
    np.testing.assert_array_equal(read_image("data:image/png;base64," + encoded), RGB)
    assert "base64" not in refused("a" * 200)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO])
def test_bytes_in_any_wrapping(
    kind: Callable[[bytes], ImageSource],
) -> None:
    np.testing.assert_array_equal(read_image(kind(png())), RGB)


def test_open_files_are_read_from_their_start_and_stay_open(folder: Path) -> None:
    (folder / "a.png").write_bytes(png())
    with open("a.png", "rb") as file:
        file.read(5)
        np.testing.assert_array_equal(read_image(file), RGB)
        np.testing.assert_array_equal(read_image(file), RGB)
        assert not file.closed
    with open("a.png", "rb", buffering=0) as file:
        np.testing.assert_array_equal(read_image(file), RGB)
    with tempfile.SpooledTemporaryFile() as file:
        file.write(png())
        np.testing.assert_array_equal(read_image(file), RGB)
    just_saved = io.BytesIO()
    Image.fromarray(RGB).save(just_saved, "PNG")
    np.testing.assert_array_equal(read_image(just_saved), RGB)


@pytest.mark.fault(
    "Pictures",
    "a pipe without end",
    "read as far as a picture may go, then refused",
)
def test_a_pipe_is_read_as_far_as_it_goes() -> None:
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(png())
    with open(reading, "rb") as file:
        np.testing.assert_array_equal(read_image(file), RGB)
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(png())
    with open(reading, "rb", buffering=0) as file:
        np.testing.assert_array_equal(read_image(file), RGB)


class Broken:
    """A file whose server went away."""

    name = 7

    def read(self, size: int) -> bytes:
        raise RuntimeError("connection lost")


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "a.png").write_bytes(png())
    with open("a.png", "rb") as file:
        pass
    assert "the open file a.png: cannot be read (seek of closed file)" in refused(file) or (
        "closed file" in refused(file)
    )
    with open("a.png", encoding="latin-1") as text:
        assert 'open it with mode "rb"' in refused(text)
    with open("b.png", "wb") as written:
        assert "cannot be read" in refused(written)
    assert refused(Broken()) == "the open file: cannot be read (connection lost)"
    assert "is empty" in refused(io.BytesIO())


@pytest.mark.parametrize("thing", [None, 5, ["a.png"], {"url": "a.png"}, object()])
def test_other_objects_are_no_pictures(
    thing: object,
) -> None:
    message = refused(thing)
    assert type(thing).__name__ in message and "pass a path, a URL, bytes" in message


def test_files_without_end_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MAX_FILE_BYTES", 1 << 20)
    (folder / "large.png").write_bytes(bytes((1 << 20) + 1))
    assert refused("large.png") == "large.png: is larger than 1 MiB"
    if os.path.exists("/dev/zero"):
        assert refused("/dev/zero") == "/dev/zero: is larger than 1 MiB"


def test_long_names_are_shortened(folder: Path) -> None:
    message = refused("very/" * 100 + "deep.png")
    assert len(message) < 220 and message.endswith("deep.png: no such file")
    shown = urllib.parse.quote("ä" * 100)
    assert len(refused(f"http://127.0.0.1:9/{shown}")) < 260

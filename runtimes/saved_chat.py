"""A conversation in a file: a zip of `chat.json` and its pictures, as docs/chat.md describes it.

Nothing in it is run or written anywhere: members are read by name, up to a size.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from edgevlm import cleanup, schema
from edgevlm.errors import ChatFileError, ImageError
from edgevlm.image import Picture, read_picture
from edgevlm.image.fetch import MAX_FILE_BYTES
from edgevlm.image.urls import one_line, shortened, without_credentials
from edgevlm.manifest import Manifest
from edgevlm.runtimes.bitmaps import Bitmap
from edgevlm.types import FinishReason, Reply

FORMAT = 1
_MEMBER = "chat.json"
_MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Said:
    """A question, the pictures that came with it, and its answer."""

    question: str
    pictures: list[Bitmap]
    reply: Reply


@dataclass(frozen=True)
class Conversation:
    """A whole conversation: what the model is told of begins at `said[first]`, of which `left_out`
    are the oldest that it is not told; `coming` are the pictures of the next question.
    """

    said: Sequence[Said]
    coming: list[Bitmap]
    first: int
    left_out: int
    system: str | None


@dataclass(frozen=True)
class _Turn:
    question: str
    pictures: tuple[int, ...]
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class _Picture:
    """A member of the zip, and what it was called where it came from."""

    file: str
    source: str = ""


@dataclass(frozen=True)
class _Text:
    """The content of chat.json."""

    format: int
    edgevlm: str
    model: str
    family: str
    n_vocab: int
    turns: tuple[_Turn, ...]
    pictures: tuple[_Picture, ...] = ()
    coming: tuple[int, ...] = ()
    first: int = 0
    left_out: int = 0
    system: str | None = None


def write(file: str | os.PathLike[str], manifest: Manifest, conversation: Conversation) -> None:
    """Writes a conversation, whole or not at all; see Chat.save. Raises ChatFileError."""
    path = Path(file)
    try:
        if path.exists() and not _is_saved_chat(path):
            raise ChatFileError(str(path), "exists and is not a saved chat; choose another name")
        with cleanup.temporary_folder(path.absolute().parent) as folder:
            made = folder / "chat"
            _pack(made, manifest, conversation)
            made.replace(path)
    except OSError as e:
        raise ChatFileError(str(path), f"cannot be written ({e.strerror or one_line(e)})") from None


def _is_saved_chat(path: Path) -> bool:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _MEMBER in archive.namelist()


def _pack(path: Path, manifest: Manifest, conversation: Conversation) -> None:
    numbers: dict[int, int] = {}
    bitmaps: list[Bitmap] = []
    for bitmap in [b for said in conversation.said for b in said.pictures] + conversation.coming:
        if id(bitmap) not in numbers:
            numbers[id(bitmap)] = len(bitmaps)
            bitmaps.append(bitmap)

    def members(shown: Sequence[Bitmap]) -> tuple[int, ...]:
        return tuple(numbers[id(bitmap)] for bitmap in shown)

    names = [f"pictures/{i + 1}" for i in range(len(bitmaps))]
    text = _Text(
        format=FORMAT,
        edgevlm=version("edgevlm"),
        model=manifest.name,
        family=manifest.family,
        n_vocab=manifest.decoder.n_vocab,
        turns=tuple(
            _Turn(
                said.question,
                members(said.pictures),
                said.reply.text,
                said.reply.token_ids,
                said.reply.finish_reason,
            )
            for said in conversation.said
        ),
        pictures=tuple(
            _Picture(name, without_credentials(b.source) if isinstance(b.source, str) else "")
            for name, b in zip(names, bitmaps, strict=True)
        ),
        coming=members(conversation.coming),
        first=conversation.first,
        left_out=conversation.left_out,
        system=conversation.system,
    )
    with zipfile.ZipFile(path, "w") as archive:
        said = json.dumps(schema.plain(text), indent=1).encode()
        archive.writestr(_MEMBER, said, zipfile.ZIP_DEFLATED)
        for name, bitmap in zip(names, bitmaps, strict=True):
            archive.writestr(name, _file(bitmap.picture))


def _file(picture: Picture) -> bytes:
    """The file that a picture was read from, or one of which the same picture is read."""
    if picture.file is not None:
        return picture.file
    drawn = Image.fromarray(picture.rgb)
    if picture.alpha is not None:
        drawn.putalpha(Image.fromarray(picture.alpha))
    elif picture.indexed:
        drawn = _indexed(picture)
    out = io.BytesIO()
    drawn.save(out, "PNG")
    return out.getvalue()


def _indexed(picture: Picture) -> Image.Image:
    """The picture with a palette of exactly its colours."""
    height, width = picture.rgb.shape[:2]
    colours, indices = np.unique(picture.rgb.reshape(-1, 3), axis=0, return_inverse=True)
    drawn = Image.fromarray(indices.reshape(height, width).astype(np.uint8))
    drawn.putpalette(colours.tobytes())
    return drawn


def read(file: str | os.PathLike[str], manifest: Manifest) -> Conversation:
    """Reads a conversation with this model. Raises ChatFileError."""
    path = Path(file)
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpack(archive, path, manifest)
    except FileNotFoundError:
        raise ChatFileError(str(path), "no such file") from None
    except OSError as e:
        raise ChatFileError(str(path), f"cannot be read ({e.strerror or one_line(e)})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise ChatFileError(
            str(path), f"not a saved chat, or damaged ({one_line(e)}); /save writes them"
        ) from None


def _unpack(archive: zipfile.ZipFile, path: Path, manifest: Manifest) -> Conversation:
    text = _text(archive, path)
    if (text.model, text.family) != (manifest.name, manifest.family):
        name = shortened(text.model)
        raise ChatFileError(
            str(path), f"a chat with {name}; go on with it by `edgevlm chat -m {name}`"
        )
    n_vocab = manifest.decoder.n_vocab
    if text.n_vocab != n_vocab or any(
        not 0 <= i < n_vocab for turn in text.turns for i in turn.token_ids
    ):
        raise ChatFileError(str(path), f"a chat with another {manifest.name}, of other tokens")
    bitmaps = [_bitmap(archive, picture, path) for picture in text.pictures]
    numbers = [*text.coming, *(i for turn in text.turns for i in turn.pictures)]
    bounds = 0 <= text.left_out <= text.first <= len(text.turns)
    if not bounds or any(not 0 <= i < len(bitmaps) for i in numbers):
        raise ChatFileError(str(path), "damaged: it names turns or pictures that it has not")
    said = [
        Said(
            turn.question,
            [bitmaps[i] for i in turn.pictures],
            Reply(turn.answer, turn.token_ids, turn.finish_reason),
        )
        for turn in text.turns
    ]
    coming = [bitmaps[i] for i in text.coming]
    return Conversation(said, coming, text.first, text.left_out, text.system)


def _text(archive: zipfile.ZipFile, path: Path) -> _Text:
    try:
        data = json.loads(_member(archive, _MEMBER, _MAX_TEXT_BYTES, path))
        found = data.get("format") if isinstance(data, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise ChatFileError(
                str(path), f"format {found} is newer than {FORMAT}; upgrade edgevlm"
            )
        return schema.read(_Text, data)
    except (ValueError, RecursionError) as e:
        raise ChatFileError(str(path), f"not a saved chat ({one_line(e)})") from None


def _bitmap(archive: zipfile.ZipFile, picture: _Picture, path: Path) -> Bitmap:
    data = _member(archive, picture.file, MAX_FILE_BYTES, path)
    try:
        return Bitmap(read_picture(data), source=picture.source or data)
    except ImageError as e:
        raise ChatFileError(str(path), f"its {shortened(picture.file)} {e.reason}") from None


def _member(archive: zipfile.ZipFile, name: str, most: int, path: Path) -> bytes:
    try:
        with archive.open(name) as member:
            data = member.read(most + 1)
    except KeyError:
        raise ChatFileError(str(path), f"not a saved chat (it has no {shortened(name)})") from None
    if len(data) > most:
        raise ChatFileError(str(path), f"its {shortened(name)} is larger than {most >> 20} MiB")
    return data

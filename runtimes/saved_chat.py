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
from typing import Any

import numpy as np
from PIL import Image

from edgevlm import cleanup, schema
from edgevlm.errors import ChatFileError, ImageError, PromptError
from edgevlm.films import Film
from edgevlm.image import Picture, picture_size, read_picture
from edgevlm.image.fetch import MAX_FILE_BYTES
from edgevlm.image.urls import one_line, shortened, without_credentials
from edgevlm.manifest import Manifest
from edgevlm.runtimes.bitmaps import Bitmap, Clip, Shown
from edgevlm.types import FinishReason, Reply
from edgevlm.video import check_times

FORMAT = 2
# What a conversation without videos is written as, which older versions read.
_WITHOUT_VIDEOS = 1
_MEMBER = "chat.json"
# Pixels of all frames of a video, 1 GiB of RGB: all are in memory at the same time.
_MOST_PIXELS = (1 << 30) // 3
_MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Said:
    """A question, the pictures and videos that came with it, and its answer."""

    question: str
    pictures: list[Shown]
    reply: Reply


@dataclass(frozen=True)
class Conversation:
    """A whole conversation: what the model is told of begins at `said[first]`, of which `left_out`
    are the oldest that it is not told; `coming` is what the next question is about.
    """

    said: Sequence[Said]
    coming: list[Shown]
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
class _Video:
    """Members of the zip that are the frames of a video, seconds from its begin to each of them,
    and what else a Film holds.
    """

    frames: tuple[str, ...]
    times: tuple[float, ...]
    duration: float
    fps: float | None = None


@dataclass(frozen=True)
class _Picture:
    """A member of the zip, or a video, and what it was called where it came from."""

    file: str = ""
    source: str = ""
    video: _Video | None = None


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
    shown: list[Shown] = []
    for one in [s for said in conversation.said for s in said.pictures] + conversation.coming:
        if id(one) not in numbers:
            numbers[id(one)] = len(shown)
            shown.append(one)

    def members(pictures: Sequence[Shown]) -> tuple[int, ...]:
        return tuple(numbers[id(one)] for one in pictures)

    films = any(isinstance(one, Clip) for one in shown)
    named = [_named(one, i + 1, path) for i, one in enumerate(shown)]
    text = _Text(
        format=FORMAT if films else _WITHOUT_VIDEOS,
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
        pictures=tuple(named),
        coming=members(conversation.coming),
        first=conversation.first,
        left_out=conversation.left_out,
        system=conversation.system,
    )
    with zipfile.ZipFile(path, "w") as archive:
        said = json.dumps(_plain(text), indent=1).encode()
        archive.writestr(_MEMBER, said, zipfile.ZIP_DEFLATED)
        for picture, one in zip(named, shown, strict=True):
            frames = one.frames if isinstance(one, Clip) else [one]
            names = picture.video.frames if picture.video else [picture.file]
            for name, frame in zip(names, frames, strict=True):
                archive.writestr(name, _file(frame.picture))


def _plain(text: _Text) -> dict[str, Any]:
    """The content of chat.json; of pictures without what only videos have."""
    data: dict[str, Any] = schema.plain(text)
    for picture in data["pictures"]:
        del picture["file" if picture["video"] else "video"]
    return data


def _named(shown: Shown, number: int, path: Path) -> _Picture:
    """Members and source of a picture or video; raises ChatFileError for what no chat holds."""
    source = without_credentials(shown.source) if isinstance(shown.source, str) else ""
    if isinstance(shown, Bitmap):
        return _Picture(f"pictures/{number}", source)
    film, sizes = shown.film, [frame.size for frame in shown.frames]
    n_pixels = sum(width * height for width, height in sizes)
    if n_pixels > _MOST_PIXELS:
        raise ChatFileError(
            str(path),
            f"the frames of a video have {n_pixels / 1e6:.0f} megapixels together, a saved chat "
            f"{_MOST_PIXELS / 1e6:.0f} at most; VLM.read_video makes them as small as the model "
            "sees them",
        )
    frames = tuple(f"videos/{number}/{i + 1}" for i in range(len(shown.frames)))
    return _Picture("", source, _Video(frames, film.times, film.duration, film.fps))


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
    shown = [_shown(archive, picture, path, manifest) for picture in text.pictures]
    numbers = [*text.coming, *(i for turn in text.turns for i in turn.pictures)]
    bounds = 0 <= text.left_out <= text.first <= len(text.turns)
    if not bounds or any(not 0 <= i < len(shown) for i in numbers):
        raise ChatFileError(str(path), "damaged: it names turns or pictures that it has not")
    said = [
        Said(
            turn.question,
            [shown[i] for i in turn.pictures],
            Reply(turn.answer, turn.token_ids, turn.finish_reason),
        )
        for turn in text.turns
    ]
    coming = [shown[i] for i in text.coming]
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


def _shown(archive: zipfile.ZipFile, picture: _Picture, path: Path, manifest: Manifest) -> Shown:
    if (picture.video is None) == (not picture.file):
        raise ChatFileError(str(path), "damaged: a picture in it is a file or a video")
    if picture.video is not None:
        return _clip(archive, picture.video, picture.source, path, manifest)
    data = _member(archive, picture.file, MAX_FILE_BYTES, path)
    return Bitmap(_read(data, picture.file, path), source=picture.source or data)


def _clip(
    archive: zipfile.ZipFile, video: _Video, source: str, path: Path, manifest: Manifest
) -> Clip:
    known = manifest.prompt.video
    if known is None or len(video.frames) > known.most:
        raise ChatFileError(str(path), "damaged: it has a video that this model is not shown")
    try:
        check_times(len(video.frames), video.times, video.duration, video.fps)
    except PromptError as e:
        raise ChatFileError(str(path), f"damaged: {e}") from None
    frames, n_pixels = list[Bitmap](), 0
    for name in video.frames:
        data = _member(archive, name, MAX_FILE_BYTES, path)
        try:
            width, height = picture_size(data)
        except ImageError as e:
            raise _refused(e, name, path) from None
        n_pixels += width * height
        if n_pixels > _MOST_PIXELS:
            raise ChatFileError(
                str(path), f"its videos have more than {_MOST_PIXELS / 1e6:.0f} megapixels each"
            )
        picture = _read(data, name, path)
        frames.append(Bitmap(picture, source=picture.rgb))
    return Clip(frames, Film(video.times, video.duration, video.fps), source or None)


def _read(data: bytes, name: str, path: Path) -> Picture:
    try:
        return read_picture(data)
    except ImageError as e:
        raise _refused(e, name, path) from None


def _refused(error: ImageError, name: str, path: Path) -> ChatFileError:
    return ChatFileError(str(path), f"its {shortened(name)} {error.reason}")


def _member(archive: zipfile.ZipFile, name: str, most: int, path: Path) -> bytes:
    try:
        with archive.open(name) as member:
            data = member.read(most + 1)
    except KeyError:
        raise ChatFileError(str(path), f"not a saved chat (it has no {shortened(name)})") from None
    if len(data) > most:
        raise ChatFileError(str(path), f"its {shortened(name)} is larger than {most >> 20} MiB")
    return data

"""OpenAI's messages -> those of edgevlm's API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from edgevlm.runtimes.messages import ImagePart, TextPart
from edgevlm.server.pictures import Pictures, VideoFile
from edgevlm.server.problems import invalid, quoted

# Reads the picture of a URL; the second text names the place in the request.
ReadPicture = Callable[[str, str], bytes]

_SYSTEM = ("system", "developer")
# What the answer's message has besides its text, when a client sends it back.
_EMPTY_IN_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls")
_DETAILS = (None, "auto", "low", "high")
_MOST_FPS = 1000


class VideoFilePart(TypedDict):
    """A video in a message whose frames are still to be read."""

    type: Literal["video"]
    video: VideoFile


class ReadMessage(TypedDict):
    """A message as those of edgevlm's API, but for its videos."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart | ImagePart | VideoFilePart]


def read_messages(value: Any, pictures: Pictures) -> list[ReadMessage]:
    """Checked messages, their pictures and videos as the bytes of files. Raises Problem."""
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a list with at least one message", "messages")
    messages = [_message(item, i, pictures) for i, item in enumerate(value)]
    first, *others = messages
    return others if others and _says_nothing(first) else messages


def _says_nothing(message: ReadMessage) -> bool:
    """True for a system message without words: clients send their empty field as one."""
    content = message["content"]
    return message["role"] == "system" and isinstance(content, str) and not content.strip()


def _message(item: Any, i: int, pictures: Pictures) -> ReadMessage:
    where = f"messages[{i}]"
    if not isinstance(item, Mapping):
        raise invalid(f"{where} must be an object with a role and content", where)
    role = item.get("role")
    if role in _SYSTEM and i:
        raise invalid(
            f"{where} has the role {role!r}, which only the first message may have",
            f"{where}.role",
            "unsupported_role",
        )
    if role not in ("user", "assistant", *_SYSTEM):
        raise invalid(
            f"{where} has the role {quoted(role)}; use 'system', 'user' or 'assistant'",
            f"{where}.role",
            "unsupported_role",
        )
    unknown = [
        key
        for key, given in item.items()
        if key not in ("role", "content") and not (key in _EMPTY_IN_ANSWERS and not given)
    ]
    if unknown:
        raise invalid(
            f"{where} has {quoted(unknown[0])}, which is not supported here; leave it out",
            f"{where}.{unknown[0]}",
            "unsupported_parameter",
        )
    return {
        "role": "system" if role in _SYSTEM else role,
        "content": _content(item.get("content"), f"{where}.content", pictures),
    }


def _content(
    content: Any, where: str, pictures: Pictures
) -> str | list[TextPart | ImagePart | VideoFilePart]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(f"{where} must be a text or a list of parts", where)
    return [_part(part, f"{where}[{i}]", pictures) for i, part in enumerate(content)]


def _part(part: Any, where: str, pictures: Pictures) -> TextPart | ImagePart | VideoFilePart:
    if not isinstance(part, Mapping) or part.get("type") != "video_url":
        return read_part(part, where, pictures.read, "'text', 'image_url' or 'video_url'")
    named, inside = part.get("video_url"), f"{where}.video_url"
    if not isinstance(named, Mapping):
        raise invalid(f"{inside} must be an object with a url", inside)
    for place, known, given in (
        (inside, ("url", "fps"), named),
        (where, ("type", "video_url", "fps"), part),
    ):
        if unknown := [key for key in given if key not in known]:
            raise invalid(
                f"{place} has {quoted(unknown[0])}, which is not known here; leave it out",
                f"{place}.{quoted(unknown[0])[1:-1]}",
                "unsupported_parameter",
            )
    fps = _fps(named.get("fps"), part.get("fps"), f"{inside}.fps")
    url = _text(named.get("url"), f"{inside}.url")
    return {"type": "video", "video": pictures.read_video(url, fps, f"{inside}.url")}


def _fps(inside: Any, beside: Any, where: str) -> float | None:
    """Frames a second, which servers take in `video_url` or beside it."""
    stated = [fps for fps in (inside, beside) if fps is not None]
    if len(stated) > 1:
        raise invalid(f"{where} stands beside video_url, too; say it once", where)
    for fps in stated:
        number = isinstance(fps, (int, float)) and not isinstance(fps, bool)
        if not number or not 0 < fps < _MOST_FPS:
            raise invalid(
                f"fps is {quoted(fps)}; a number above 0 and below {_MOST_FPS} is wanted", where
            )
    return float(stated[0]) if stated else None


def read_part(
    part: Any, where: str, read_picture: ReadPicture, kinds: str = "'text' or 'image_url'"
) -> TextPart | ImagePart:
    """A checked part of a message, its picture as the bytes of a file; `kinds` are the types that
    it may have. Raises Problem.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    if kind == "image_url":
        named = part.get("image_url")
        inside = f"{where}.image_url"
        if not isinstance(named, Mapping):
            raise invalid(f"{inside} must be an object with a url", inside)
        if named.get("detail") not in _DETAILS:
            raise invalid(
                f"{inside}.detail is {quoted(named['detail'])}; use auto, low or high",
                f"{inside}.detail",
            )
        url = _text(named.get("url"), f"{inside}.url")
        return {"type": "image", "image": read_picture(url, f"{inside}.url")}
    raise invalid(
        f"{where} has the type {quoted(kind)}; use {kinds}",
        f"{where}.type",
        "unsupported_content",
    )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"{where} must be a text", where)
    return value

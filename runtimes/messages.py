"""Messages as callers write them -> checked exchanges and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from edgevlm.errors import PromptError
from edgevlm.image import ImageSource
from edgevlm.prompt import Exchange
from edgevlm.runtimes.bitmaps import ShownSource
from edgevlm.types import Reply
from edgevlm.video import Video

Images = ImageSource | Video | Sequence[ImageSource | Video] | None


class TextPart(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """A picture in a message: a path, URL, bytes, PIL image or array uint8 [h, w, 3]."""

    type: Literal["image"]
    image: ImageSource


class VideoPart(TypedDict):
    """A video in a message, of `VLM.read_video` or made of frames."""

    type: Literal["video"]
    video: Video


Part = TextPart | ImagePart | VideoPart


class Message(TypedDict):
    """A message of the user or the assistant, in the form that other APIs have; a first one may be
    the system's, where the model's template knows such.

    An answer of the model's may be given as its Reply, whose tokens are then read as they were
    said. Pictures and videos stand where the model's template has them, whatever the order in
    `content`.

    >>> question: edgevlm.Message = {
    ...     "role": "user",
    ...     "content": [
    ...         {"type": "image", "image": "photo.png"},
    ...         {"type": "text", "text": "caption en"},
    ...     ],
    ... }
    >>> with edgevlm.load() as vlm:
    ...     print(vlm.ask([question]))
    a red circle, a blue square, a yellow triangle and a green star
    """

    role: Literal["system", "user", "assistant"]
    content: str | Sequence[Part] | Reply


def parted(
    messages: str | Sequence[Message], image: Images, system: str | None = None
) -> tuple[str | None, list[Exchange], list[ShownSource]]:
    """The system message, None for none, the questions with their answers, and the pictures and
    videos of all questions in order, of a conversation or of a question about `image`.

    Raises PromptError unless the messages are the user's and the assistant's in turn, the user's
    first and last, after one of the system's at most.
    """
    if isinstance(messages, str):
        images = list[ShownSource](several(image))
        return system, [Exchange(messages, len(images))], images
    if image is not None:
        raise PromptError("pictures stand in the messages; `image` goes with a question alone")
    said, others = _system(messages)
    if said is not None and system is not None:
        raise PromptError("the first message is the system's; leave out `system`, or that message")
    return said if system is None else system, *_exchanges(others, len(messages) - len(others))


def _system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The text of the system message that comes first, if there is one, and the others."""
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return None, messages
    _check(first, "message 1", {"role", "content"})
    content = first["content"]
    said, seen = (
        (content.text, []) if isinstance(content, Reply) else _content(content, "message 1")
    )
    if seen:
        raise PromptError("message 1 is the system's and cannot have a picture or video")
    return said, messages[1:]


def _exchanges(
    messages: Sequence[Message], before: int
) -> tuple[list[Exchange], list[ShownSource]]:
    """Questions, pictures and videos of messages; `before` messages stood before them."""
    found: list[Exchange] = []
    images: list[ShownSource] = []
    for i, message in enumerate(messages):
        where, role = f"message {before + i + 1}", ("user", "assistant")[i % 2]
        _check(message, where, {"role", "content"})
        if message["role"] != role:
            raise PromptError(
                f"{where} has the role {message['role']!r} where {role!r} must stand; the user and "
                "the assistant speak in turn, after one system message at most"
            )
        content = message["content"]
        said, seen = ("", []) if isinstance(content, Reply) else _content(content, where)
        if role == "user" and isinstance(content, Reply):
            raise PromptError(f"{where} is the user's and cannot be a reply")
        if role == "assistant" and seen:
            raise PromptError(f"{where} is the assistant's and cannot have a picture or video")
        if role == "user":
            found.append(Exchange(said, len(seen)))
            images += seen
        else:
            answer = content if isinstance(content, Reply) else said
            found[-1] = Exchange(found[-1].question, found[-1].n_pictures, answer)
    if not found or found[-1].answer is not None:
        raise PromptError("the last message must be the user's, with the question to answer")
    return found, images


def _content(content: str | Sequence[Part], where: str) -> tuple[str, list[ShownSource]]:
    """The text, and the pictures and videos of a message."""
    if isinstance(content, str):
        return content, []
    text, images = "", list[ShownSource]()
    for part in content:
        kind: Any = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image", "video"):
            raise PromptError(
                f"{where} has a part of the type {kind!r}; use 'text', 'image' or 'video'"
            )
        _check(part, where, {"type", kind})
        if part["type"] == "image":
            images.append(part["image"])
        elif part["type"] == "video":
            if not isinstance(part["video"], Video):
                raise PromptError(
                    f"{where} has a video that is none; VLM.read_video makes one of a file"
                )
            images.append(part["video"])
        else:
            text += part["text"]
    return text, images


def _check(given: object, where: str, keys: set[str]) -> None:
    if not isinstance(given, Mapping) or {*given} != keys:
        found = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise PromptError(f"{where} must have the keys {sorted(keys)}, not {found}")


def several(image: Images) -> Sequence[ImageSource | Video]:
    """The pictures and videos as a list."""
    if image is None:
        return []
    return image if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]


def pictures(image: Images) -> list[ImageSource]:
    """The same where there are pictures alone; raises PromptError for a video."""
    found = [one for one in several(image) if not isinstance(one, Video)]
    if len(found) < len(several(image)):
        raise PromptError("pictures are wanted here; a video comes with a question")
    return found

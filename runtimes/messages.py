"""Messages as callers write them -> checked exchanges and their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from edgevlm.errors import PromptError
from edgevlm.image import ImageSource
from edgevlm.prompt import Exchange, Film
from edgevlm.types import Reply
from edgevlm.video import Video

Images = ImageSource | Sequence[ImageSource] | Video | None


class TextPart(TypedDict):
    """Text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(TypedDict):
    """A picture in a message: a path, URL, bytes, PIL image or array uint8 [h, w, 3]."""

    type: Literal["image"]
    image: ImageSource


class Message(TypedDict):
    """A message of the user or the assistant, in the form that other APIs have; a first one may be
    the system's, where the model's template knows such.

    An answer of the model's may be given as its Reply, whose tokens are then read as they were
    said. Pictures stand where the model's template has them, whatever the order in `content`.

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
    content: str | Sequence[TextPart | ImagePart] | Reply


def parted(
    messages: str | Sequence[Message], image: Images, system: str | None = None
) -> tuple[str | None, list[Exchange], list[ImageSource]]:
    """The system message, None for none, the questions with their answers, and the pictures of all
    questions in order, of a conversation or of a question about `image`.

    Raises PromptError unless the messages are the user's and the assistant's in turn, the user's
    first and last, after one of the system's at most.
    """
    if isinstance(messages, str) and isinstance(image, Video):
        film = Film(tuple(image.times), image.duration, image.fps)
        return system, [Exchange(messages, len(image.frames), film=film)], list(image.frames)
    if isinstance(messages, str):
        images = list(several(image))
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
        raise PromptError("message 1 is the system's and cannot have a picture")
    return said, messages[1:]


def _exchanges(
    messages: Sequence[Message], before: int
) -> tuple[list[Exchange], list[ImageSource]]:
    """Questions and pictures of messages; `before` messages stood before them."""
    found: list[Exchange] = []
    images: list[ImageSource] = []
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
            raise PromptError(f"{where} is the assistant's and cannot have a picture")
        if role == "user":
            found.append(Exchange(said, len(seen)))
            images += seen
        else:
            answer = content if isinstance(content, Reply) else said
            found[-1] = Exchange(found[-1].question, found[-1].n_pictures, answer)
    if not found or found[-1].answer is not None:
        raise PromptError("the last message must be the user's, with the question to answer")
    return found, images


def _content(
    content: str | Sequence[TextPart | ImagePart], where: str
) -> tuple[str, list[ImageSource]]:
    """The text and the pictures of a message."""
    if isinstance(content, str):
        return content, []
    text, images = "", list[ImageSource]()
    for part in content:
        kind: Any = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise PromptError(f"{where} has a part of the type {kind!r}; use 'text' or 'image'")
        _check(part, where, {"type", kind})
        if part["type"] == "image":
            images.append(part["image"])
        else:
            text += part["text"]
    return text, images


def _check(given: object, where: str, keys: set[str]) -> None:
    if not isinstance(given, Mapping) or {*given} != keys:
        found = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise PromptError(f"{where} must have the keys {sorted(keys)}, not {found}")


def several(image: Images) -> Sequence[ImageSource]:
    """The pictures as a list; raises PromptError for a video."""
    if image is None:
        return []
    if isinstance(image, Video):
        raise PromptError("a video goes with a question alone (ask and stream)")
    return image if isinstance(image, (list, tuple)) else [image]  # type: ignore[list-item]

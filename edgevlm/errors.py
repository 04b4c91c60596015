"""Errors, one class for each thing a caller can do differently.

    EdgeVLMError
    ├ BundleError
    │  ├ BundleNotFound     no bundle of that name or in that folder
    │  ├ BundleCorrupt      a file is missing, truncated, edited or foreign
    │  └ BundleTooNew       written by a newer edgevlm
    ├ UnknownFamily         no family reads this model
    ├ ImageError            a picture cannot be had or decoded
    ├ PromptError           the question does not fit the model or the options are not valid
    │  └ ContextOverflow    picture, prompt and answer do not fit the context
    ├ EngineMissing         an optional package or a device is not there
    ├ EngineError           an engine failed on a valid request
    ├ ModelClosed           the model was closed, or loaded before this process was forked
    ├ ChatFileError         a saved conversation cannot be written, read, or is another model's
    ├ BenchError            a measurement failed, or reports cannot be compared
    └ ExportError
       ├ SourceError        the source checkpoint lacks something or holds something unknown
       │  └ HubError        the hub does not give a model, or does not take one
       └ ParityError        the exported model does not answer like its source

Every message is one line that names the thing and ends with what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# No message of our own is nearly as long; a file may hold any text that one repeats.
_LONGEST = 2000


class EdgeVLMError(Exception):
    """The root of all errors that edgevlm raises on purpose. All of them can be pickled."""

    def __str__(self) -> str:
        """The message in one line, without signs that do something to a terminal."""
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]}...{text[-_LONGEST // 3 :]}"
        return text if text.isprintable() else "".join(map(_shown, text))

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by the arguments of __init__, which the message was made of.
        return _restored, (type(self), self.args, self.__dict__)


def _shown(sign: str) -> str:
    # A byte of a path that is no text stays what it is, so that programs find the file.
    if sign.isprintable() or "\ud800" <= sign <= "\udfff":
        return sign
    return sign.encode("unicode_escape").decode()


def _restored(kind: type[EdgeVLMError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class BundleError(EdgeVLMError):
    """A bundle cannot be used."""


class BundleNotFound(BundleError):
    """No bundle where one was named."""


class BundleCorrupt(BundleError):
    """A file of a bundle is not what the manifest says."""

    def __init__(self, file: Path, problem: str) -> None:
        self.file = file
        self.problem = problem
        super().__init__(f"{file}: {problem}; export or download the bundle again")


class BundleTooNew(BundleError):
    """The bundle was written in a format that this version does not know."""

    def __init__(self, file: Path, format: int, known: int) -> None:
        self.file = file
        self.format = format
        super().__init__(
            f"{file}: bundle format {format} is newer than {known}, the newest this edgevlm reads; "
            "upgrade edgevlm"
        )


class UnknownFamily(EdgeVLMError):
    """No family of models goes by this name."""

    def __init__(self, name: str, known: list[str], where: str) -> None:
        self.name = name
        self.known = known
        super().__init__(
            f"{where}: {name!r} is not a known model family; known: {', '.join(known)}"
        )


class ImageError(EdgeVLMError):
    """A picture cannot be read; `source` is what the caller gave, `reason` says why."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(f"{source}: {reason}")


class PromptError(EdgeVLMError):
    """A request that this model cannot answer as it was asked."""


class ContextOverflow(PromptError):
    """The request needs more positions than the decoder has; all sizes in tokens.

    `tiles` are those that the pictures were cut into, `native` says that they kept their size,
    `fps` are frames a second of which a video would fit, where there is one that would.
    """

    def __init__(
        self,
        image: int,
        text: int,
        generated: int,
        context: int,
        tiles: int = 1,
        *,
        native: bool = False,
        fps: float | None = None,
    ) -> None:
        self.image = image
        self.text = text
        self.generated = generated
        self.context = context
        self.fps = fps
        cure = "lower max_tiles or " if tiles > 1 else ""
        if native and image:
            cure = "lower max_pixels or "
        if fps is not None:
            cure = f"take fewer frames of the video (--fps {fps:g}, in Python fps={fps:g}) or "
        super().__init__(
            f"the request needs {image + text + generated} tokens (image {image}, text {text}, "
            f"answer {generated}) and the model's context has {context}; {cure}shorten the prompt "
            "or lower max_tokens"
        )


class EngineMissing(EdgeVLMError):
    """A package or a device that the request needs is not on this machine."""

    def __init__(self, what: str, install: str) -> None:
        self.what = what
        self.install = install
        super().__init__(f"{what}; {install}")


class EngineError(EdgeVLMError):
    """An engine (onnxruntime, llama.cpp) failed on a request that was checked before."""


class OutOfMemory(EngineError):
    """An engine does not get the memory that it needs; `what` it was for."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what}: not enough memory; close other programs, or take a smaller model or precision"
        )


class ModelClosed(EdgeVLMError):
    """The engines of this model are gone, or belong to the process that this one was forked from;
    load the model again.
    """


class ChatFileError(EdgeVLMError):
    """A file with a saved conversation cannot be used; `file` is its path, `problem` says why."""

    def __init__(self, file: str, problem: str) -> None:
        self.file = file
        self.problem = problem
        super().__init__(f"{file}: {problem}")


class BenchError(EdgeVLMError):
    """A latency report cannot be made, read or compared."""


class ExportError(EdgeVLMError):
    """A checkpoint cannot be exported."""


class SourceError(ExportError):
    """The source checkpoint lacks a part or holds one that nobody knows."""


class HubError(SourceError):
    """A model on the Hugging Face hub cannot be had, or a bundle cannot be put there."""


class ParityError(ExportError):
    """A stage of the exported model differs from its source by more than its tolerance."""

    def __init__(self, stage: str, worst: float, tolerance: float, detail: str = "") -> None:
        self.stage = stage
        self.worst = worst
        self.tolerance = tolerance
        where = f" ({detail})" if detail else ""
        super().__init__(
            f"parity: {stage} differs from the source by {worst:.3g}, more than {tolerance:.3g}"
            f"{where}; choose a higher precision or report the checkpoint"
        )

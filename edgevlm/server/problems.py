"""Refusals and failures in the shape of OpenAI's errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from edgevlm.errors import ContextOverflow, EdgeVLMError, ImageError, ModelClosed, PromptError
from edgevlm.image.urls import shortened

log = logging.getLogger("edgevlm.server")


class Problem(Exception):
    """A request that gets an error: its HTTP status, and what `error` says in the body.

    `param` names the parameter at fault, `code` is a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The response that says it."""
        return Json(self.body, self.status, self.headers)


class Json(Response):
    """A response in JSON. Its text is ASCII: what a client sent may hold characters that have no
    place in UTF-8.
    """

    media_type = "application/json"

    def __init__(
        self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(json.dumps(content, allow_nan=False), status_code, headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """A request that cannot be answered as it was sent."""
    return Problem(400, message, param=param, code=code)


def quoted(value: object) -> str:
    """One short line of something that a client sent, for a message."""
    return shortened(repr(value))


def problem_of(error: BaseException) -> Problem:
    """The problem that an exception is to the client. The log has what is for the owner's eyes."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ContextOverflow):
        return invalid(str(error), "messages", "context_length_exceeded")
    if isinstance(error, ImageError):
        return invalid(str(error), "messages", "invalid_image")
    if isinstance(error, PromptError):
        return invalid(str(error), "messages")
    if isinstance(error, ModelClosed):
        return Problem(503, "the model was closed; ask again", code="model_unavailable")
    if isinstance(error, EdgeVLMError):
        log.error("%s", error)
        message = "the engine failed on this request; the server's log says why"
        return Problem(500, message, code="engine_error")
    log.error("a defect of edgevlm", exc_info=error)
    return Problem(500, "the server failed on this request; its log says why", code="defect")

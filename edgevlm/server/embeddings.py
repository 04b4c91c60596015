"""POST /v1/embeddings: texts and pictures become rows of a dual encoder."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anyio import to_thread

from edgevlm.errors import ImageError, PromptError
from edgevlm.runtimes.dual import BATCH, DualEncoder
from edgevlm.runtimes.engines import Float
from edgevlm.server.limits import Limits
from edgevlm.server.messages import ReadPicture, read_part
from edgevlm.server.parameters import json_object, model_name
from edgevlm.server.pictures import Pictures
from edgevlm.server.pool import Pool
from edgevlm.server.problems import Problem, invalid, quoted

# As many as OpenAI takes.
_MOST_INPUTS = 2048
_TEXTS_AT_ONCE = 32
_FORMATS = ("float", "base64")


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked request: texts, and pictures as the bytes of files. `packed` asks for rows as
    base64 of little-endian float32; `dimensions` is the width that is asked for.
    """

    model: str
    inputs: list[str | bytes]
    packed: bool = False
    dimensions: int | None = None


def read_request(body: bytes, read_picture: ReadPicture) -> EmbeddingRequest:
    """Reads a body; blocks while pictures are downloaded. Raises Problem."""
    given = json_object(body)
    for name in given:
        if name not in ("model", "input", "encoding_format", "dimensions", "user"):
            raise invalid(
                f"{quoted(name)} is not a parameter that is known here; leave it out",
                name,
                "unsupported_parameter",
            )
    packed = given.get("encoding_format", "float")
    if packed not in _FORMATS:
        raise invalid("encoding_format must be float or base64", "encoding_format")
    dimensions = given.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise invalid("dimensions must be a whole number of at least 1", "dimensions")
    inputs = _inputs(given.get("input"), read_picture)
    return EmbeddingRequest(model_name(given), inputs, packed == "base64", dimensions)


def _inputs(value: Any, read_picture: ReadPicture) -> list[str | bytes]:
    if isinstance(value, (str, Mapping)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise invalid("input must be a text or a list of texts and pictures", "input")
    if len(value) > _MOST_INPUTS:
        raise invalid(f"input has more than {_MOST_INPUTS} items; send fewer", "input")
    return [_input(item, f"input[{i}]", read_picture) for i, item in enumerate(value)]


def _input(item: Any, where: str, read_picture: ReadPicture) -> str | bytes:
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise invalid(f"{where} must be a text, or a part of a message; token ids are not", where)
    part = read_part(item, where, read_picture)
    if part["type"] == "text":
        return part["text"]
    assert isinstance(part["image"], bytes)
    return part["image"]


class Embeddings:
    """Answers requests."""

    def __init__(self, pool: Pool, limits: Limits) -> None:
        self._pool, self._limits = pool, limits

    async def answer(self, body: bytes) -> dict[str, Any]:
        """The answer to a body, in OpenAI's shape. Raises Problem."""
        asked = await to_thread.run_sync(read_request, body, Pictures(self._limits).read)
        async with self._pool.lease(asked.model) as loaded:
            model = loaded.dual
            if asked.dimensions not in (None, model.spec.width):
                raise invalid(
                    f"dimensions must be {model.spec.width}, as many as {asked.model} has",
                    "dimensions",
                )
            async with loaded.turn:
                rows, n_tokens = await _embedded(model, asked.inputs)
        data = [
            {"object": "embedding", "index": i, "embedding": _written(row, asked.packed)}
            for i, row in enumerate(rows)
        ]
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return {"object": "list", "data": data, "model": asked.model, "usage": usage}


async def _embedded(model: DualEncoder, inputs: list[str | bytes]) -> tuple[Float, int]:
    """The rows of inputs, and how many tokens were read. A request that is given up ends within a
    few of them. Raises Problem.
    """
    rows = np.zeros((len(inputs), model.spec.width), np.float32)
    texts = [i for i, given in enumerate(inputs) if isinstance(given, str)]
    pictures = [i for i, given in enumerate(inputs) if isinstance(given, bytes)]
    n_tokens = 0
    try:
        for some in _batches(texts, _TEXTS_AT_ONCE):
            words = [str(inputs[i]) for i in some]
            n_tokens += await to_thread.run_sync(model.count_tokens, words)
            rows[some] = await to_thread.run_sync(model.embed_text, words)
        for some in _batches(pictures, BATCH):
            rows[some] = await to_thread.run_sync(model.embed_images, [inputs[i] for i in some])
    except (ImageError, PromptError) as e:
        raise _refused(e) from None
    return rows, n_tokens


def _refused(error: ImageError | PromptError) -> Problem:
    code = "invalid_image" if isinstance(error, ImageError) else None
    return invalid(str(error), "input", code)


def _batches(numbers: list[int], size: int) -> list[list[int]]:
    return [numbers[i : i + size] for i in range(0, len(numbers), size)]


def _written(row: Float, packed: bool) -> list[float] | str:
    if packed:
        return base64.b64encode(row.astype("<f4").tobytes()).decode()
    return [float(value) for value in row]

"""Phi-3-Vision, run in float32: its own code written anew, with transformers' CLIP and Phi-3.

Its checkpoints bring code with them, which is not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import files, llava
from edgevlm.templates import IMAGE

# OpenAI's normalisation, the class's own.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_EMBED = r"^model\.vision_embed_tokens\."
_NAMES = (
    (rf"{_EMBED}img_processor\.", "vision."),
    (rf"{_EMBED}img_projection\.0", "projector.linear_1"),
    (rf"{_EMBED}img_projection\.2", "projector.linear_2"),
    (rf"{_EMBED}sub_GN$", "projector.newline"),
    (rf"{_EMBED}glb_GN$", "projector.separator"),
    (r"^", "decoder."),
)


class Reference(llava.Reference):
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._job, self._alone = job, True
        with quiet():
            self._tokenizer = files.tokenizer(job.checkpoint.folder)

    def _names(self) -> llava.Names:
        return _NAMES

    def _canvas(self, image: NDArray[np.uint8]) -> Image.Image:
        """processing_phi3_v.py, HD_transform and padding_336."""
        side = self._job.model.vision.image_size
        stated = files.picture_settings(self._job.checkpoint.folder)
        most = int(self._job.options.settings.get("num_crops", stated.get("num_crops", 1)))
        picture = Image.fromarray(image)
        upright = picture.width < picture.height
        if upright:
            picture = picture.transpose(Image.Transpose.TRANSPOSE)
        ratio = picture.width / picture.height
        scale = 1
        while scale * np.ceil(scale / ratio) <= most:
            scale += 1
        width = (scale - 1) * side
        picture = picture.resize((width, int(width / ratio)), Image.Resampling.BILINEAR)
        height = int(np.ceil(picture.height / side) * side)
        canvas = Image.new("RGB", (width, height), (255, 255, 255))
        canvas.paste(picture, (0, int((height - picture.height) / 2)))
        return canvas.transpose(Image.Transpose.TRANSPOSE) if upright else canvas

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        """processing_phi3_v.py, Phi3VImageProcessor.preprocess; a tile that is all there is is its
        own overview, and stands here once.
        """
        side = self._job.model.vision.image_size
        stated = files.picture_settings(self._job.checkpoint.folder)
        mean, std = (
            torch.tensor(stated.get(key, default))[:, None, None]
            for key, default in (("image_mean", _MEAN), ("image_std", _STD))
        )
        levels = torch.from_numpy(np.array(self._canvas(image))).permute(2, 0, 1).contiguous()
        canvas = levels.float().div(255).sub(mean).div(std)
        whole = F.interpolate(canvas[None], size=(side, side), mode="bicubic")
        rows, columns = canvas.shape[1] // side, canvas.shape[2] // side
        grid = canvas.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
        tiles = grid.reshape(-1, 3, side, side)
        return torch.cat([whole, tiles]) if len(tiles) > 1 else tiles

    def _connected(self, features: Tensor, projector: Mapping[str, Tensor]) -> Tensor:
        """image_embedding_phi3_v.py, reshape_hd_patches_2x2merge, and the maps behind it."""
        n, rows, width = features.shape
        half = math.isqrt(rows) // 2
        squares = features.reshape(n, half, 2, half, 2, width).permute(0, 1, 3, 2, 4, 5)
        return _projected(squares.reshape(n, half * half, 4 * width), projector)

    def _joined(
        self, squares: Tensor, projector: Mapping[str, Tensor], image: NDArray[np.uint8]
    ) -> Tensor:
        """image_embedding_phi3_v.py, hd_feature_transform."""
        side, canvas = self._job.model.vision.image_size, self._canvas(image)
        rows, columns = canvas.height // side, canvas.width // side
        newline = _projected(projector["newline"].reshape(1, -1), projector)
        separator = _projected(projector["separator"].reshape(1, -1), projector)
        parts, n = squares[-rows * columns :], math.isqrt(squares.shape[1])
        grid = parts.reshape(rows, columns, n, n, -1).permute(0, 2, 1, 3, 4)
        lines = _with_ends(grid.reshape(rows * n, columns * n, -1), newline)
        whole = _with_ends(squares[0].reshape(n, n, -1), newline)
        return torch.cat([lines, separator, whole])[None]

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        """processing_phi3_v.py: every chunk by itself, with what the tokenizer adds to it."""
        text = self._job.model.original.replace("{prompt}", prompt)
        before, after = (self._tokenizer(chunk)["input_ids"] for chunk in text.split(IMAGE))
        return before, after


def _projected(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    hidden = F.gelu(F.linear(x, w["linear_1.weight"], w["linear_1.bias"]))
    return F.linear(hidden, w["linear_2.weight"], w["linear_2.bias"])


def _with_ends(grid: Tensor, newline: Tensor) -> Tensor:
    ends = newline[None].expand(len(grid), 1, -1)
    return torch.cat([grid, ends], 1).flatten(0, 1)

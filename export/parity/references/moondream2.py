"""Moondream2 in float32: what its code (vikhyat/moondream at 44146f1, moondream/torch) computes,
written out from the checkpoint's own tensors, names and config.

That code runs without changes in bfloat16 alone; its pictures are rounded to it here, too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from edgevlm.export.components import Job
from edgevlm.export.parity.references import Arrays, ParityRequest

# What moondream/torch/config.py has where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "text": {"n_layers": 24, "n_heads": 32},
    "vision": {
        "enc_n_layers": 27,
        "enc_n_heads": 16,
        "enc_patch_size": 14,
        "crop_size": 378,
        "max_crops": 12,
        "overlap_margin": 4,
    },
    "tokenizer": {
        "bos_id": 0,
        "templates": {"query": {"prefix": [1, 15381, 2], "suffix": [3]}},
    },
}


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        stated = job.checkpoint.configs["config.json"].get("config") or {}
        self.config = {name: {**d, **stated.get(name, {})} for name, d in _DEFAULTS.items()}
        path = job.checkpoint.tokenizer.folder / "tokenizer.json"
        self._tokenizer: Any = Tokenizer.from_file(str(path))
        self._tensors = job.checkpoint.tensors
        self._weights: dict[str, Tensor] = {}

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        self._tokenizer.encode_special_tokens = plain
        return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        template = self.config["tokenizer"]["templates"]["query"]
        asked = [
            *template["prefix"],
            *self.token_ids([request.prompt])[0],
            *template["suffix"],
            *template["suffix"],  # moondream.py adds it once in the list and once behind it
        ]
        with torch.inference_mode():
            pixels, tiling = self.crops(request.image)
            features = self.features(pixels)
            rows = self.project(features, tiling)
            logits = self.logits(rows, [*asked, *tokens.tolist()])[-len(tokens) - 1 :]
        if tiling == (1, 1):
            # The one crop is the overview once more.
            pixels, features = pixels[:1], features[:1]
        begin = self.config["tokenizer"]["bos_id"]
        return {
            "pixels": pixels.numpy(),
            "features": features.numpy(),
            "embeddings": rows[None].numpy(),
            "prompt_ids": np.array([begin, *asked], np.int32),
            "logits": logits.numpy(),
        }

    def bins(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """See references.RegionSource."""
        with torch.inference_mode():
            rows = torch.from_numpy(hidden)
            found = [self.mlp(f"region.{kind}_decoder", rows) for kind in ("coord", "size")]
            logits: NDArray[np.float32] = torch.cat(found, -1).numpy()
        return logits

    def rows(self, places: NDArray[np.float32]) -> NDArray[np.float32]:
        """See references.RegionSource."""
        with torch.inference_mode():
            given = torch.from_numpy(places)
            found = [self.row("coord", given[:, :1]), self.row("size", given[:, 1:])]
            rows: NDArray[np.float32] = torch.stack(found, 1).numpy()
        return rows

    def row(self, kind: str, values: Tensor) -> Tensor:
        """Rows of places or sizes, for the decoder to read (region.py, fourier_features)."""
        angles = 2 * math.pi * values @ self.weight(f"region.{kind}_features")
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return self.linear(f"region.{kind}_encoder", waves)

    def weight(self, name: str) -> Tensor:
        """A tensor in float32 by its name behind "model."."""
        if name not in self._weights:
            found = self._tensors[f"model.{name}"].float32()
            self._weights[name] = torch.from_numpy(found.copy())
        return self._weights[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear map with its bias."""
        return F.linear(x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        """A LayerNorm with torch's own epsilon."""
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return F.layer_norm(x, bias.shape, weight, bias)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        """Two linear maps around GELU's tanh form."""
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x), approximate="tanh"))

    def crops(self, image: NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int]]:
        """Pixels [1 + crops, 3, side, side], the overview first, and rows and columns of crops."""
        vision = self.config["vision"]
        side, patch = vision["crop_size"], vision["enc_patch_size"]
        margins = 2 * vision["overlap_margin"] * patch
        window = (side // patch - 2 * vision["overlap_margin"]) * patch
        height, width = image.shape[:2]
        rows, columns = tiling(height - margins, width - margins, window, vision["max_crops"])
        picture = Image.fromarray(image)

        def resized(size: tuple[int, int]) -> NDArray[np.uint8]:
            return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))

        canvas = resized((columns * window + margins, rows * window + margins))
        crops = [resized((side, side))]
        for y in range(rows):
            for x in range(columns):
                crop = canvas[y * window : y * window + side, x * window : x * window + side]
                crops.append(crop)
        stacked = torch.from_numpy(np.transpose(np.stack(crops), (0, 3, 1, 2)).copy())
        pixels = stacked.to(torch.bfloat16).div_(255.0).sub_(0.5).div_(0.5)
        return pixels.float(), (rows, columns)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels [n, 3, side, side] -> [n, patches, width]."""
        vision = self.config["vision"]
        p, heads = vision["enc_patch_size"], vision["enc_n_heads"]
        n, channels, height, width = pixels.shape
        x = pixels.reshape(n, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        x = self.linear("vision.patch_emb", x.reshape(n, -1, channels * p * p))
        x = x + self.weight("vision.pos_emb")
        for i in range(vision["enc_n_layers"]):
            block = f"vision.blocks.{i}"
            x = x + self._seeing(f"{block}.attn", self.norm(f"{block}.ln1", x), heads)
            x = x + self.mlp(f"{block}.mlp", self.norm(f"{block}.ln2", x))
        return self.norm("vision.post_ln", x)

    def _seeing(self, name: str, x: Tensor, heads: int) -> Tensor:
        q, k, v = (
            torch.unflatten(part, -1, (heads, -1)).transpose(1, 2)
            for part in self.linear(f"{name}.qkv", x).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.linear(f"{name}.proj", out.transpose(1, 2).flatten(2))

    def project(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of the overview and of all crops -> rows [patches, n_embd] for the decoder."""
        side = math.isqrt(features.shape[1])
        whole = self._reconstructed(torch.unflatten(features[1:], 1, (side, side)), grid)
        pooled = F.adaptive_avg_pool2d(whole.permute(2, 0, 1), (side, side)).permute(1, 2, 0)
        both = torch.cat([features[0], pooled.flatten(0, 1)], -1)
        return self.mlp("vision.proj_mlp", both)

    def _reconstructed(self, crops: Tensor, grid: tuple[int, int]) -> Tensor:
        rows, columns = grid
        margin, side = self.config["vision"]["overlap_margin"], crops.shape[1]
        window = side - 2 * margin
        whole = torch.zeros(
            rows * window + 2 * margin, columns * window + 2 * margin, crops.shape[-1]
        )
        for i, crop in enumerate(crops):
            y, x = divmod(i, columns)
            top, left = (0 if y == 0 else margin), (0 if x == 0 else margin)
            bottom = side if y == rows - 1 else side - margin
            right = side if x == columns - 1 else side - margin
            whole[
                y * window + top : y * window + bottom, x * window + left : x * window + right
            ] = crop[top:bottom, left:right]
        return whole

    def hidden(self, rows: Tensor, prefix: int) -> Tensor:
        """Rows [n, n_embd], the first `prefix` of which see one another -> what lm_head reads."""
        text = self.config["text"]
        heads, n = text["n_heads"], len(rows)
        mask = torch.tril(torch.ones(n, n, dtype=torch.bool))
        mask[:prefix, :prefix] = True
        x = rows[None]
        for i in range(text["n_layers"]):
            block = f"text.blocks.{i}"
            y = self.norm(f"{block}.ln", x)
            q, k, v = (
                torch.unflatten(part, -1, (heads, -1)).transpose(1, 2)
                for part in self.linear(f"{block}.attn.qkv", y).chunk(3, -1)
            )
            read = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=mask)
            read = self.linear(f"{block}.attn.proj", read.transpose(1, 2).flatten(2))
            x = x + read + self.mlp(f"{block}.mlp", y)
        return x[0]

    def embedded(self, ids: list[int]) -> Tensor:
        """Rows of tokens."""
        return self.weight("text.wte")[torch.tensor(ids, dtype=torch.long)]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden rows."""
        return self.linear("text.lm_head", self.norm("text.post_ln", hidden))

    def logits(self, picture: Tensor | None, ids: list[int]) -> Tensor:
        """Logits after the begin token, the image embeddings and each of the ids."""
        begin = self.embedded([self.config["tokenizer"]["bos_id"]])
        first = begin if picture is None else torch.cat([begin, picture])
        rows = torch.cat([first, self.embedded(ids)])
        return self.head(self.hidden(rows, len(first) if picture is not None else 0))


def tiling(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """Rows and columns of crops (select_tiling)."""
    if height <= window or width <= window:
        return (1, 1)
    least_rows, least_columns = math.ceil(height / window), math.ceil(width / window)
    if least_rows * least_columns > most:
        ratio = math.sqrt(most / (least_rows * least_columns))
        return (
            max(1, math.floor(least_rows * ratio)),
            max(1, math.floor(least_columns * ratio)),
        )
    rows = max(math.floor(math.sqrt(most * height / width)), least_rows)
    columns = max(math.floor(math.sqrt(most * width / height)), least_columns)
    if rows * columns > most:
        if columns > rows:
            columns = math.floor(most / rows)
        else:
            rows = math.floor(most / columns)
    return (max(1, rows), max(1, columns))


def turned(x: Tensor) -> Tensor:
    """Heads [1, heads, n, width] with the first half of their dimensions turned by positions."""
    n, width = x.shape[-2:]
    half = width // 4
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = torch.arange(n, dtype=torch.float32)[:, None] * frequencies
    real, imaginary = x[..., :half], x[..., half : 2 * half]
    cos, sin = angles.cos(), angles.sin()
    out = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return torch.cat([out.flatten(-2), x[..., 2 * half :]], -1)

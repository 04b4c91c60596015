"""LLaVA-NeXT, run in float32: by transformers in its layout, in LLaVA's own part by part."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest, files, llava
from edgevlm.export.parity.references.adapters import Added
from edgevlm.export.parity.references.causal import generated
from edgevlm.parts.mlp import Mlp

_NEWLINE = "image_newline"
# transformers leaves its classes without types.
_hf: Any = transformers

# Names of every release, and 4.57's.
_NAMES = {
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": "model.vision_tower.vision_model.",
    r"^(?:model\.)?multi_modal_projector": "model.multi_modal_projector",
    r"^(?:model\.)?image_newline": "model.image_newline",
}


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._job = job
        own = job.checkpoint.configs["config.json"]["model_type"] != "llava_next"
        self._source = Own(job) if own else Transformed(job, load_processor)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return self._source.token_ids(texts, plain=plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        return self._source.run(request, tokens)


class Transformed:
    """A source in transformers' layout, with its processor."""

    def __init__(self, job: Job, processor: Callable[[Path], Any]) -> None:
        self._job = job
        self._folder = job.checkpoint.folder
        with quiet():
            self._processor = processor(self._folder)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._processor.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            model = load(self._folder)
            if self._job.adapter:
                Added(self._job.adapter.folder, _NAMES.items()).attach(model)
            text = self._text(request.prompt)
            inputs = self._processor(images=request.image, text=text, return_tensors="pt")
            return _seen(model, inputs, tokens)

    def _text(self, prompt: str) -> str:
        """The prompt up to the answer."""
        return self._job.model.original.replace("{prompt}", prompt)


def _seen(model: Any, inputs: Any, tokens: NDArray[np.int32]) -> Arrays:
    """The stages of a picture that a model of transformers reads in tiles."""
    pixels, ids = inputs["pixel_values"][0], inputs["input_ids"]
    config, inner = model.config, model.model
    # The fast way of transformers is all tiles at once.
    states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:]
    embeddings = inner.multi_modal_projector(features)
    (picture,) = inner.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
    rows = model.get_input_embeddings()(ids)
    rows[ids == config.image_token_id] = picture
    return {
        "pixels": pixels.numpy(),
        "features": features.numpy(),
        "embeddings": embeddings.numpy(),
        "prompt_ids": ids[ids != config.image_token_id].numpy().astype(np.int32),
        "logits": generated(_Joined(model), rows, tokens),
    }


class _Joined:
    """A model of transformers as its decoder: token embeddings or ids in, logits out."""

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, model.config.text_config

    def __call__(self, **given: Any) -> Any:
        given.pop("logits_to_keep", None)
        out = self._model.model.language_model(**given)
        out.logits = self._model.lm_head(out.last_hidden_state[:, -1:])
        return out


def load_processor(folder: Path) -> Any:
    """transformers' processor with its slow class for pictures, and what older files leave out."""
    config = _hf.AutoConfig.from_pretrained(folder)
    stated = files.processor_settings(folder)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    return _hf.LlavaNextProcessor(
        pictures(folder, "LlavaNextImageProcessor", size={"shortest_edge": side}, crop_size=side),
        files.tokenizer(folder),
        patch_size=stated.get("patch_size", patch),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=stated.get("num_additional_image_tokens", 1),
    )


def pictures(folder: Path, kind: str, **otherwise: Any) -> Any:
    """The folder's picture processor of a slow class, or that class with settings of its own."""
    if files.has_processor(folder):
        return files.picture_processor(folder, kind)
    return getattr(_hf, kind)(**otherwise)


def load(folder: Path) -> Any:
    """The model, whichever release wrote its files."""
    model = files.model("AutoModelForImageTextToText", folder, _config(folder), key_mapping=_NAMES)
    return model


def _config(folder: Path) -> Any:
    config = _hf.AutoConfig.from_pretrained(folder)
    text = config.text_config
    files.set_rotary(text)
    # No row of a prompt is padded; ids of other tables are left over in published files.
    text.pad_token_id = config.pad_token_id = None
    return config


class Own(llava.Reference):
    """LLaVA's own layout, which no release of transformers reads."""

    def _connected(self, features: Tensor, projector: Mapping[str, Tensor]) -> Tensor:
        maps = {name: tensor for name, tensor in projector.items() if name != _NEWLINE}
        return llava.CONNECTORS[Mlp](features, maps)

    def _pixels(self, image: NDArray[np.uint8]) -> Tensor:
        """llava/mm_utils.py, process_anyres_image."""
        picture, processor = Image.fromarray(image), self._processor()
        side = getattr(processor, "crop_size", processor.size)["height"]
        width, height = self._canvas(picture.size, side)
        across, down = width / picture.width, height / picture.height
        if across < down:
            fit = (width, min(math.ceil(picture.height * across), height))
        else:
            fit = (min(math.ceil(picture.width * down), width), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(picture.resize(fit), ((width - fit[0]) // 2, (height - fit[1]) // 2))
        corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
        tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
        squares = [picture.resize((side, side)), *tiles]
        pixels: Tensor = processor(squares, return_tensors="pt")["pixel_values"]
        return pixels.float()

    def _canvas(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """llava/mm_utils.py, select_best_resolution."""
        known = self._job.checkpoint.configs["config.json"]["image_grid_pinpoints"]
        if isinstance(known, str) and "x" in known:
            ends = [tuple(map(int, m)) for m in re.findall(r"\((\d+)x(\d+)\)", known)]
            known = [
                (a * side, b * side)
                for a in range(ends[0][0], ends[-1][0] + 1)
                for b in range(ends[0][1], ends[-1][1] + 1)
            ]
        elif isinstance(known, str):
            known = ast.literal_eval(known)
        best, most, least = (0, 0), 0, math.inf
        for width, height in known:
            scale = min(width / size[0], height / size[1])
            used = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            waste = width * height - used
            if used > most or (used == most and waste < least):
                best, most, least = (width, height), used, waste
        return best

    def _joined(
        self, squares: Tensor, projector: Mapping[str, Tensor], image: NDArray[np.uint8]
    ) -> Tensor:
        """llava/model/llava_arch.py, and LLaVA-NeXT's for anyres_max."""
        config = self._job.checkpoint.configs["config.json"]
        size, pixels = (image.shape[1], image.shape[0]), self._job.model.vision.image_size
        columns, rows = (n // pixels for n in self._canvas(size, pixels))
        whole, parts, side = squares[0], squares[1:], math.isqrt(squares.shape[1])
        grid = parts.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
        grid = grid.flatten(1, 2).flatten(2, 3)
        high, wide = grid.shape[1:]
        if size[0] / size[1] > wide / high:
            edge = (high - int(size[1] * (wide / size[0]))) // 2
            grid = grid[:, edge : high - edge]
        else:
            edge = (wide - int(size[0] * (high / size[1]))) // 2
            grid = grid[:, :, edge : wide - edge]
        if most := re.fullmatch(r"anyres_max_(\d+)", config["image_aspect_ratio"]):
            high, wide = grid.shape[1:]
            times = math.sqrt(high * wide / (int(most[1]) * side**2))
            if times > 1.1:
                small = [int(high // times), int(wide // times)]
                grid = F.interpolate(grid[None], small, mode="bilinear")[0]
        ends = projector[_NEWLINE][:, None, None].expand(*grid.shape[:2], 1)
        lines = torch.cat([grid, ends], 2).flatten(1).T
        return torch.cat([whole, lines])[None]

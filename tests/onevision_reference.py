"""LLaVA-OneVision in its own layout, as LLaVA-NeXT runs it: transformers' SigLIP and Qwen2,
and what is between them written anew.

Reads the checkpoint's own files and knows nothing of edgevlm's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

hf: Any = transformers
Picture = NDArray[np.uint8]
# A conversation: questions, their numbers of pictures, and their answers but for the last.
Turns = Sequence[tuple[str, int, str | None]]
VISION, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
# llava/constants.py, IMAGE_TOKEN_INDEX.
IMAGE = -200


class OwnOriginal:
    """A checkpoint in LLaVA-NeXT's own layout; `heads` are its tower's, of `side` pixels."""

    def __init__(self, folder: Path, heads: int, side: int) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.side = side
        self.tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        weights = _weights(folder)
        named = Path(self.config["mm_vision_tower"])
        self.tower = _tower(weights, _weights(named) if named.is_dir() else {}, heads, side)
        self.projector = {k.removeprefix(PROJECTOR): v for k, v in weights.items()}
        self.newline = weights["model.image_newline"]
        self.decoder = _decoder(self.config, weights)

    def ids(self, turns: Turns, system: str = "You are a helpful assistant.") -> list[int]:
        """The prompt with conv_qwen's words, IMAGE for each picture (tokenizer_image_token)."""
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
        for question, pictures, answer in turns:
            asked = "<image>\n" * pictures + question
            text += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            text += "" if answer is None else f"{answer}<|im_end|>\n"
        found: list[int] = []
        for chunk in text.split("<image>"):
            found += [*self.tokenizer(chunk).input_ids, IMAGE]
        return found[:-1]

    def pixels(self, picture: Picture, alone: bool) -> Tensor:
        """process_images with the config's image_aspect_ratio, or with "pad"."""
        drawn = Image.fromarray(picture)
        if alone:
            return torch.stack([self._preprocess(tile) for tile in self._tiles(drawn)])
        side = max(drawn.size)
        square = Image.new("RGB", (side, side), (int(0.5 * 255),) * 3)
        square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
        return self._preprocess(square)[None]

    def rows(self, picture: Picture, alone: bool) -> Tensor:
        """The embeddings [rows, n_embd] of a picture (prepare_inputs_labels_for_multimodal)."""
        states = self.tower(self.pixels(picture, alone), output_hidden_states=True).hidden_states
        # Of its layers the last one was deleted; no norm.
        features, maps = states[-1], self.projector
        hidden = F.gelu(F.linear(features, maps["0.weight"], maps["0.bias"]))
        tiles = F.linear(hidden, maps["2.weight"], maps["2.bias"])
        if len(tiles) == 1:
            return torch.cat([tiles[0], self.newline[None]])
        return torch.cat([tiles[0], self._lines(tiles[1:], picture.shape[1], picture.shape[0])])

    @torch.no_grad()
    def logits(
        self, turns: Turns, pictures: Sequence[Picture], tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        embed, made = self.decoder.get_input_embeddings(), iter(pictures)
        parts: list[Tensor] = []
        for token in self.ids(turns):
            if token == IMAGE:
                parts.append(self.rows(next(made), len(pictures) == 1))
            else:
                parts.append(embed(torch.tensor([token])))
        parts.append(embed(torch.tensor(list(tokens)).long()))
        out = self.decoder(inputs_embeds=torch.cat(parts)[None], logits_to_keep=len(tokens) + 1)
        found: NDArray[np.float32] = out.logits[0].numpy()
        return found

    def _preprocess(self, picture: Image.Image) -> Tensor:
        """SigLipImageProcessor."""
        processor = hf.SiglipImageProcessor(size={"height": self.side, "width": self.side})
        given = np.asarray(picture)
        pixels: Tensor = processor(given, return_tensors="pt", input_data_format="channels_last")[
            "pixel_values"
        ][0]
        return pixels

    def _tiles(self, picture: Image.Image) -> Iterator[Image.Image]:
        """process_anyres_image."""
        (width, height), side = self.canvas(*picture.size), self.side
        yield picture.resize((side, side))
        across, down = width / picture.width, height / picture.height
        fit = (width, min(math.ceil(picture.height * across), height))
        if across >= down:
            fit = (min(math.ceil(picture.width * down), width), height)
        canvas = Image.new("RGB", (width, height), (0, 0, 0))
        canvas.paste(picture.resize(fit), ((width - fit[0]) // 2, (height - fit[1]) // 2))
        for y in range(0, height, side):
            for x in range(0, width, side):
                yield canvas.crop((x, y, x + side, y + side))

    def canvas(self, width: int, height: int) -> tuple[int, int]:
        """select_best_resolution: a list of widths and heights, or a range of numbers of tiles."""
        known = self.config["image_grid_pinpoints"]
        if isinstance(known, str):
            (a, b), *_, (c, d) = [map(int, m) for m in re.findall(r"\((\d+)x(\d+)\)", known)]
            grids = [(x, y) for x in range(a, c + 1) for y in range(b, d + 1)]
            known = [(x * self.side, y * self.side) for x, y in grids]
        best, most, least = (0, 0), 0, math.inf
        for w, h in known:
            scale = min(w / width, h / height)
            used = min(int(width * scale) * int(height * scale), width * height)
            if used > most or (used == most and w * h - used < least):
                best, most, least = (w, h), used, w * h - used
        return best

    def _lines(self, tiles: Tensor, width: int, height: int) -> Tensor:
        """The map of the tiles without padding, shrunk, every line with the newline."""
        columns, rows = (n // self.side for n in self.canvas(width, height))
        unit = math.isqrt(tiles.shape[1])
        grid = tiles.view(rows, columns, unit, unit, -1).permute(4, 0, 2, 1, 3)
        grid = grid.flatten(1, 2).flatten(2, 3)
        _, h, w = grid.shape
        if width / height > w / h:
            edge = (h - int(height * (w / width))) // 2
            grid = grid[:, edge : h - edge]
        else:
            edge = (w - int(width * (h / height))) // 2
            grid = grid[:, :, edge : w - edge]
        if most := re.fullmatch(r"anyres_max_(\d+)", self.config["image_aspect_ratio"]):
            _, h, w = grid.shape
            times = math.sqrt(h * w / (int(most[1]) * unit**2))
            if times > 1.1:
                small = [int(h // times), int(w // times)]
                grid = F.interpolate(grid[None], small, mode="bilinear")[0]
        ends = self.newline[:, None, None].expand(*grid.shape[:2], 1)
        return torch.cat([grid, ends], 2).flatten(1, 2).T


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor.float() for name, tensor in found.items()}


def _tower(inside: dict[str, Tensor], apart: dict[str, Tensor], heads: int, side: int) -> Any:
    """SigLipVisionTower: of a folder all layers but the last, or what a checkpoint holds."""
    state = {k.removeprefix(VISION): v for k, v in inside.items() if k.startswith(VISION)}
    state = state or {k: v for k, v in apart.items() if k.startswith("vision_model.")}
    layers = 1 + max(int(n.split(".")[3]) for n in state if ".layers." in n)
    last = f"vision_model.encoder.layers.{layers - 1}."
    if apart:
        state, layers = {k: v for k, v in state.items() if not k.startswith(last)}, layers - 1
    patch = state["vision_model.embeddings.patch_embedding.weight"]
    mlp = state["vision_model.encoder.layers.0.mlp.fc1.weight"]
    config = hf.SiglipVisionConfig(
        hidden_size=patch.shape[0],
        intermediate_size=mlp.shape[0],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch.shape[-1],
        vision_use_head=False,
        attn_implementation="eager",
    )
    tower = hf.SiglipVisionModel(config).eval()
    tower.load_state_dict({k: v for k, v in state.items() if ".head." not in k})
    return tower


def _decoder(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    apart = (VISION, PROJECTOR, "model.image_newline")
    state = {k: v for k, v in weights.items() if not k.startswith(apart)}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made = hf.Qwen2Config(**{k: v for k, v in config.items() if k != "model_type"})
    made._attn_implementation = "eager"
    decoder = hf.Qwen2ForCausalLM(made).eval()
    decoder.load_state_dict(state)
    return decoder

"""Phi-3-Vision's published code written anew: modeling_phi3_v.py, image_embedding_phi3_v.py and
processing_phi3_v.py, with nothing of edgevlm and no decoder of transformers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

Picture = NDArray[np.uint8]
_VISION = "model.vision_embed_tokens.img_processor.vision_model."
_EMBED = "model.vision_embed_tokens."
_WHITE = (255, 255, 255)


class Original:
    """A tiny checkpoint as its own code runs it, in float32 on the CPU.

    The code says 336 pixels, patches of 14 and heads of 64; a tiny one has `side` and `patch`.
    """

    def __init__(self, folder: Path, side: int = 32, patch: int = 4) -> None:
        self.side, self.patch = side, patch
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        stated = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        self.num_crops = int(stated["num_crops"])
        self.mean, self.std = stated["image_mean"], stated["image_std"]
        files = sorted(folder.glob("*.safetensors"))
        self.w = {k: v.float() for file in files for k, v in load_file(file).items()}
        loaded: Any = AutoTokenizer
        self.tokenizer = loaded.from_pretrained(folder)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt that the checkpoint's chat template makes."""
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    # processing_phi3_v.py

    def hd_transform(self, picture: Picture) -> Image.Image:
        img = Image.fromarray(picture)
        trans = img.width < img.height
        if trans:
            img = img.transpose(Image.Transpose.TRANSPOSE)
        ratio = img.width / img.height
        scale = 1
        while scale * np.ceil(scale / ratio) <= self.num_crops:
            scale += 1
        scale -= 1
        new_w = int(scale * self.side)
        img = img.resize((new_w, int(new_w / ratio)), Image.Resampling.BILINEAR)
        tar = int(np.ceil(img.height / self.side) * self.side)
        padded = Image.new("RGB", (img.width, tar), _WHITE)
        padded.paste(img, (0, int((tar - img.height) / 2)))
        return padded.transpose(Image.Transpose.TRANSPOSE) if trans else padded

    def pixels(self, picture: Picture) -> tuple[Tensor, tuple[int, int]]:
        """Overview and tiles, and the canvas's height and width."""
        img = torch.from_numpy(np.array(self.hd_transform(picture))).permute(2, 0, 1).contiguous()
        x = img.to(torch.float32).div(255)
        x.sub_(torch.tensor(self.mean).view(-1, 1, 1)).div_(torch.tensor(self.std).view(-1, 1, 1))
        h, w = x.shape[1:]
        s = self.side
        whole = F.interpolate(x[None], size=(s, s), mode="bicubic")
        tiles = x.reshape(1, 3, h // s, s, w // s, s).permute(0, 2, 4, 1, 3, 5)
        return torch.cat([whole, tiles.reshape(-1, 3, s, s)]), (h, w)

    def num_img_tokens(self, picture: Picture) -> int:
        h, w = self.hd_transform(picture).size[::-1]
        rows, columns = h // self.side, w // self.side
        line = self.side // self.patch // 2
        return (rows * columns + 1) * line * line + 1 + (rows + 1) * line

    def input_ids(self, text: str, pictures: Sequence[Picture]) -> list[int]:
        """Token ids, those of the picture N as -N."""
        pattern = r"<\|image_\d+\|>"
        chunks = [self.tokenizer(chunk).input_ids for chunk in re.split(pattern, text)]
        numbers = [int(tag.split("|")[1].split("_")[-1]) for tag in re.findall(pattern, text)]
        assert sorted(set(numbers)) == list(range(1, len(pictures) + 1))
        pads = [[-n] * self.num_img_tokens(pictures[n - 1]) for n in numbers]
        ids: list[int] = []
        for i, chunk in enumerate(chunks):
            ids += chunk
            ids += pads[i] if i < len(pads) else []
        return ids

    # image_embedding_phi3_v.py

    def features(self, pixels: Tensor) -> Tensor:
        """CLIP's hidden state behind the last layer but one, without the class token."""
        w = {k.removeprefix(_VISION): v for k, v in self.w.items() if k.startswith(_VISION)}
        x = F.conv2d(pixels, w["embeddings.patch_embedding.weight"], stride=self.patch)
        x = x.flatten(2).transpose(1, 2)
        first = w["embeddings.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + w["embeddings.position_embedding.weight"]
        x = _norm(x, w, "pre_layrnorm")
        layers = 1 + max(int(k.split(".")[2]) for k in w if k.startswith("encoder.layers."))
        for i in range(layers - 1):
            p = f"encoder.layers.{i}."
            y = _norm(x, w, f"{p}layer_norm1")
            q, k, v = (_split(_linear(y, w, f"{p}self_attn.{n}_proj"), 64) for n in "qkv")
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + _linear(y, w, f"{p}self_attn.out_proj")
            y = _linear(_norm(x, w, f"{p}layer_norm2"), w, f"{p}mlp.fc1")
            x = x + _linear(y * torch.sigmoid(1.702 * y), w, f"{p}mlp.fc2")
        return x[:, 1:]

    def picture_rows(self, picture: Picture) -> Tensor:
        pixels, (h, w) = self.pixels(picture)
        features = self.features(pixels)
        rows, columns = h // self.side, w // self.side
        sub = self._with_newline(self._merge(features[1:], rows, columns))
        whole = self._with_newline(self._merge(features[:1], 1, 1))
        x = torch.cat([sub, self.w[f"{_EMBED}glb_GN"][0], whole])
        x = F.gelu(_linear(x, self.w, f"{_EMBED}img_projection.0"))
        return _linear(x, self.w, f"{_EMBED}img_projection.2")

    def _merge(self, x: Tensor, rows: int, columns: int) -> Tensor:
        n, length, c = x.shape
        side = int(length**0.5)
        x = x.reshape(n, side // 2, 2, side // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(n, -1, 4 * c).reshape(1, rows, columns, side // 2, side // 2, -1)
        x = x.permute(0, 1, 3, 2, 4, 5)
        return x.reshape(rows * side // 2, columns * side // 2, 4 * c)

    def _with_newline(self, x: Tensor) -> Tensor:
        ends = self.w[f"{_EMBED}sub_GN"][0].expand(len(x), 1, -1)
        return torch.cat([x, ends], 1).flatten(0, 1)

    # modeling_phi3_v.py

    def logits(
        self, ids: Sequence[int], pictures: Sequence[Picture], n: int
    ) -> NDArray[np.float32]:
        """Those of the last `n` positions, everything read at once."""
        with torch.inference_mode():
            x = self._embedded(ids, pictures)
            c, w = self.config, self.w
            cos, sin = self._rotary(len(ids))
            heads, d = c["num_attention_heads"], c["hidden_size"]
            kv = c["num_key_value_heads"]
            size = d // heads
            for i in range(c["num_hidden_layers"]):
                p = f"model.layers.{i}."
                y = self._rms(x, f"{p}input_layernorm.weight")
                qkv = y @ w[f"{p}self_attn.qkv_proj.weight"].T
                q, k, v = torch.split(qkv, [d, kv * size, kv * size], -1)
                q, k = (_turned(_split(t[None], size), cos, sin) for t in (q, k))
                v = _split(v[None], size)
                k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                x = x + y.transpose(1, 2).flatten(2)[0] @ w[f"{p}self_attn.o_proj.weight"].T
                y = self._rms(x, f"{p}post_attention_layernorm.weight")
                gate, up = (y @ w[f"{p}mlp.gate_up_proj.weight"].T).chunk(2, -1)
                x = x + (up * F.silu(gate)) @ w[f"{p}mlp.down_proj.weight"].T
            out = self._rms(x[-n:], "model.norm.weight") @ w["lm_head.weight"].T
            found: NDArray[np.float32] = out.numpy()
            return found

    def _embedded(self, ids: Sequence[int], pictures: Sequence[Picture]) -> Tensor:
        table = self.w.get("model.embed_tokens.weight", self.w.get(f"{_EMBED}wte.weight"))
        assert table is not None
        found = torch.tensor(list(ids))
        x = table[found.clamp_min(0)]
        for i, picture in enumerate(pictures):
            x[found == -1 - i] = self.picture_rows(picture)
        return x

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Phi3SuScaledRotaryEmbedding: the factors by the length of the sequence."""
        c = self.config
        original, most = c["original_max_position_embeddings"], c["max_position_embeddings"]
        size = c["hidden_size"] // c["num_attention_heads"]
        kind = "long_factor" if length > original else "short_factor"
        ext = torch.tensor(c["rope_scaling"][kind], dtype=torch.float32)
        shape = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        freq = 1.0 / (ext * c["rope_theta"] ** shape)
        angles = torch.arange(length).float()[:, None] * freq
        scaling = math.sqrt(1 + math.log(most / original) / math.log(original))
        both = torch.cat([angles, angles], -1)
        return both.cos() * scaling, both.sin() * scaling

    def _rms(self, x: Tensor, name: str) -> Tensor:
        eps = self.config["rms_norm_eps"]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * self.w[name]


def _split(x: Tensor, size: int) -> Tensor:
    """[n, length, heads * size] -> [n, heads, length, size]."""
    return x.reshape(*x.shape[:2], -1, size).transpose(1, 2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

"""TinyGPT-V as the original computes it, from the facts: names, order of loading, arithmetic.

Knows the published files and nothing of edgevlm's. Adapters are applied beside their matrices, as
peft runs them, not merged.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Float = npt.NDArray[np.float32]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
LLAMA = "llama_model.model."


class Original:
    """The four downloads in a folder, loaded in the original order: what comes later wins."""

    def __init__(self, folder: Path, *, heads: int, rotary: int, size: int, stage: str) -> None:
        self.heads, self.rotary, self.size = heads, rotary, size
        state = {f"llama_model.{n}": t for n, t in fused(read_phi(folder), heads).items()}
        eva = load(folder / "eva_vit_g.pth")
        state |= {f"visual_encoder.{n}": t for n, t in eva.items()}
        for file in ("blip2_pretrained_flant5xxl.pth", stage):
            saved = load(folder / file)["model"]
            state |= {n.replace("base_model.model.", "").replace(".default", ""): t
                      for n, t in saved.items()}  # fmt: skip
        self.w = {n: t.float() for n, t in state.items()}
        self.depth = 1 + max(int(n.split(".")[2]) for n in self.w if "visual_encoder.blocks" in n)
        self.depth = min(self.depth, 39)
        self.layers = 1 + max(
            int(n.split(".")[3]) for n in self.w if n.startswith(f"{LLAMA}layers")
        )

    def linear(self, x: Tensor, name: str, scale: float = 0.0) -> Tensor:
        """A linear map, and beside it its adapter if it has one; alpha is 16."""
        y = F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))
        down = self.w.get(f"{name}.lora_A.weight")
        if down is None:
            return y
        return y + F.linear(F.linear(x, down), self.w[f"{name}.lora_B.weight"]) * (16 / len(down))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        """LayerNorm, without a bias where the files have none."""
        return F.layer_norm(
            x, x.shape[-1:], self.w[f"{name}.weight"], self.w.get(f"{name}.bias"), eps
        )

    def pixels(self, picture: npt.NDArray[np.uint8]) -> Tensor:
        """Resize to a square, ToTensor, Normalize."""
        small = Image.fromarray(picture).resize((self.size, self.size), Image.Resampling.BICUBIC)
        x = torch.tensor(np.asarray(small)).permute(2, 0, 1).to(torch.float32) / 255
        return ((x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """eva_vit.py's forward_features, then ln_vision."""
        v, w = "visual_encoder.", self.w
        kernel = w[f"{v}patch_embed.proj.weight"]
        x = F.conv2d(pixels, kernel, w[f"{v}patch_embed.proj.bias"], stride=kernel.shape[2:])
        side, x = x.shape[-1], x.flatten(2).transpose(1, 2)
        x = torch.cat([w[f"{v}cls_token"], x], 1) + self._positions(w[f"{v}pos_embed"], side)
        for i in range(self.depth):
            p = f"{v}blocks.{i}."
            q_bias, v_bias = w[f"{p}attn.q_bias"], w[f"{p}attn.v_bias"]
            bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
            y = F.linear(self.norm(x, f"{p}norm1", 1e-6), w[f"{p}attn.qkv.weight"], bias)
            heads = x.shape[-1] // 88
            y = F.scaled_dot_product_attention(
                *y.reshape(*x.shape[:2], 3, heads, 88).permute(2, 0, 3, 1, 4)
            )
            x = x + self.linear(y.transpose(1, 2).flatten(2), f"{p}attn.proj")
            y = F.gelu(self.linear(self.norm(x, f"{p}norm2", 1e-6), f"{p}mlp.fc1"))
            x = x + self.linear(y, f"{p}mlp.fc2")
        return self.norm(x, "ln_vision", 1e-5)

    @staticmethod
    def _positions(table: Tensor, side: int) -> Tensor:
        old = math.isqrt(table.shape[1] - 1)
        if old == side:
            return table
        grid = table[0, 1:].T.reshape(1, -1, old, old)
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    @torch.no_grad()
    def queries(self, features: Tensor) -> Tensor:
        """The Q-Former's output: BERT's layers over the queries, every second reads the picture."""
        bert = "Qformer.bert."
        x = self.norm(self.w["query_tokens"], f"{bert}embeddings.LayerNorm", 1e-12)
        n = sum(name.endswith("intermediate_query.dense.weight") for name in self.w)
        for i in range(n):
            p = f"{bert}encoder.layer.{i}."
            x = self._attend(x, x, f"{p}attention.")
            if i % 2 == 0:
                x = self._attend(x, features, f"{p}crossattention.")
            y = self.linear(F.gelu(self.linear(x, f"{p}intermediate_query.dense")),
                            f"{p}output_query.dense")  # fmt: skip
            x = self.norm(y + x, f"{p}output_query.LayerNorm", 1e-12)
        return x

    def _attend(self, x: Tensor, source: Tensor, p: str) -> Tensor:
        q, k, v = (
            torch.unflatten(self.linear(s, f"{p}self.{n}"), -1, (-1, 64)).transpose(1, 2)
            for n, s in (("query", x), ("key", source), ("value", source))
        )
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(self.linear(read, f"{p}output.dense") + x, f"{p}output.LayerNorm", 1e-12)

    @torch.no_grad()
    def rows(self, picture: npt.NDArray[np.uint8]) -> Tensor:
        """The picture's embeddings [1, queries, width]: two maps, one after the other."""
        x = self.queries(self.features(self.pixels(picture)))
        return self.linear(self.linear(x, "llama_proj"), "llama_proj2")

    @torch.no_grad()
    def logits(
        self, picture: npt.NDArray[np.uint8], ids: tuple[list[int], list[int]], answer: list[int]
    ) -> Float:
        """Logits float32 [1 + len(answer), n_vocab]: after the prompt, then after each token."""
        before, after = (F.embedding(torch.tensor([i], dtype=torch.long),
                                     self.w[f"{LLAMA}embed_tokens.weight"])
                         for i in (ids[0], ids[1] + answer))  # fmt: skip
        h = torch.cat([before, self.rows(picture), after], 1)
        for i in range(self.layers):
            p = f"{LLAMA}layers.{i}."
            x = self.norm(h, f"{p}input_layernorm", 1e-5)
            a = self._phi_attention(x, f"{p}self_attn.")
            a = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6)
            m = F.gelu(self.linear(x, f"{p}mlp.fc1"), approximate="tanh")
            h = a * self.w[f"{p}post_layernorm.weight"] + self.linear(m, f"{p}mlp.fc2") + h
        h = self.norm(h, f"{LLAMA}final_layernorm", 1e-5)[0, -1 - len(answer) :]
        return self.linear(h, "llama_model.lm_head").numpy()

    def _phi_attention(self, x: Tensor, p: str) -> Tensor:
        n, width = x.shape[1], x.shape[2] // self.heads
        # Head by head: its query, its key, its value.
        fused = self.linear(x, f"{p}query_key_value").view(n, self.heads, 3, width)
        q, k, v = fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
        q, k = self.norm(q, f"{p}q_layernorm", 1e-5), self.norm(k, f"{p}k_layernorm", 1e-5)
        q, k = self._turn(q), self._turn(k)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(width)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        read = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(1, n, -1)
        return self.linear(read, f"{p}dense")

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary positions on the first dimensions of every head, halves against each other."""
        half = self.rotary // 2
        speed = 10000.0 ** (-torch.arange(0, self.rotary, 2).float() / self.rotary)
        angle = torch.outer(torch.arange(len(x)).float(), speed)[:, None]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def load(path: Path) -> dict[str, Any]:
    """A .pth file."""
    saved: dict[str, Any] = torch.load(path, weights_only=True)
    return saved


def read_phi(folder: Path) -> dict[str, Tensor]:
    """Phi-2's tensors under the names of its files."""
    from safetensors.torch import load_file

    phi = folder / "phi-2" if (folder / "phi-2").is_dir() else folder
    found: dict[str, Tensor] = {}
    for path in sorted(phi.glob("model*.safetensors")):
        found |= load_file(path)
    for path in sorted(phi.glob("pytorch_model*.bin")):
        found |= load(path)
    return found


def fused(state: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Phi-2 in any layout -> transformers 4.36's, rows fused head by head."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("transformer.") or name.startswith(("lm_head.ln", "lm_head.linear")):
            for old, new in MICROSOFT.items():
                name = name.replace(old, new)
            if "query_key_value" in name:
                value = value.view(3, heads, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 2)
        if ".q_proj." in name:
            parts = [state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            apart = [p.view(heads, -1, *p.shape[1:]) for p in parts]
            name = name.replace("q_proj", "query_key_value")
            value = torch.stack(apart, 1).flatten(0, 2)
        if not any(x in name for x in (".k_proj.", ".v_proj.")):
            out[name] = value
    return out


# transformers 4.36, convert_phi_weights_to_hf.py.
MICROSOFT = {
    "transformer.embd.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    ".ln.": ".input_layernorm.",
    "mixer.Wqkv": "self_attn.query_key_value",
    "mixer.out_proj": "self_attn.dense",
    "lm_head.ln": "model.final_layernorm",
    "lm_head.input_layernorm": "model.final_layernorm",
    "lm_head.linear": "lm_head",
}

"""InternVL in its original layout, whose code transformers has not: its tower and connector as a
few plain operations on the checkpoint's own tensors, its decoder as transformers'.

Written from OpenGVLab/InternVL (internvl_chat/internvl), apart from the exporter's rooms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest, causal, files

# transformers leaves its classes without types.
_hf: Any = transformers
_MEAN, _STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
_SYSTEM_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SYSTEMS = {
    "Hermes-2": _SYSTEM_2,
    "internlm2-chat": _SYSTEM_2,
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，"
        "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
}
CONTEXT = "<IMG_CONTEXT>"


class ChatModel:
    """The model of a folder in the original layout; `weights` are its tensors by their names there.

    `template` is the conversation's where it is not the one that config.json names.
    """

    def __init__(self, folder: Path, weights: Weights, template: str | None = None) -> None:
        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self._template = template or self.config["template"]
        self._system = _system(folder, self.config, self._template)
        self._weights = weights
        with quiet():
            self.tokenizer = _tokenizer(folder)
        self.context: int = self.tokenizer.convert_tokens_to_ids(CONTEXT)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self.tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        with quiet(), torch.inference_mode():
            state = causal.weights(self._weights)
            pixels = self.pixels(request.image)
            found = self.features(state, pixels)
            seen = causal.Seen(pixels, found, self.embeddings(state, found))
            ids = self.ids([f"<image>\n{request.prompt}"], [len(pixels)])
            places = [i for i, token in enumerate(ids) if token == self.context]
            around = ids[: places[0]], ids[places[-1] + 1 :]
            rows = seen._replace(embeddings=seen.embeddings.flatten(0, 1)[None])
            arrays = causal.stages(rows, self.decoder(state), around, tokens)
        return arrays | {"embeddings": seen.embeddings.numpy()}

    def ids(
        self, turns: Sequence[str], tiles: Sequence[int], system: str | None = None
    ) -> list[int]:
        """Token ids of questions with answers between them; each `<image>` is a picture of as many
        tiles. `system` is another system message than the checkpoint's.
        """
        end = "<|im_end|>\n" if self._template == "internvl2_5" else "<|im_end|>"
        text = f"<|im_start|>system\n{self._system if system is None else system}{end}"
        for i, said in enumerate(turns):
            text += f"<|im_start|>{('user', 'assistant')[i % 2]}\n{said}{end}"
        text += "<|im_start|>assistant\n"
        for n in tiles:
            text = text.replace("<image>", f"<img>{CONTEXT * n * self._rows}</img>", 1)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    @property
    def _rows(self) -> int:
        """Image embeddings of a tile."""
        vision = self.config["vision_config"]
        grid = vision["image_size"] // vision["patch_size"]
        return int(grid**2 * self.config["downsample_ratio"] ** 2)

    def pixels(self, picture: NDArray[np.uint8], max_tiles: int | None = None) -> Tensor:
        """A picture's tiles as the models' cards load it, float32 [n, 3, size, size]."""
        size, drawn = self.config["vision_config"]["image_size"], Image.fromarray(picture)
        tiles = [drawn]
        if self.config.get("dynamic_image_size"):
            most = max_tiles or self.config.get("max_dynamic_patch", 6)
            columns, rows = _grid(drawn, size, self.config.get("min_dynamic_patch", 1), most)
            canvas = drawn.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
            corners = [(x * size, y * size) for y in range(rows) for x in range(columns)]
            tiles = [canvas.crop((x, y, x + size, y + size)) for x, y in corners]
            if self.config.get("use_thumbnail") and len(tiles) > 1:
                tiles.append(drawn)
        square = [t.resize((size, size), Image.Resampling.BICUBIC) for t in tiles]
        stacked = torch.from_numpy(np.stack([np.asarray(t) for t in square]))
        # As torchvision's ToTensor and Normalize.
        return (stacked.float() / 255 - _MEAN).div(_STD).permute(0, 3, 1, 2).contiguous()

    def features(self, state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
        """InternViT's features of the patches [n, patches, width]."""
        vision, start = self.config["vision_config"], "vision_model."
        heads, eps = vision["num_attention_heads"], vision["layer_norm_eps"]

        def linear(x: Tensor, name: str) -> Tensor:
            return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(
                x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps
            )

        patch = f"{start}embeddings.patch_embedding."
        weight, bias = state[f"{patch}weight"], state[f"{patch}bias"]
        x = F.conv2d(pixels, weight, bias, stride=vision["patch_size"]).flatten(2).mT
        first = state[f"{start}embeddings.class_embedding"].expand(len(x), -1, -1)
        x = torch.cat([first, x], 1) + state[f"{start}embeddings.position_embedding"]
        for i in range(vision["num_hidden_layers"]):
            layer = f"{start}encoder.layers.{i}."
            q, k, v = linear(norm(x, f"{layer}norm1"), f"{layer}attn.qkv").chunk(3, -1)
            q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
            scores = (q @ k.mT) * q.shape[-1] ** -0.5
            mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + linear(mixed, f"{layer}attn.proj") * state[f"{layer}ls1"]
            inner = F.gelu(linear(norm(x, f"{layer}norm2"), f"{layer}mlp.fc1"))
            x = x + linear(inner, f"{layer}mlp.fc2") * state[f"{layer}ls2"]
        return x[:, 1:]

    def embeddings(self, state: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Image embeddings [n, rows, n_embd] of features."""
        step, side = round(1 / self.config["downsample_ratio"]), round(features.shape[1] ** 0.5)
        grid = features.reshape(len(features), side, side, -1)
        parts = [grid[:, y::step, x::step] for y in range(step) for x in range(step)]
        x = torch.cat(parts, -1).flatten(1, 2)
        x = F.layer_norm(x, x.shape[-1:], state["mlp1.0.weight"], state["mlp1.0.bias"])
        x = F.gelu(F.linear(x, state["mlp1.1.weight"], state["mlp1.1.bias"]))
        return F.linear(x, state["mlp1.3.weight"], state["mlp1.3.bias"])

    def decoder(self, state: Mapping[str, Tensor]) -> Any:
        """The decoder in transformers' class."""
        said, start = dict(self.config["llm_config"]), "language_model."
        weights = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
        if said["architectures"] == ["InternLM2ForCausalLM"]:
            said |= {"attention_bias": said["bias"], "model_type": "llama"}
            config = _hf.LlamaConfig(**said, attn_implementation="eager")
            model, weights = _hf.LlamaForCausalLM(config), _as_llama(weights, config)
        else:
            config = _hf.Qwen2Config(**said, attn_implementation="eager")
            model = _hf.Qwen2ForCausalLM(config)
        model.load_state_dict(weights, strict=not config.tie_word_embeddings)
        return model.eval()


def _as_llama(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """InternLM2's weights under LLaMA's names; wqkv holds, of each group, its heads of queries, one
    of keys and one of values.
    """
    names = {
        "output": "lm_head",
        "tok_embeddings": "embed_tokens",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    out = {}
    for name, tensor in weights.items():
        if "attention.wqkv" in name:
            heads = tensor.reshape(config.num_key_value_heads, -1, config.head_dim, len(tensor.T))
            for x, part in (("q", heads[:, :-2]), ("k", heads[:, -2]), ("v", heads[:, -1])):
                target = name.replace("attention.wqkv", f"self_attn.{x}_proj")
                out[target] = part.reshape(-1, len(tensor.T))
        else:
            for own, theirs in names.items():
                name = re.sub(rf"(^|\.){re.escape(own)}\.weight", rf"\1{theirs}.weight", name)
            out[name] = tensor
    return out


def _grid(drawn: Image.Image, size: int, least: int, most: int) -> tuple[int, int]:
    """Columns and rows of the tiles."""
    width, height = drawn.size
    grids = {(x, y) for x in range(1, most + 1) for y in range(1, most + 1)}
    best, nearest = (1, 1), float("inf")
    for x, y in sorted(
        (g for g in grids if least <= g[0] * g[1] <= most), key=lambda g: g[0] * g[1]
    ):
        distance = abs(width / height - x / y)
        if distance < nearest or (
            distance == nearest and width * height > 0.5 * size * size * x * y
        ):
            best, nearest = (x, y), distance
    return best


def _system(folder: Path, config: Mapping[str, Any], template: str) -> str:
    """The words of the system turn."""
    if "system_message" in config:
        return str(config["system_message"])
    path = folder / "conversation.py"
    text = path.read_text("utf-8") if path.is_file() else ""
    # Comments hold another one.
    code = "\n".join(line for line in text.split("\n") if not line.lstrip().startswith("#"))
    named = re.search(
        rf"name=['\"]{re.escape(template)}['\"].*?system_message='([^']*)'", code, re.S
    )
    return named[1] if named else _SYSTEMS[template]


def _tokenizer(folder: Path) -> Any:
    """The tokenizer, the slow one as in the models' cards where its files are there."""
    if (folder / "tokenizer.model").is_file():
        # InternLM2's class hands texts to SentencePiece as LLaMA's does in its old form.
        return files.tokenizer(folder, "LlamaTokenizer", legacy=True)
    return files.tokenizer(folder, use_fast=not (folder / "vocab.json").is_file())

"""FastVLM as Apple's code runs it, written anew: its tower in the form for training, with every
branch and its batch norm, its pictures and its prompts, and transformers' Qwen2.

Reads the checkpoint's own files and knows nothing of edgevlm's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

hf: Any = transformers
Picture = NDArray[np.uint8]
# A conversation: questions, their numbers of pictures, and their answers but for the last.
Turns = Sequence[tuple[str, int, str | None]]
# llava/constants.py, IMAGE_TOKEN_INDEX.
IMAGE = -200
SYSTEM = "You are a helpful assistant."


class Branch(nn.Sequential):
    """A convolution and a batch norm."""

    def __init__(self, given: int, width: int, side: int, stride: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv2d(given, width, side, stride, side // 2, groups=groups, bias=False)
        self.add_module("conv", conv)
        self.add_module("bn", nn.BatchNorm2d(width))


class MobileOne(nn.Module):
    """mci.py, MobileOneBlock with all its branches, without squeeze and activation."""

    def __init__(
        self, given: int, width: int, side: int, *, stride: int = 1, groups: int = 1,
        scaled: bool = True, convolved: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if given == width and stride == 1:
            self.rbr_skip = nn.BatchNorm2d(given)
        if convolved:
            self.rbr_conv = nn.ModuleList([Branch(given, width, side, stride, groups)])
        if side > 1 and scaled:
            self.rbr_scale = Branch(given, width, 1, stride, groups)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Any] = [m for n, m in self.named_children() if n in ("rbr_skip", "rbr_scale")]
        found += [*getattr(self, "rbr_conv", [])]
        return torch.stack([branch(x) for branch in found]).sum(0)


class LargeKernel(nn.Module):
    """ReparamLargeKernelConv."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.lkb_origin = Branch(given, width, 7, 2, given)
        self.small_conv = Branch(given, width, 3, 2, given)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.lkb_origin(x) + self.small_conv(x))


class PatchEmbed(nn.Module):
    """The way from one stage to the next, of half the sides."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(LargeKernel(given, width), MobileOne(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


class RepCpe(nn.Module):
    """Conditional positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(width, width, 7, 1, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.pe(x)
        return made


class ConvFfn(nn.Module):
    """The net of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Branch(width, width, 7, 1, width)
        self.fc1, self.fc2 = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.fc2(F.gelu(self.fc1(self.conv(x))))
        return made


def scale(width: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(width, 1, 1))


class RepMixer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = MobileOne(width, width, 3, groups=width, scaled=False, convolved=False)
        self.mixer = MobileOne(width, width, 3, groups=width)
        self.layer_scale = scale(width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return made


class MixerBlock(nn.Module):
    """RepMixerBlock."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_mixer, self.convffn = RepMixer(width), ConvFfn(width)
        self.layer_scale = scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        made: Tensor = x + self.layer_scale * self.convffn(x)
        return made


class ChannelNorm(nn.Module):
    """LayerNormChannel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Mhsa(nn.Module):
    """Attention between all pixels, in heads of 32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, d, h, w = x.shape
        rows = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(rows).reshape(n, h * w, 3, d // 32, 32).permute(2, 0, 3, 1, 4)
        scores = ((q * 32**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        rows = self.proj((scores @ v).transpose(1, 2).reshape(n, h * w, d))
        made: Tensor = rows.transpose(1, 2).reshape(n, d, h, w)
        return made


class AttentionBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.token_mixer = ChannelNorm(width), Mhsa(width)
        self.convffn = ConvFfn(width)
        self.layer_scale_1, self.layer_scale_2 = scale(width), scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.token_mixer(self.norm(x))
        made: Tensor = x + self.layer_scale_2 * self.convffn(x)
        return made


class Squeeze(nn.Module):
    """SEBlock."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, int(width * 0.0625), 1)
        self.expand = nn.Conv2d(int(width * 0.0625), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(x, kernel_size=list(x.shape[2:]))
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(y))))


class FastVitHd(nn.Module):
    """fastvithd: five stages, the last two with attention; embeddings are what conv_exp makes."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        first, last = widths[0], widths[-1]
        self.patch_embed = nn.ModuleList(
            [
                MobileOne(3, first, 3, stride=2, scaled=False),
                MobileOne(first, first, 3, stride=2, groups=first, scaled=False),
                MobileOne(first, first, 1),
            ]
        )
        network: list[nn.Module] = []
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if i >= 3:
                network.append(RepCpe(width))
            block = AttentionBlock if i >= 3 else MixerBlock
            network.append(nn.Sequential(*(block(width) for _ in range(depth))))
            if i + 1 < len(widths):
                network.append(PatchEmbed(width, widths[i + 1]))
        self.network = nn.Sequential(*network)
        self.conv_exp = MobileOne(last, 2 * last, 3, groups=last)
        self.conv_exp.se = Squeeze(2 * last)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> features [n, rows, width] (mobileclip_encoder.py, feature_select)."""
        for block in self.patch_embed:
            x = F.gelu(block(x))
        x = self.conv_exp(self.network(x))
        squeeze: Any = self.conv_exp.se
        x = F.gelu(squeeze(x))
        n, d, h, w = x.shape
        return x.reshape(n, d, h * w).transpose(1, 2)


class Original:
    """A checkpoint whose tower is `tower`, in the form for training under Apple's names."""

    def __init__(
        self, folder: Path, tower: dict[str, NDArray[np.float32]],
        widths: Sequence[int], depths: Sequence[int],
    ) -> None:  # fmt: skip
        config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
        self.pads = config.get("image_aspect_ratio") == "pad"
        self.own = config["model_type"] == "llava_qwen2"
        # Apple's code asks for the slow one, which needs vocab.json.
        slow = self.own and (folder / "vocab.json").is_file()
        self.tokenizer = hf.AutoTokenizer.from_pretrained(folder, use_fast=not slow)
        self.tower = FastVitHd(widths, depths).eval()
        # Counts of training lie in the file as any other number here.
        state = {n: torch.from_numpy(v) for n, v in tower.items() if n != "head.proj"}
        self.tower.load_state_dict(state, strict=True)
        found = weights(folder)
        names = ("mm_projector.0", "mm_projector.2")
        if not self.own:
            names = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
        self.maps = [(found[f"model.{name}.weight"], found[f"model.{name}.bias"]) for name in names]
        self.decoder = _decoder(config if self.own else config["text_config"], found)
        side = int(config["mm_vision_tower"].rpartition("_")[2]) if self.own else 0
        self.processor = (
            hf.CLIPImageProcessor(
                crop_size={"height": side, "width": side},
                image_mean=[0.0, 0.0, 0.0],
                image_std=[1.0, 1.0, 1.0],
                size={"shortest_edge": side},
            )
            if self.own
            else hf.CLIPImageProcessor(
                **json.loads((folder / "processor_config.json").read_text("utf-8"))[
                    "image_processor"
                ]
            )
        )

    def ids(self, turns: Turns, system: str = SYSTEM) -> list[int]:
        """conv_qwen_2 and tokenizer_image_token, IMAGE for each picture."""
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
        for question, pictures, answer in turns:
            asked = "<image>\n" * pictures + question
            text += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            text += "" if answer is None else f"{answer}<|im_end|>\n"
        found: list[int] = []
        for chunk in text.split("<image>"):
            found += [*self.tokenizer(chunk).input_ids, IMAGE]
        return found[:-1]

    def chat_ids(self, chat: str, turns: Turns, system: str = "") -> list[int]:
        """The chat template, IMAGE for each picture."""
        messages = [_message("system", system)] if system else []
        for question, pictures, answer in turns:
            messages.append(_message("user", question, pictures))
            if answer is not None:
                messages.append(_message("assistant", answer))
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, chat_template=chat, add_generation_prompt=True
        )
        token = self.tokenizer.convert_tokens_to_ids("<image>")
        return [IMAGE if i == token else i for i in ids]

    def pixels(self, picture: Picture) -> Tensor:
        """process_images of one picture (llava/mm_utils.py)."""
        drawn = Image.fromarray(picture)
        if self.pads:
            drawn = _expand2square(drawn, tuple(int(x * 255) for x in self.processor.image_mean))
        # Told, because it takes one row of pixels for one channel.
        made = self.processor.preprocess(
            np.asarray(drawn), return_tensors="pt", input_data_format="channels_last"
        )
        pixels: Tensor = made["pixel_values"]
        return pixels

    def rows(self, picture: Picture) -> Tensor:
        """The embeddings [rows, n_embd] of a picture."""
        (first, bias), (second, more) = self.maps
        hidden = F.gelu(F.linear(self.tower(self.pixels(picture)), first, bias))
        return F.linear(hidden, second, more)[0]

    @torch.no_grad()
    def logits(
        self, ids: Sequence[int], pictures: Sequence[Picture], tokens: Sequence[int]
    ) -> NDArray[np.float32]:
        """After the prompt and after each token, everything read at once."""
        embed, shown = self.decoder.get_input_embeddings(), iter(pictures)
        parts = [
            self.rows(next(shown)) if token == IMAGE else embed(torch.tensor([token]))
            for token in ids
        ]
        parts.append(embed(torch.tensor(list(tokens)).long()))
        out = self.decoder(inputs_embeds=torch.cat(parts)[None], logits_to_keep=len(tokens) + 1)
        found: NDArray[np.float32] = out.logits[0].numpy()
        return found


def _message(role: str, text: str, pictures: int = 0) -> dict[str, Any]:
    shown = [{"type": "image"}] * pictures
    return {"role": role, "content": [*shown, {"type": "text", "text": text}]}


def _expand2square(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    result = Image.new(picture.mode, (side, side), background)
    corner = (0, (width - height) // 2) if width > height else ((height - width) // 2, 0)
    result.paste(picture, corner)
    return result


def weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {name: tensor.float() for name, tensor in found.items()}


def _decoder(config: dict[str, Any], found: dict[str, Tensor]) -> Any:
    apart = ("model.vision_tower.", "model.mm_projector.", "model.multi_modal_projector.")
    state = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in found.items()
        if not name.startswith(apart)
    }
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    given = {k: v for k, v in config.items() if k not in ("model_type", "rope_parameters")}
    made = hf.Qwen2Config(**given | {"rope_theta": theta})
    made._attn_implementation = "eager"
    decoder = hf.Qwen2ForCausalLM(made).eval()
    decoder.load_state_dict(state)
    return decoder

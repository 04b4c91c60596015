"""The originals of LLaVA's shape: transformers' parts, joined as the original projects join them.

Knows the checkpoint's own names and nothing of edgevlm's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.checkpoints.llava import MEAN, STD, Tiny
from tests.checkpoints.llava_tensors import tensors

Float = npt.NDArray[np.float32]
Weights = dict[str, torch.Tensor]
hf: Any = transformers
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
# palo/conversation.py, conv_vicuna_v1 with the question filled in.
VICUNA = SYSTEM + " USER: <image>\n{} ASSISTANT:"
# By vocabulary; llava/serve/cli.py with mm_use_im_start_end, LLaVA-pp's conversation.py.
TEXTS = {
    "llama": VICUNA,
    "llava1": SYSTEM + " USER: <im_start><image><im_end>\n{} ASSISTANT:",
    "phi3": "<|system|>\nYou are a helpful AI assistant.<|end|>"
    "\n<|user|>\n<image>\n{}<|end|>\n<|assistant|>\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    + SYSTEM
    + "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
VISION = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."


class Original:
    """A checkpoint of the original projects' layout, in float32; its tokenizer is read there."""

    def __init__(self, tiny: Tiny, folder: Path) -> None:
        self.tiny = tiny
        state = {name: self._stored(name, value) for name, value in tensors(tiny).items()}
        self.tower = self._tower({k: v for k, v in state.items() if k.startswith(VISION)})
        self.projector = connector(tiny)
        self.projector.load_state_dict(
            {k.removeprefix(PROJECTOR): v for k, v in state.items() if k.startswith(PROJECTOR)}
        )
        self.decoder = self._decoder(
            {
                k: v
                for k, v in state.items()
                if not k.startswith((VISION, PROJECTOR)) and "inv_freq" not in k
            }
        )
        # llava/model/builder.py: use_fast=False, which a tokenizer of bytes has no class for.
        bytes_only = tiny.vocabulary == "llama3"
        kind = hf.AutoTokenizer if bytes_only else hf.LlamaTokenizer
        self.tokenizer = kind.from_pretrained(folder)

    def _stored(self, name: str, value: Float) -> torch.Tensor:
        """The value as its file rounds it; a tower's own folder keeps float32."""
        exact = self.tiny.tower == "folder" and name.startswith(VISION)
        dtype = torch.float32 if exact else getattr(torch, self.tiny.dtype)
        return torch.from_numpy(value).to(dtype).float()

    def _tower(self, state: Weights) -> nn.Module:
        t = self.tiny
        config = hf.CLIPVisionConfig(
            hidden_size=t.vision_width,
            intermediate_size=t.vision_mlp,
            num_hidden_layers=t.vision_layers,
            num_attention_heads=t.vision_heads,
            image_size=t.size,
            patch_size=t.patch,
            attn_implementation="eager",
        )
        tower: nn.Module = hf.CLIPVisionModel(config).eval()
        tower.load_state_dict({k.removeprefix(VISION): v for k, v in state.items()})
        return tower

    def _decoder(self, state: Weights) -> Any:
        t = self.tiny
        name = {"llava_mistral": "Mistral", "llava_phi": "Phi3"}.get(t.model_type, "Llama")
        config = getattr(hf, f"{name}Config")(
            hidden_size=t.width,
            intermediate_size=t.mlp,
            num_hidden_layers=t.layers,
            num_attention_heads=t.heads,
            num_key_value_heads=t.kv_heads,
            vocab_size=t.n_vocab,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            pad_token_id=None,
            rope_theta=t.text_config.get("rope_theta", 10000.0),
            tie_word_embeddings=t.tied,
            attn_implementation="eager",
        )
        kind = getattr(hf, f"{name}ForCausalLM")
        decoder = kind(config).eval()
        missing, unexpected = decoder.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= ({"lm_head.weight"} if t.tied else set())
        return decoder

    def pixels(self, picture: npt.NDArray[np.uint8]) -> torch.Tensor:
        """The training's preprocessing: padded to a square, then CLIP's own."""
        height, width = picture.shape[:2]
        side = max(height, width)
        square = np.full((side, side, 3), [int(255 * m) for m in MEAN], np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = picture
        processor = hf.CLIPImageProcessor(
            size={"shortest_edge": self.tiny.size},
            crop_size={"height": self.tiny.size, "width": self.tiny.size},
            image_mean=MEAN,
            image_std=STD,
        )
        made = processor(square, return_tensors="pt", input_data_format="channels_last")
        pixels: torch.Tensor = made.pixel_values
        return pixels

    def ids(self, prompt: str, system: str | None = None) -> tuple[list[int], list[int]]:
        """The ids on both sides of the picture: llava/mm_utils.py, tokenizer_image_token; with
        another system message in Conversation.system.
        """
        text = TEXTS[self.tiny.vocabulary].format(prompt)
        if system is not None:
            text = re.sub(f"{SYSTEM}|You are a helpful AI assistant.", system, text)
        before, after = (self.tokenizer(chunk).input_ids for chunk in text.split("<image>"))
        begun = before[0] == self.tokenizer.bos_token_id
        return before, after[int(begun) :]

    @torch.no_grad()
    def logits(self, picture: npt.NDArray[np.uint8], prompt: str, answer: list[int]) -> Float:
        """Logits float32 [1 + len(answer), n_vocab]: after the prompt, then after each token."""
        states = self.tower(self.pixels(picture), output_hidden_states=True).hidden_states
        rows = self.projector(states[-2][:, 1:])
        before, after = self.ids(prompt)
        embed = self.decoder.get_input_embeddings()
        parts = [embed(torch.tensor([before])), rows, embed(torch.tensor([after + answer]))]
        logits = self.decoder(inputs_embeds=torch.cat(parts, 1)).logits[0]
        found: Float = logits[-1 - len(answer) :].numpy()
        return found


def connector(tiny: Tiny) -> nn.Module:
    """The original's module, whose names are the checkpoint's."""
    d, width = tiny.vision_width, tiny.width
    if tiny.projector == "linear":
        return nn.Linear(d, width)
    if tiny.projector == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, width))
    return (LdpNet if tiny.projector == "ldpnet" else LdpNetV2)(d, width)


class LdpNet(nn.Module):
    """MobileVLM's LDPNetProjector, without torchvision and timm."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Identity(), nn.Linear(d, width), nn.GELU(), nn.Linear(width, width))
        blocks = nn.Sequential(nn.Identity(), Block(width, 1), Block(width, 2))
        self.model = nn.ModuleDict({"mlp": mlp, "mb_block": blocks})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.model["mlp"](x)
        n, tokens, width = x.shape
        side = int(tokens**0.5)
        x = self.model["mb_block"](x.permute(0, 2, 1).reshape(n, width, side, side))
        return x.flatten(2).permute(0, 2, 1)


class Block(nn.Module):
    """torchvision's InvertedResidual with squeeze and excitation and hardswish."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), Norm(width)
            ),
            Excitation(width),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), Norm(width)),
        )
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.block[2](self.block[1](F.hardswish(self.block[0](x))))
        return x + y if self.stride == 1 else y


class Excitation(nn.Module):
    """torchvision's SqueezeExcitation with a hard sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, width // 4, 1)
        self.fc2 = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * F.hardsigmoid(gates)


class Norm(nn.GroupNorm):
    """Layer norm over channels, pixel by pixel."""

    def __init__(self, width: int) -> None:
        super().__init__(1, width, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, width, height, side = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, width)
        return super().forward(pixels).reshape(n, height, side, width).permute(0, 3, 1, 2)


class LdpNetV2(nn.Module):
    """MobileVLM V2's LDPNetV2Projector."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        mlp = nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, width))
        self.mlp = nn.ModuleDict({"mlp": mlp})
        peg = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, groups=width))
        self.peg = nn.ModuleDict({"peg": peg})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mlp["mlp"](x)
        n, tokens, width = x.shape
        side = int(tokens**0.5)
        x = F.adaptive_avg_pool2d(x.permute(0, 2, 1).reshape(n, width, side, side), (12, 12))
        x = self.peg["peg"](x) + x
        return x.flatten(2).transpose(1, 2)

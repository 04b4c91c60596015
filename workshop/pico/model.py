"""PaliGemma's architecture in plain torch, sized for a CPU: what is trained, and the reference
for its own export.

Module names follow the published checkpoint layout, so ``state_dict`` keys need no translation.
It knows nothing of scenes or questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workshop.pico.tokenizer import N_VOCAB


@dataclass(frozen=True, slots=True)
class PicoConfig:
    """Sizes of the model."""

    side: int = 112
    patch: int = 14
    vision_width: int = 256
    vision_layers: int = 7
    vision_heads: int = 8
    vision_ff: int = 768
    width: int = 256
    layers: int = 5
    heads: int = 3
    head_dim: int = 64
    ff: int = 512
    vocab: int = N_VOCAB

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.side // self.patch

    @property
    def n_image_tokens(self) -> int:
        """Image tokens before ``<bos>``."""
        return self.grid**2


class _VisionAttention(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        width = config.vision_width
        self.n_heads = config.vision_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        """The heads' outputs, side by side: [n, patches, width]."""
        q, k, v = (
            f(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_proj(self.heads(x))
        return out


class _VisionMlp(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.vision_width, config.vision_ff)
        self.fc2 = nn.Linear(config.vision_ff, config.vision_width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionLayer(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.vision_width, eps=1e-6)
        self.self_attn = _VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.vision_width, eps=1e-6)
        self.mlp = _VisionMlp(config)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [n, patches, width] -> the same."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out

    def log_attention(self, x: Tensor, n_heads: int) -> Tensor:
        """Logarithms of what the first heads look at: [n, heads, patches, patches]."""
        attention, normed = self.self_attn, self.layer_norm1(x)
        size = attention.q_proj.out_features // attention.n_heads
        q, k = (
            f(normed)[..., : n_heads * size].unflatten(-1, (n_heads, size)).transpose(1, 2)
            for f in (attention.q_proj, attention.k_proj)
        )
        return F.log_softmax(q @ k.transpose(-1, -2) * size**-0.5, -1)


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.vision_width, config.patch, stride=config.patch)
        self.position_embedding = nn.Embedding(config.n_image_tokens, config.vision_width)
        self.patch, self.grid = config.patch, config.grid

    def forward(self, pixels: Tensor) -> Tensor:
        # The convolution as one matrix product: several times faster on a CPU, forwards and
        # backwards.
        n, p, g = pixels.shape[0], self.patch, self.grid
        patches = (
            pixels.view(n, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(n, g * g, 3 * p * p)
        )
        weight = self.patch_embedding.weight.flatten(1)
        return F.linear(patches, weight, self.patch_embedding.bias) + self.position_embedding.weight


class _VisionEncoder(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.vision_layers))

    def forward(self, x: Tensor, seen: list[Tensor] | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if seen is not None:
                seen.append(x)
        return x


class _VisionModel(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.embeddings = _VisionEmbeddings(config)
        self.encoder = _VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.vision_width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixels)))
        return out


class _VisionTower(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.vision_model = _VisionModel(config)


class _Projector(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_width, config.width)


class _RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-6)


class _Attention(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.heads, config.head_dim
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x: Tensor, start: int, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        cos, sin = rope
        q = self.q_proj(x[:, start:]).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unsqueeze(1)
        v = self.v_proj(x).unsqueeze(1)
        q = _rotate(q, cos[:, :, start:], sin[:, :, start:])
        k = _rotate(k, cos, sin)
        heads = (-1, self.n_heads, -1, -1)
        mixed = F.scaled_dot_product_attention(
            q, k.expand(*heads), v.expand(*heads), mask[:, :, start:]
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Gemma's gated feed-forward."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ff, bias=False)
        self.up_proj = nn.Linear(config.width, config.ff, bias=False)
        self.down_proj = nn.Linear(config.ff, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        gate = F.gelu(self.gate_proj(x), approximate="tanh")
        out: Tensor = self.down_proj(gate * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.input_layernorm = _RmsNorm(config.width)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _RmsNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, start: int, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Rows before ``start`` serve as keys only and are not returned."""
        mixed = self.self_attn(self.input_layernorm(x), start, rope, mask)
        x = x[:, start:] + mixed
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def log_attention(
        self, x: Tensor, positions: Tensor, mask: Tensor, row: Tensor, column: Tensor, n_heads: int
    ) -> Tensor:
        """Logarithms of what the first heads of some tokens look at: [n, heads, s].

        Of all rows ``x`` [rows, s, width] at ``positions`` int64 [rows, s], with the ``mask`` bool
        [rows, 1, s, s], those at ``row`` and ``column`` int64 [n].
        """
        attention, normed = self.self_attn, self.input_layernorm(x)
        size = attention.head_dim
        cos, sin = _rope(positions, size)
        keys = _rotate(attention.k_proj(normed), cos[:, 0], sin[:, 0])
        weight = attention.q_proj.weight[: n_heads * size]
        queries = torch.unflatten(F.linear(normed[row, column], weight), -1, (n_heads, size))
        queries = _rotate(queries, cos[row, :, column], sin[row, :, column])
        scores = queries @ keys[row].transpose(1, 2) * size**-0.5
        seen = mask[row, 0, column][:, None]
        return F.log_softmax(scores.masked_fill(~seen, -1e9), -1)


class _Decoder(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = _RmsNorm(config.width)


class _LanguageModel(nn.Module):
    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.model = _Decoder(config)


class Pico(nn.Module):
    """SigLIP encoder, linear projector, Gemma decoder; prefix-LM attention comes from the mask
    that is passed.
    """

    def __init__(self, config: PicoConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _VisionTower(config)
        self.multi_modal_projector = _Projector(config)
        self.language_model = _LanguageModel(config)
        self._initialise()

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels float32 [n, 3, side, side] in -1..1 -> patch features [n, patches,
        vision_width].
        """
        out: Tensor = self.vision_tower.vision_model(pixels)
        return out

    def features_and_layers(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The same features, and what every encoder layer made of the patches on the way."""
        tower = self.vision_tower.vision_model
        layers: list[Tensor] = []
        last = tower.encoder(tower.embeddings(pixels), layers)
        return tower.post_layernorm(last), layers

    def image_rows(self, features: Tensor) -> Tensor:
        """Patch features -> decoder input rows [n, patches, width], at the scale of scaled token
        embeddings.
        """
        out: Tensor = self.multi_modal_projector.linear(features)
        return out

    def hidden(
        self,
        image_rows: Tensor,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        seen: list[Tensor] | None = None,
    ) -> Tensor:
        """Final states of the text tokens; ``seen`` takes what every layer made of all rows on the
        way, the last one of the text only.

        ``image_rows`` [n, p, width]; ``ids`` and ``positions`` int64 [n, t], counted from p;
        ``mask`` bool [n, 1, p + t, p + t], True where a row may look. Returns [n, t, width].
        """
        decoder = self.language_model.model
        n, n_image = image_rows.shape[:2]
        text = decoder.embed_tokens(ids) * math.sqrt(self.config.width)
        x = torch.cat([image_rows, text], 1)
        image_positions = torch.arange(n_image).expand(n, -1)
        rope = _rope(torch.cat([image_positions, positions], 1), self.config.head_dim)
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
        for index, layer in enumerate(decoder.layers):
            last = index == len(decoder.layers) - 1
            # Nothing reads what the last layer makes of the image rows.
            x = layer(x, n_image if last else 0, rope, bias)
            if seen is not None:
                seen.append(x)
        out: Tensor = decoder.norm(x)
        return out

    def logits(self, states: Tensor) -> Tensor:
        """States [..., width] -> [..., vocab]; the embeddings are tied."""
        decoder = self.language_model.model
        return F.linear(states, decoder.embed_tokens.weight)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                depth = self.config.vision_layers if "vision" in name else self.config.layers
                residual = name.endswith(("out_proj", "o_proj", "fc2", "down_proj"))
                std = module.weight[0].numel() ** -0.5 / (math.sqrt(2 * depth) if residual else 1)
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(
                    module.weight, std=0.5 if "position" in name else self.config.width**-0.5
                )


def _rope(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of [..., n, head_dim] at int64 positions [n]."""
    cos, sin = _rope(positions[None], x.shape[-1])
    return _rotate(x, cos[0, 0], sin[0, 0])


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in -1..1, as SigLIP wants it."""
    return pictures.permute(0, 3, 1, 2).contiguous().float().mul_(2 / 255).sub_(1)

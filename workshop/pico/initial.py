"""Initial weights of pico."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workshop.pico.model import Pico, to_pixels

# Layers that pico had not at first: the encoder's last and the decoder's third. The two before that
# tell a noun which object it means.
NEW_LAYER = 2
NEW = ("vision_tower.vision_model.encoder.layers.6.", f"language_model.model.layers.{NEW_LAYER}.")
NEW_CHANNELS = 64  # of the decoder's width, its last
_RESIDUAL = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")


def grown(trained: dict[str, Tensor], model: Pico) -> dict[str, Tensor]:
    """Weights of a pico without the layers of NEW and NEW_CHANNELS -> with them, as the model has
    them but silent: the answers are the same until they have learnt something.

    The first head of the decoder's new layer copies, from where it looks, what the new channels
    will hold, and makes it louder: behind the first layers rows are several times louder than the
    picture's were, and what a norm has made small takes long to be heard.
    """
    weights = {
        name: torch.zeros_like(value) if name.endswith(_RESIDUAL) else value
        for name, value in model.state_dict().items()
        if name.startswith(NEW)
    }
    width = model.config.width
    for name, value in trained.items():
        head, found, tail = name.partition("language_model.model.layers.")
        index, _, rest = tail.partition(".")
        if found and int(index) >= NEW_LAYER:
            name = f"{head}{found}{int(index) + 1}.{rest}"
        weights[name] = value if name.startswith("vision_tower.") else _widened(name, value, width)
    size = model.config.head_dim
    taken = torch.zeros_like(weights[f"{NEW[1]}self_attn.v_proj.weight"])
    taken[:, -NEW_CHANNELS:] = 2 * torch.eye(size, NEW_CHANNELS)
    weights[f"{NEW[1]}self_attn.v_proj.weight"] = taken
    put = weights[f"{NEW[1]}self_attn.o_proj.weight"]
    put[-NEW_CHANNELS:, :size] = 16 * torch.eye(NEW_CHANNELS, size)
    for name in weights:
        if name.endswith("layernorm.weight") and not name.startswith("vision_tower."):
            weights[name][-NEW_CHANNELS:] = 3.0
    return weights


def _widened(name: str, value: Tensor, width: int) -> Tensor:
    # Embeddings are multiplied by the root of the width, and norms divide by that of the channels'
    # mean square, of which a quarter is zero now.
    scale = (1 - NEW_CHANNELS / width) ** 0.5
    if name.endswith("layernorm.weight"):
        value = (1 + value) * scale - 1
    if "embed_tokens" in name:
        value = value * scale
    if value.ndim == 1 or name.endswith((*_RESIDUAL, "projector.linear.weight")):
        return torch.cat([value, value.new_zeros(NEW_CHANNELS, *value.shape[1:])])
    return F.pad(value, (0, NEW_CHANNELS))


@torch.no_grad()
def whiten_patches(model: Pico, pictures: np.ndarray) -> None:
    """Starts the patch embedding with the pictures' principal components, all equally strong.

    A patch's mean colour has hundreds of times the variance of its edges; from random weights the
    encoder sees colours only, for tens of thousands of pictures.
    """
    embedding = model.vision_tower.vision_model.embeddings
    p, g = model.config.patch, model.config.grid
    pixels = to_pixels(torch.from_numpy(pictures))
    patches = pixels.view(-1, 3, g, p, g, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * p * p)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    values, vectors = values.flip(0), vectors.flip(1)
    n = model.config.vision_width
    scale = (values[:n] + values[n // 4]).rsqrt()
    weight = vectors[:, :n].T * scale[:, None]
    embedding.patch_embedding.weight.copy_(weight.view_as(embedding.patch_embedding.weight))
    assert embedding.patch_embedding.bias is not None
    embedding.patch_embedding.bias.copy_(-weight @ mean)
    # Positions no louder than the patches that they are added to.
    embedding.position_embedding.weight.mul_(0.4)


@torch.no_grad()
def smooth_places(model: Pico, first_loc: int) -> None:
    """Starts the embeddings of neighbouring places near to one another, so that coordinates need
    not be learnt apart.
    """
    width = model.config.width
    places = torch.arange(1024) / 1023
    frequencies = 0.5 * 2 ** torch.linspace(0, 6, width // 2)
    angles = 2 * torch.pi * places[:, None] * frequencies
    waves = (
        torch.cat([angles.sin(), angles.cos()], 1)
        * torch.cat([1 / frequencies, 1 / frequencies]) ** 0.35
    )
    waves = waves / waves.pow(2).mean().sqrt() * width**-0.5
    model.language_model.model.embed_tokens.weight[first_loc : first_loc + 1024] = waves

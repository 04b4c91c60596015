"""Adds the channels of letters.py to a trained pico: its older channels stay what they were."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workshop.pico.initial import NEW_CHANNELS
from workshop.pico.letters import (
    CHANNELS,
    FF,
    HEAD_DIM,
    HEADS,
    READ_LAYERS,
    LetterChannels,
    Older,
)
from workshop.pico.model import Pico, VisionLayer, to_pixels

# By which the new channels are quieter than they were trained: a norm then divides by what the
# older ones are alone, but for a part in a thousand.
QUIET = 0.05
# By which they are quieter than the older ones behind the last norm: what int8 rounds in them then
# hardly counts among the features, and the projector makes up for it.
QUIET_FEATURES = 0.25
# How loud a word stands in the image rows: as their other channels are, on average.
CODE_LOUDNESS = 2.65


@torch.no_grad()
def older_state(model: Pico, pictures: Tensor) -> Older:
    """uint8 [n, side, side, 3] -> what the letters' channels look at; loudness is absolute."""
    tower = model.vision_tower.vision_model
    x = tower.embeddings(to_pixels(pictures))
    seen, loudness = [x - tower.embeddings.position_embedding.weight], []
    for index, module in enumerate(tower.encoder.layers):
        layer = cast(VisionLayer, module)
        loudness.append(x.std(-1, unbiased=False))
        before = layer.layer_norm1(x)
        heads = layer.self_attn.heads(before)
        x = x + layer.self_attn.out_proj(heads)
        loudness.append(x.std(-1, unbiased=False))
        between = layer.layer_norm2(x)
        x = x + layer.mlp(between)
        if index < READ_LAYERS:
            seen += [before, heads, between]
    loudness.append(x.std(-1, unbiased=False))
    return Older(torch.cat(seen, -1), torch.stack(loudness, -1))


@torch.no_grad()
def widened(model: Pico, letters: LetterChannels, code: nn.Linear, loudness: Tensor) -> Pico:
    """A pico with the new channels, whose code of a word the projector adds to the decoder's
    NEW_CHANNELS. ``loudness`` float32 [2 * layers + 1] is the mean that letters were trained with.

    What the older layers add is centred, which their norms did in any case: so nothing of it
    reaches the new channels when the norm takes the mean of all.
    """
    config = model.config
    wide = Pico(
        replace(
            config,
            vision_width=config.vision_width + CHANNELS,
            vision_heads=config.vision_heads + HEADS,
            vision_ff=config.vision_ff + FF,
        )
    )
    assert config.vision_width == config.vision_heads * HEAD_DIM
    old, new = model.state_dict(), letters.state_dict()
    prefix = "vision_tower.vision_model."
    norms = dict(zip(_norm_names(config.vision_layers), loudness.tolist(), strict=True))
    share = (1 - letters.share) ** 0.5
    weights = {}
    for name, value in old.items():
        place = name.removeprefix(prefix)
        module, _, kind = place.rpartition(".")
        if module in norms:
            gain = QUIET_FEATURES if module == "post_layernorm" else 1.0
            added = torch.full((CHANNELS,), gain * norms[module] * share / QUIET)
            scale, added = (share, added) if kind == "weight" else (1.0, 0 * added)
            weights[name] = torch.cat([value * scale, added])
        elif place.startswith("encoder.layers."):
            weights[name] = _layer_weights(place, value, new)
    embedding = prefix + "embeddings."
    patch = embedding + "patch_embedding."
    mix, offset = new["embedding.weight"], new["embedding.bias"]
    kernel, bias = old[patch + "weight"], old[patch + "bias"]
    added = torch.einsum("ki,i...->k...", mix, kernel)
    weights[patch + "weight"] = torch.cat([_centred(kernel), QUIET * added])
    weights[patch + "bias"] = torch.cat([_centred(bias), QUIET * (mix @ bias + offset)])
    places = old[embedding + "position_embedding.weight"]
    weights[embedding + "position_embedding.weight"] = torch.cat(
        [_centred(places.T).T, QUIET * new["position"]], 1
    )
    weights |= _projector(model, code)
    wide.load_state_dict({**old, **weights})
    return wide


def _norm_names(layers: int) -> list[str]:
    names = [f"encoder.layers.{k}.layer_norm{j}" for k in range(layers) for j in (1, 2)]
    return [*names, "post_layernorm"]


def _layer_weights(place: str, value: Tensor, new: dict[str, Tensor]) -> Tensor:
    """One weight or bias of an encoder layer with what is new to it; ``place`` is its name."""
    *_, index, _, module, kind = place.split(".")
    added = new[f"layers.{index}.{module}.{kind}"]
    if module in ("out_proj", "fc2"):
        value, added = _centred(value), QUIET * added
    if kind == "bias":
        return torch.cat([value, added])
    n_new = {"out_proj": HEADS * HEAD_DIM, "fc2": FF}.get(module, CHANNELS)
    value = F.pad(value, (0, n_new))
    return torch.cat([value, F.pad(added, (value.shape[1] - added.shape[1], 0))])


def _projector(model: Pico, code: nn.Linear) -> dict[str, Tensor]:
    linear = model.multi_modal_projector.linear
    rows = linear.out_features - NEW_CHANNELS
    weight = F.pad(CODE_LOUDNESS / QUIET_FEATURES * code.weight, (0, 0, rows, 0))
    bias = F.pad(CODE_LOUDNESS * code.bias, (rows, 0))
    name = "multi_modal_projector.linear."
    return {
        name + "weight": torch.cat([linear.weight, weight], 1),
        name + "bias": linear.bias + bias,
    }


def _centred(value: Tensor) -> Tensor:
    return value - value.mean(0, keepdim=True)

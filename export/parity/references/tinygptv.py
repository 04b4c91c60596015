"""TinyGPT-V: the tower computed plainly, transformers' Q-Former and Phi with the two norms added.

No release of transformers runs the model. What its classes share with it they compute here; nothing
uses the modules that were exported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import image_utils
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from edgevlm.export.checkpoint.tensors import Weights
from edgevlm.export.components import Job
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import Arrays, ParityRequest, files
from edgevlm.export.parity.references.causal import Seen, stages, weights
from edgevlm.parts import Connector, Decoder, VisionTower
from edgevlm.parts.phi2 import Phi2
from edgevlm.parts.qformer import QFormer

# transformers leaves its classes without types.
_hf: Any = transformers


class Reference:
    """See references.SourceModel."""

    def __init__(self, job: Job) -> None:
        self._job = job
        folder = job.checkpoint.folder
        with quiet():
            # The original asks for the slow one, which needs vocab.json.
            slow = (folder / "vocab.json").is_file()
            self._tokenizer = files.tokenizer(folder, use_fast=not slow)

    def token_ids(self, texts: list[str], *, plain: bool = False) -> list[list[int]]:
        """See references.SourceModel."""
        return files.token_ids(self._tokenizer, texts, plain)

    def run(self, request: ParityRequest, tokens: NDArray[np.int32]) -> Arrays:
        """See references.SourceModel."""
        model, parts = self._job.model, self._job.parts
        with quiet(), torch.inference_mode():
            pixels = preprocessed(request.image, self._job)
            features = tower(pixels, model.vision, weights(parts["vision"]))
            rows = queries(model.projector, weights(parts["projector"]))(features)
            decoder = language_model(model.text, parts["decoder"])
            seen = Seen(pixels, features, rows)
            return stages(seen, decoder, self._around(request.prompt), tokens)

    def _around(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids on both sides of the picture (minigpt_base.py, get_context_emb)."""
        template = self._job.model.prompt.template
        begin = [self._tokenizer.bos_token_id] * ("{bos}" in template)
        text = "".join(part for part in template if part != "{bos}").replace("{prompt}", prompt)
        before, after = (self._tokenizer(side)["input_ids"] for side in text.split("{image}"))
        return begin + before, after


def preprocessed(image: NDArray[np.uint8], job: Job) -> Tensor:
    """torchvision's Resize, ToTensor and Normalize of a PIL image, as the stage's run had them."""
    side = job.model.vision.image_size
    datasets = job.checkpoint.extra["stage"].said.get("datasets") or {}
    seen = (d["vis_processor"]["train"] for d in datasets.values() if d.get("vis_processor"))
    said: Any = next(seen, {})
    # transformers exports these without saying so to type checkers.
    usual: Any = image_utils
    mean = torch.tensor(said.get("mean") or usual.OPENAI_CLIP_MEAN)[:, None, None]
    std = torch.tensor(said.get("std") or usual.OPENAI_CLIP_STD)[:, None, None]
    resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    scaled = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    return scaled.sub(mean).div(std)[None]


def tower(pixels: Tensor, config: VisionTower, w: dict[str, Tensor]) -> Tensor:
    """EVA (eva_vit.py), positions fitted to the picture's grid, and ln_vision."""
    patch, heads = w["embeddings.patch_embedding.weight"], config.num_attention_heads
    grid = F.conv2d(pixels, patch, w["embeddings.patch_embedding.bias"], stride=patch.shape[-1])
    x = torch.cat([w["embeddings.class_embedding"], grid.flatten(2).mT], 1)
    x = x + _positions(w["embeddings.position_embedding"], grid.shape[-1])
    for i in range(config.num_hidden_layers):
        p = f"encoder.layers.{i}."
        y = _norm(x, w, f"{p}layer_norm1", 1e-6)
        qkv = torch.unflatten(_linear(y, w, f"{p}self_attn.qkv"), -1, (3, heads, -1))
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("nqhd,nkhd->nhqk", q * q.shape[-1] ** -0.5, k)
        y = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).flatten(2)
        x = x + _linear(y, w, f"{p}self_attn.projection")
        y = F.gelu(_linear(_norm(x, w, f"{p}layer_norm2", 1e-6), w, f"{p}mlp.fc1"))
        x = x + _linear(y, w, f"{p}mlp.fc2")
    return _norm(x, w, "post_layernorm", 1e-5)


def _positions(stored: Tensor, side: int) -> Tensor:
    first, rest = stored[:, :1], stored[:, 1:]
    old = round(rest.shape[1] ** 0.5)
    if old == side:
        return stored
    grid = rest.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(x: Tensor, w: dict[str, Tensor], name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def queries(config: Connector, w: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The Q-Former and the linear maps behind it: features -> the decoder's rows."""
    assert isinstance(config, QFormer)
    made = _hf.Blip2QFormerConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        encoder_hidden_size=config.in_features,
        cross_attention_frequency=config.cross_attention_frequency,
    )
    # transformers leaves its models without types.
    former: Any = Blip2QFormerModel(made)
    former.eval()
    own = {n: t for n, t in w.items() if not n.startswith(("maps.", "query_tokens"))}
    former.load_state_dict(own, strict=True)

    def rows(features: Tensor) -> Tensor:
        learned = w["query_tokens"].expand(len(features), -1, -1)
        out: Tensor = former(query_embeds=learned, encoder_hidden_states=features).last_hidden_state
        for i in range(len(config.widths)):
            out = _linear(out, w, f"maps.{i}")
        return out

    return rows


class _RmsNorm(torch.nn.Module):
    """LlamaRMSNorm of modeling_phi.py behind a layer's attention."""

    def __init__(self, dense: torch.nn.Module, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.dense, self.weight, self.eps = dense, weight, eps

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def language_model(config: Decoder, part: Weights) -> Any:
    """transformers' Phi with the two norms that it lacks."""
    assert isinstance(config, Phi2)
    state = weights(part)
    after = [
        state.pop(f"layers.{i}.post_layernorm.weight") for i in range(config.num_hidden_layers)
    ]
    made = _hf.PhiConfig(
        **{key: getattr(config, key) for key in _SAME},
        partial_rotary_factor=(config.rotary_dim + 0.5) / config.head_dim,
        hidden_act="gelu_new",
        qk_layernorm=True,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        decoder = _hf.PhiForCausalLM(made)
    names = {n: n if n.startswith("lm_head") else f"model.{n}" for n in state}
    decoder.load_state_dict({names[n]: t for n, t in state.items()}, strict=True, assign=True)
    decoder.model.rotary_emb = type(decoder.model.rotary_emb)(made)
    for layer, weight in zip(decoder.model.layers, after, strict=True):
        layer.self_attn.dense = _RmsNorm(layer.self_attn.dense, weight, config.rms_norm_eps)
    return decoder.eval()


_SAME = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "layer_norm_eps",
    "rope_theta",
)

"""open_clip's layout as transformers runs it: each tensor under transformers' name, in its classes.

transformers' own script for CLIP does the same (convert_clip_original_pytorch_to_hf.py). Pictures
go through CLIPImageProcessor, which rounds the middle of a picture otherwise than torchvision.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from edgevlm.errors import ExportError
from edgevlm.export.parity.quiet import quiet
from edgevlm.export.parity.references import clip, files
from edgevlm.specs import TextSpec

_hf: Any = transformers
_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class Reference(clip.Reference):
    """See parity.dual.DualSource."""

    def __init__(self, folder: Path, spec: TextSpec) -> None:
        self.spec = spec
        stated = json.loads((folder / _CONFIG).read_text("utf-8"))
        model = stated["model_cfg"]
        if "timm_model_name" in model["vision_cfg"] or model["text_cfg"].get("no_causal_mask"):
            raise ExportError(
                f"{folder}: transformers has no class for this tower of open_clip's; export "
                "without verification (--no-verify)"
            )
        state = _state(folder)
        with quiet():
            self.tokenizer = files.tokenizer(folder)
            self.model = _hf.CLIPModel(_config(model, state)).eval()
            self.model.load_state_dict(_renamed(state))
        self.images = _images(stated.get("preprocess_cfg") or {}, model["vision_cfg"])


def _state(folder: Path) -> dict[str, torch.Tensor]:
    path = next(p for name in _WEIGHTS if (p := folder / name).is_file())
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        found: dict[str, Any] = load_file(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True)
    state = {re.sub(r"^(module\.)?(text\.)?", "", n): t for n, t in found.items()}
    return {n: t.float() for n, t in state.items() if n not in ("attn_mask", "input_resolution")}


def _config(model: dict[str, Any], state: dict[str, torch.Tensor]) -> Any:
    vision, text = model["vision_cfg"], model["text_cfg"]
    act = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    text_width = text.get("width", 512)
    return _hf.CLIPConfig(
        projection_dim=model["embed_dim"],
        vision_config={
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": layers,
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision.get("image_size", 224),
            "patch_size": vision.get("patch_size", 16),
            "hidden_act": act,
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "hidden_act": act,
            "eos_token_id": 2,  # open_clip's argmax
        },
    )


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        if name == "visual.proj":
            found["visual_projection.weight"] = tensor.T
        elif name == "text_projection":
            found["text_projection.weight"] = tensor.T
        elif name == "logit_scale":
            found[name] = tensor.reshape(())
        else:
            side = "vision_model." if name.startswith("visual.") else "text_model."
            inside = name.removeprefix("visual.")
            for old, new in _CLIP.items():
                inside = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\g<2>", inside)
            kind = re.search(r"attn\.in_proj_(weight|bias)$", inside)
            if not kind:
                found[side + inside] = tensor
                continue
            stem = inside[: kind.start()]
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{side}{stem}self_attn.{letter}_proj.{kind[1]}"] = third
    return found


def _images(stated: dict[str, Any], vision: dict[str, Any]) -> Any:
    side = stated.get("size", vision.get("image_size", 224))
    side = side[-1] if isinstance(side, list) else side
    square = {"height": side, "width": side}
    squash = stated.get("resize_mode") == "squash"
    more = {key: stated[name] for name, key in _KEYS.items() if name in stated}
    return _hf.CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side},
        do_center_crop=not squash,
        crop_size=square,
        resample=2 if stated.get("interpolation") == "bilinear" else 3,
        **more,
    )


_KEYS = {"mean": "image_mean", "std": "image_std"}

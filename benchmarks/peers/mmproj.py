"""A tower and its connector as llama.cpp's multimodal projector file, in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from edgevlm.errors import BenchError
from edgevlm.export.checkpoint.tensors import Weights, writable
from edgevlm.export.gguf.mmproj import (
    ARCHITECTURE,
    Projector,
    connector_name,
    projector_of,
    tower_name,
)
from edgevlm.family import Model
from edgevlm.parts.internvit import InternVit
from edgevlm.parts.merged_mlp import MergedMlp
from edgevlm.parts.pooled import Pooled
from edgevlm.parts.qwen2_vit import Qwen2Vit
from edgevlm.parts.shuffle import Shuffle
from edgevlm.parts.siglip import SiglipTower

# llama.cpp plans its memory for that side, in pixels, where pictures keep their size.
_ANY_SIZE = 560
_SQUEEZED = ("v.class_embd", "v.position_embd.weight")


def write_mmproj(model: Model, parts: Mapping[str, Weights], path: Path) -> None:
    """Writes a tower and a projector; raises BenchError for one that PROJECTORS has not."""
    vision, image = model.vision, model.image
    found = projector_of(model)
    if found is None:
        raise BenchError(
            f"no {vision.kind} tower with a {model.projector.kind} connector is written for "
            "llama.cpp's multimodal library"
        )
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", found.type)
    if isinstance(vision, Qwen2Vit) and vision.gated:
        writer.add_bool("clip.use_silu", True)
        # After so many layers one has no windows.
        writer.add_uint32("clip.vision.n_wa_pattern", vision.full_layers[0] + 1)
    for key, value in (
        ("image_size", _ANY_SIZE if isinstance(vision, Qwen2Vit) else vision.image_size),
        ("patch_size", vision.patch_size),
        ("embedding_length", vision.hidden_size),
        ("feed_forward_length", vision.intermediate_size),
        ("projection_dim", model.decoder.n_embd),
        ("block_count", vision.num_hidden_layers),
        ("attention.head_count", vision.num_attention_heads),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.layer_norm_eps)
    writer.add_array("clip.vision.image_mean", list(image.mean))
    writer.add_array("clip.vision.image_std", list(image.std))
    # Where neither GELU nor SiLU is set it is CLIP's own x * sigmoid(1.702 x).
    writer.add_bool("clip.use_gelu", isinstance(vision, SiglipTower | InternVit))
    if isinstance(model.projector, Shuffle | MergedMlp | Pooled):
        writer.add_uint32("clip.vision.projector.scale_factor", model.projector.factor)
    if isinstance(model.projector, Shuffle) and image.tiles:
        writer.add_uint32("clip.vision.preproc_image_size", image.tiles.longest_edge)
    for name, values in _arrays(parts, found):
        half = values.ndim > 1 and name != "v.position_embd.weight"
        writer.add_tensor(name, writable(values.astype(np.float16 if half else np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arrays(
    parts: Mapping[str, Weights], projector: Projector
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor by llama.cpp's name, in its shape."""
    for name, tensor in parts["vision"].items():
        for apart, values in _apart(name, tensor.float32()):
            called = tower_name(apart)
            yield called, values.squeeze() if called in _SQUEEZED else values
    for name, tensor in parts["projector"].items():
        called, values = connector_name(name, projector), tensor.float32()
        if called.endswith(("fc1.weight", "fc2.weight", ".2.0.weight")):
            values = values.reshape(values.shape[:2])  # convolutions of one pixel
        # Its graph does not add the one.
        yield called, values + 1 if called == "mm.soft_emb_norm.weight" else values


def _apart(name: str, values: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A tower's tensor, or those that llama.cpp has in its place."""
    if ".qkv." in name:
        for part, split in zip("qkv", np.split(values, 3), strict=True):
            yield name.replace("qkv", part), split
    elif name == "patch_embed.proj.weight":
        yield name, values[:, :, 0]
        yield f"{name}.1", values[:, :, 1]
    else:
        yield name, values

"""A tower and its connector as llama.cpp's multimodal projector file, in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np

from edgevlm.errors import BenchError
from edgevlm.export.checkpoint.tensors import Tensor, Weights, writable
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
from edgevlm.parts.shuffle import Shuffle
from edgevlm.parts.siglip import SiglipTower


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
    for key, value in (
        ("image_size", vision.image_size),
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
    for name, tensor in _tensors(parts, found):
        values = tensor.float32()
        if name.endswith(("fc1.weight", "fc2.weight", ".2.0.weight")):
            values = values.reshape(values.shape[:2])  # convolutions of one pixel
        if name == "mm.soft_emb_norm.weight":
            values = values + 1  # which its graph does not add
        if name in ("v.class_embd", "v.position_embd.weight"):
            values = values.squeeze()
        half = values.ndim > 1 and name != "v.position_embd.weight"
        writer.add_tensor(name, writable(values.astype(np.float16 if half else np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(parts: Mapping[str, Weights], projector: Projector) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts["vision"].items():
        yield tower_name(name), tensor
    for name, tensor in parts["projector"].items():
        yield connector_name(name, projector), tensor

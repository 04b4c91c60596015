"""A tower and its connector as llama.cpp's multimodal projector file, in half precision."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np

from edgevlm.errors import BenchError
from edgevlm.export.checkpoint.tensors import Tensor, Weights, writable
from edgevlm.family import Model
from edgevlm.parts import Connector, VisionTower
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.internvit import InternVit
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
from edgevlm.parts.merged_mlp import MergedMlp
from edgevlm.parts.mlp import Mlp
from edgevlm.parts.shuffle import Shuffle
from edgevlm.parts.siglip import SiglipTower

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.projection_layer": "attn_out",
    "layernorm_before": "ln1",
    "layernorm_after": "ln2",
}
_LAYER_NUMBER = re.compile(r"^encoder\.layers?\.")
_LAYER_SCALES = {"lambda_1": "ls1", "lambda_2": "ls2"}
# Of a connector's names.
_RENAMED = (
    ("mlp.mlp.", "mlp."),
    ("peg.peg.", "peg."),
    ("proj.", ""),
    ("layer_norm.", "0."),
    ("linear_1.", "1."),
    ("linear_2.", "3."),
)
_TOP = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "post_layernorm.weight": "v.post_ln.weight",
    "post_layernorm.bias": "v.post_ln.bias",
    "embeddings.cls_token": "v.class_embd",
    "embeddings.patch_embeddings.projection.weight": "v.patch_embd.weight",
    "embeddings.patch_embeddings.projection.bias": "v.patch_embd.bias",
    "embeddings.position_embeddings": "v.position_embd.weight",
}
# llama.cpp's types by tower and connector, and what the connector's tensors begin with.
_PROJECTORS: dict[tuple[type[VisionTower], type[Connector]], tuple[str, str]] = {
    (ClipTower, Mlp): ("mlp", "mm."),
    (ClipTower, Ldp): ("ldp", "mm.model."),
    (ClipTower, LdpV2): ("ldpv2", "mm.model."),
    (SiglipTower, Shuffle): ("idefics3", "mm.model.fc."),
    (InternVit, MergedMlp): ("internvl", "mm.model.mlp."),
}


def write_mmproj(model: Model, parts: Mapping[str, Weights], path: Path) -> None:
    """Writes a tower and a projector; raises BenchError for one that _PROJECTORS has not."""
    vision, image = model.vision, model.image
    found = _PROJECTORS.get((type(vision), type(model.projector)))
    if found is None:
        raise BenchError(
            f"no {vision.kind} tower with a {model.projector.kind} connector is written for "
            "llama.cpp's multimodal library"
        )
    kind, prefix = found
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", kind)
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
    if isinstance(model.projector, Shuffle | MergedMlp):
        writer.add_uint32("clip.vision.projector.scale_factor", model.projector.factor)
    if isinstance(model.projector, Shuffle) and image.tiles:
        writer.add_uint32("clip.vision.preproc_image_size", image.tiles.longest_edge)
    for name, tensor in _tensors(parts, prefix):
        values = tensor.float32()
        if name.endswith(("fc1.weight", "fc2.weight", ".2.0.weight")):
            values = values.reshape(values.shape[:2])  # convolutions of one pixel
        if name in ("v.class_embd", "v.position_embd.weight"):
            values = values.squeeze()
        half = values.ndim > 1 and name != "v.position_embd.weight"
        writer.add_tensor(name, writable(values.astype(np.float16 if half else np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(parts: Mapping[str, Weights], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in parts["vision"].items():
        if name in _TOP:
            yield _TOP[name], tensor
            continue
        layer, rest = _LAYER_NUMBER.sub("", name).split(".", 1)
        if rest in _LAYER_SCALES:
            yield f"v.blk.{layer}.{_LAYER_SCALES[rest]}.weight", tensor
            continue
        part, kind = rest.rsplit(".", 1)
        yield f"v.blk.{layer}.{_LAYER[part]}.{kind}", tensor
    for name, tensor in parts["projector"].items():
        for ours, theirs in _RENAMED:
            name = name.replace(ours, theirs)
        yield prefix + name, tensor

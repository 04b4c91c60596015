"""A tower and its connector as llama.cpp's multimodal projector file, in half precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np

from edgevlm.errors import BenchError
from edgevlm.export.checkpoint.tensors import Tensor, Weights, writable
from edgevlm.family import Model
from edgevlm.parts import Connector, VisionTower
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
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
}
_TOP = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "post_layernorm.weight": "v.post_ln.weight",
    "post_layernorm.bias": "v.post_ln.bias",
}
# llama.cpp's types by tower and connector, and what the connector's tensors begin with.
_PROJECTORS: dict[tuple[type[VisionTower], type[Connector]], tuple[str, str]] = {
    (ClipTower, Mlp): ("mlp", "mm."),
    (ClipTower, Ldp): ("ldp", "mm.model."),
    (ClipTower, LdpV2): ("ldpv2", "mm.model."),
    (SiglipTower, Shuffle): ("idefics3", "mm.model.fc."),
}


def write_mmproj(model: Model, parts: Mapping[str, Weights], path: Path) -> None:
    """Writes a tower and a projector; raises BenchError for one that llama.cpp does not know."""
    vision, image = model.vision, model.image
    found = _PROJECTORS.get((type(vision), type(model.projector)))
    if found is None:
        raise BenchError(
            f"llama.cpp's multimodal library has no {vision.kind} tower with a "
            f"{model.projector.kind} connector"
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
    writer.add_bool("clip.use_gelu", isinstance(vision, SiglipTower))
    if isinstance(model.projector, Shuffle) and image.tiles:
        writer.add_uint32("clip.vision.projector.scale_factor", model.projector.factor)
        writer.add_uint32("clip.vision.preproc_image_size", image.tiles.longest_edge)
    for name, tensor in _tensors(parts, prefix):
        values = tensor.float32()
        if name.endswith(("fc1.weight", "fc2.weight", ".2.0.weight")):
            values = values.reshape(values.shape[:2])  # convolutions of one pixel
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
        layer, rest = name.removeprefix("encoder.layers.").split(".", 1)
        part, kind = rest.rsplit(".", 1)
        yield f"v.blk.{layer}.{_LAYER[part]}.{kind}", tensor
    for name, tensor in parts["projector"].items():
        for ours, theirs in (("mlp.mlp.", "mlp."), ("peg.peg.", "peg."), ("proj.", "")):
            name = name.replace(ours, theirs)
        yield prefix + name, tensor

"""llama.cpp's multimodal projector files: names and types of a tower's and a connector's tensors.

Only the kinds of towers and connectors in PROJECTORS are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.computed import dequantized, reshaped
from edgevlm.export.checkpoint.tensors import DTYPES, SourceTensor, Tensor, Weights
from edgevlm.family import Model
from edgevlm.parts import Connector, Part, VisionTower
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.internvit import InternVit
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
from edgevlm.parts.merged_mlp import MergedMlp
from edgevlm.parts.mlp import Mlp
from edgevlm.parts.patch_merger import PatchMerger
from edgevlm.parts.pooled import Pooled
from edgevlm.parts.qwen2_vit import Qwen2Vit
from edgevlm.parts.shuffle import Shuffle
from edgevlm.parts.siglip import SiglipTower

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "clip"
# Types beside those of DTYPES that are read.
_BLOCKS = ("Q8_0",)
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
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.proj": "attn_out",
    "norm1": "ln1",
    "norm2": "ln2",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_NUMBER = re.compile(r"^(encoder\.layers?|blocks)\.")
_LAYER_SCALES = {"lambda_1": "ls1.weight", "lambda_2": "ls2.weight"}
# Of a connector's names.
_RENAMED = (
    ("mlp.mlp.", "mlp."),
    ("peg.peg.", "peg."),
    ("proj.", ""),
    ("layer_norm.", "0."),
    ("linear_1.", "1."),
    ("linear_2.", "3."),
    ("mm_soft_emb_norm.", "soft_emb_norm."),
    ("mm_input_projection_weight", "input_projection.weight"),
)
# Of connectors that llama.cpp counts among the tower, or by the place of a map alone.
_ELSEWHERE = {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"}
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
    "patch_embed.proj.weight": "v.patch_embd.weight",
    "patch_embed.proj.weight.1": "v.patch_embd.weight.1",
}
# Files carry it where the tower never reads it.
_LAST_NORM = re.compile(r"v\.post_ln\.(weight|bias)")
_SWAP = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}


@dataclass(frozen=True)
class Projector:
    """llama.cpp's type of a tower with its connector; `prefix` begins the connector's names, `read`
    says whether published files of it are.
    """

    type: str
    prefix: str
    read: bool = True


PROJECTORS: dict[tuple[type[VisionTower], type[Connector]], Projector] = {
    (ClipTower, Mlp): Projector("mlp", "mm."),
    (ClipTower, Ldp): Projector("ldp", "mm.model."),
    (ClipTower, LdpV2): Projector("ldpv2", "mm.model."),
    (SiglipTower, Shuffle): Projector("idefics3", "mm.model.fc."),
    # Published ones store the class token and the positions in other shapes.
    (InternVit, MergedMlp): Projector("internvl", "mm.model.mlp.", read=False),
    # Published ones store the norm plus one, and their decoders have fewer rows.
    (SiglipTower, Pooled): Projector("gemma3", "mm.", read=False),
    # Published ones store queries, keys and values apart, as the two frames of a patch.
    (Qwen2Vit, PatchMerger): Projector("qwen2vl_merger", "mm.", read=False),
}


def projector_of(model: Model) -> Projector | None:
    """llama.cpp's type of a model's tower and connector, None for one that is not known."""
    found = PROJECTORS.get((type(model.vision), type(model.projector)))
    gated = isinstance(model.vision, Qwen2Vit) and model.vision.gated
    return replace(found, type="qwen2.5vl_merger") if found and gated else found


def tower_name(name: str) -> str:
    """llama.cpp's name of a tower's tensor, by its canonical name."""
    if name in _TOP:
        return _TOP[name]
    layer, rest = _LAYER_NUMBER.sub("", name).split(".", 1)
    if rest in _LAYER_SCALES:
        return f"v.blk.{layer}.{_LAYER_SCALES[rest]}"
    part, kind = rest.rsplit(".", 1)
    return f"v.blk.{layer}.{_LAYER[part]}.{kind}"


def connector_name(name: str, projector: Projector) -> str:
    """llama.cpp's name of a connector's tensor, by its canonical name."""
    part, _, kind = name.rpartition(".")
    if part in _ELSEWHERE:
        return f"{_ELSEWHERE[part]}.{kind}"
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    return projector.prefix + name


def read(path: Path, model: Model) -> Mapping[str, Weights]:
    """The tensors of "vision" and "projector" by canonical name; raises SourceError for a file of
    another model, and for a tensor that is missing, left over, or of another shape or type.
    """
    projector = projector_of(model)
    if projector is None or not projector.read:
        raise SourceError(
            f"{path}: mmproj files are not read for a {model.vision.kind} tower with a "
            f"{model.projector.kind} connector; name the original checkpoint"
        )
    reader = _opened(path)
    _check_keys(path, _keys(reader), model, projector)
    stored = {name: _tensor(path, found) for name, found in _entries(reader, model.vision)}
    parts = {
        "vision": _part(path, stored, model.vision, tower_name),
        "projector": _part(
            path, stored, model.projector, lambda name: connector_name(name, projector)
        ),
    }
    for name in stored:
        if not _is_unread(name, model.vision):
            raise SourceError(f"{path}: {name} is not a tensor of this model; check config.json")
    return parts


def _opened(path: Path) -> GGUFReader:
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as e:
        raise SourceError(f"{path}: cannot be read as GGUF ({e}); download it again") from None


def _keys(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _check_keys(path: Path, said: Mapping[str, Any], model: Model, projector: Projector) -> None:
    """Refuses a file that states other values than config.json; what it leaves out is believed.

    The norms' epsilon is not compared: llama.cpp's converter writes 1e-5 for SmolVLM, whose config
    leaves it out and whose code has 1e-6.
    """
    vision, v = model.vision, "clip.vision."
    expected: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "clip.projector_type": projector.type,
        f"{v}image_size": vision.image_size,
        f"{v}patch_size": vision.patch_size,
        f"{v}attention.head_count": vision.num_attention_heads,
        f"{v}image_mean": list(model.image.mean),
        f"{v}image_std": list(model.image.std),
    }
    if isinstance(model.projector, Shuffle):
        expected[f"{v}projector.scale_factor"] = model.projector.factor
    for key, value in expected.items():
        found = said.get(key, value)
        if not _same(found, value):
            raise SourceError(
                f"{path}: its {key} is {found!r}, the model's is {value!r}; "
                "it is another model's file"
            )


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, list):
        return len(found) == len(value) and all(map(_same, found, value))
    if isinstance(value, float):
        return math.isclose(found, value, rel_tol=1e-5)
    return bool(found == value)


def _entries(reader: GGUFReader, vision: VisionTower) -> Iterator[tuple[str, Any]]:
    """The tensors by name; older files call the two maps of a feed-forward net the other way."""
    found = {str(t.name): t for t in reader.tensors}
    down = found.get("v.blk.0.ffn_down.weight")
    swapped = down is not None and _shape(down) == (vision.intermediate_size, vision.hidden_size)
    swapped = swapped and vision.intermediate_size != vision.hidden_size
    for name, tensor in found.items():
        parts = name.split(".")
        yield ".".join(_SWAP.get(p, p) for p in parts) if swapped else name, tensor


def _shape(entry: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(entry.shape))


def _tensor(path: Path, entry: Any) -> Tensor:
    kind, name, shape = entry.tensor_type.name, str(entry.name), _shape(entry)
    if kind in DTYPES:
        return SourceTensor(name, path, kind, shape, int(entry.data_offset))
    if kind in _BLOCKS:
        return dequantized(name, path, shape, kind, int(entry.data_offset), int(entry.n_bytes))
    raise SourceError(
        f"{path}: {name} is stored as {kind}, not as {', '.join((*DTYPES, *_BLOCKS))}; "
        "take a more precise mmproj file"
    )


def _part(path: Path, stored: dict[str, Tensor], config: Part, named: Any) -> dict[str, Tensor]:
    """The tensors of a part, which are taken out of `stored`."""
    found: dict[str, Tensor] = {}
    for name, shape in config.tensors().items():
        tensor = stored.pop(named(name), None)
        if tensor is None:
            raise SourceError(f"{path}: lacks {named(name)}; download it again")
        # Convolutions of one pixel may be stored as matrices.
        if tensor.shape + (1, 1) == shape:
            tensor = reshaped(tensor, shape)
        if tensor.shape != shape:
            raise SourceError(
                f"{path}: {tensor.name} has shape {list(tensor.shape)}, "
                f"config.json says {list(shape)}"
            )
        found[name] = tensor
    return found


def _is_unread(name: str, vision: VisionTower) -> bool:
    beyond = {start.replace("encoder.layers.", "v.blk.") for start in vision.unread}
    return bool(_LAST_NORM.fullmatch(name)) or name.startswith(tuple(beyond))

"""Towers in other projects' layouts, brought to canonical names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgevlm.errors import SourceError
from edgevlm.export.checkpoint.source import read_header
from edgevlm.export.parts import room
from edgevlm.parts.siglip import SiglipTower
from tests.checkpoints.paligemma import Tensors, write_weights

TOWER = SiglipTower(
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_channels=3,
    image_size=8,
    patch_size=2,
    hidden_act="gelu",
    layer_norm_eps=1e-6,
)
Shape = tuple[int, ...]


def timm() -> dict[str, Shape]:
    """timm's names and shapes of the same tower."""
    shapes: dict[str, Shape] = {
        "pos_embed": (1, 16, 8),
        "patch_embed.proj.weight": (8, 3, 2, 2),
        "patch_embed.proj.bias": (8,),
        "norm.weight": (8,),
        "norm.bias": (8,),
    }
    for i in range(2):
        matrices = {
            "attn.qkv": (24, 8),
            "attn.proj": (8, 8),
            "mlp.fc1": (12, 8),
            "mlp.fc2": (8, 12),
        }
        for name, shape in matrices.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (8,)
    return shapes


def written(folder: Path, **more: Shape) -> tuple[Tensors, SiglipTower]:
    rng = np.random.default_rng(0)
    made = {n: rng.normal(size=s).astype(np.float32) for n, s in (timm() | more).items()}
    write_weights(folder, made, "float32", 1)
    return made, TOWER


def test_timms_siglip(tmp_path: Path) -> None:
    made, tower = written(tmp_path)
    stored = {t.name: t for t in read_header(tmp_path / "model.safetensors")}
    found = room(tower).canonical(stored, tower)
    assert {name: tensor.shape for name, tensor in found.items()} == tower.tensors()
    for i, x in enumerate("qkv"):
        ours = found[f"encoder.layers.1.self_attn.{x}_proj.weight"].float32()
        np.testing.assert_array_equal(ours, made["blocks.1.attn.qkv.weight"][8 * i : 8 * i + 8])
    positions = found["embeddings.position_embedding.weight"].float32()
    np.testing.assert_array_equal(positions, made["pos_embed"][0])
    np.testing.assert_array_equal(found["post_layernorm.bias"].float32(), made["norm.bias"])


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    _, tower = written(tmp_path, **{"post_layernorm.bias": (8,)})
    stored = {t.name: t for t in read_header(tmp_path / "model.safetensors")}
    with pytest.raises(SourceError, match="are the same"):
        room(tower).canonical(stored, tower)

"""The ONNX graphs of towers and connectors, apart from any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgevlm.benchmarks.synthetic.tensors import random_part
from edgevlm.export.onnx import attention, layers, storage
from edgevlm.export.onnx.write import write
from edgevlm.export.parts import eva
from edgevlm.parts import Connector, VisionTower
from edgevlm.parts.anyres import Anyres
from edgevlm.parts.clip import ClipTower
from edgevlm.parts.eva import EvaTower
from edgevlm.parts.internvit import InternVit
from edgevlm.parts.ldp import Ldp
from edgevlm.parts.ldpv2 import LdpV2
from edgevlm.parts.linear import Linear
from edgevlm.parts.merged_mlp import MergedMlp
from edgevlm.parts.mlp import Mlp
from edgevlm.parts.pooled import Pooled
from edgevlm.parts.qformer import QFormer
from edgevlm.parts.shuffle import Shuffle
from edgevlm.parts.siglip import SiglipTower
from edgevlm.progress import Stage

SIZES: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_channels": 3, "image_size": 56, "patch_size": 14, "layer_norm_eps": 1e-6,
}  # fmt: skip
ENDS: dict[str, Any] = {"in_features": 48, "out_features": 40}
QUERIES: dict[str, Any] = {
    "in_features": 48, "queries": 8, "hidden_size": 24, "intermediate_size": 50,
    "num_hidden_layers": 3, "num_attention_heads": 4, "cross_attention_frequency": 2,
    "layer_norm_eps": 1e-12, "widths": (30, 40),
}  # fmt: skip
PARTS: dict[str, VisionTower | Connector] = {
    "siglip": SiglipTower(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "siglip without a norm": SiglipTower(**SIZES, hidden_act="gelu", final_norm=False),
    "clip": ClipTower(**SIZES, hidden_act="quick_gelu"),
    "clip with its class token": ClipTower(**SIZES, hidden_act="quick_gelu", class_token=True),
    "internvit": InternVit(**SIZES, hidden_act="gelu", attention_bias=False),
    "eva": EvaTower(**SIZES, hidden_act="gelu", positions=3, final_norm_eps=1e-5),
    "mlp": Mlp(**ENDS, depth=3),
    "anyres": Anyres(**ENDS, depth=2),
    "linear": Linear(**ENDS, scale=0.5),
    "shuffle": Shuffle(**ENDS, factor=2),
    "merged_mlp": MergedMlp(**ENDS, factor=2),
    "pooled": Pooled(**ENDS, factor=2, norm_eps=1e-6),
    "ldp": Ldp(**ENDS),
    "ldpv2": LdpV2(**ENDS),
    "qformer": QFormer(**QUERIES),
}
ROWS = 16
# Attention of learned queries that have seen nothing of a picture yet.
QUERIES_ALONE = {"qformer": 2}


def shapes(part: VisionTower | Connector) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A part's input and output without the batch."""
    if isinstance(part, VisionTower):
        return part.pixels, (part.rows, part.hidden_size)
    return (ROWS, part.in_features), (part.tokens(ROWS), 40)


def stage() -> Stage:
    return Stage(None, "graph", 1, "tensors")


@pytest.mark.parametrize("name", PARTS)
def test_a_graph_computes_no_shape(name: str, tmp_path: Path) -> None:
    part, path = PARTS[name], tmp_path / "part.onnx"
    given, made = shapes(part)
    write(part, given, random_part(part), path, stage())
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    for value, shape in ((model.graph.input[0], given), (model.graph.output[0], made)):
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param == "n" and tuple(d.dim_value for d in rest) == shape
    operators = {n.op_type for n in model.graph.node}
    assert not operators & {"Shape", "Gather", "Expand", "Where", "Cast", "Identity", "Constant"}
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)
    batch = np.random.default_rng(0).normal(size=(3, *given)).astype(np.float32)
    one = storage.run(path, storage.input_name(path), batch)
    session = storage._session(path)
    all_at_once = session.run(None, {storage.input_name(path): batch})[0]
    assert one.shape == (3, *made) and np.abs(one - one[:1]).max() > 0
    np.testing.assert_allclose(one, all_at_once, atol=1e-5 * one.std())


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "quick_gelu"])
def test_onnxruntime_joins_the_operators_of_an_activation(act: str, tmp_path: Path) -> None:
    import onnxruntime

    part, path = ClipTower(**SIZES, hidden_act=act), tmp_path / "part.onnx"
    write(part, part.pixels, random_part(part), path, stage())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "joined.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    joined = [n.op_type for n in onnx.load(tmp_path / "joined.onnx").graph.node]
    fused = {"gelu": "BiasGelu", "gelu_pytorch_tanh": "FastGelu", "quick_gelu": "QuickGelu"}[act]
    assert joined.count(fused) == 2 and "LayerNormalization" in joined and "FusedMatMul" in joined
    assert not {"Tanh", "Erf", "Pow", "Sigmoid"} & set(joined)


def joined(path: Path) -> Path:
    """The graph with its attention in one operator each, beside it."""
    model = storage.skeleton(path)
    attention.join(model)
    target = path.with_name("joined.onnx")
    storage.save_skeleton(model, target)
    return target


@pytest.mark.parametrize("name", PARTS)
def test_attention_is_joined_for_processors(name: str, tmp_path: Path) -> None:
    part, path = PARTS[name], tmp_path / "part.onnx"
    given, _ = shapes(part)
    write(part, given, random_part(part), path, stage())
    before, after = (storage.skeleton(p).graph.node for p in (path, joined(path)))
    n, left = (sum(node.op_type == "Softmax" for node in nodes) for nodes in (before, after))
    assert left == QUERIES_ALONE.get(name, 0)
    assert sum(node.op_type == "MultiHeadAttention" for node in after) == n - left
    assert len(after) == len(before) - 11 * (n - left)
    batch = np.random.default_rng(0).normal(size=(2, *given)).astype(np.float32)
    one = storage.run(path, storage.input_name(path), batch)
    for found in (
        storage.run(joined(path), storage.input_name(path), batch),
        storage._session(joined(path)).run(None, {storage.input_name(path): batch})[0],
    ):
        np.testing.assert_allclose(found, one, atol=1e-5 * one.std())


def test_scores_that_are_computed_in_parts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = SiglipTower(**SIZES, hidden_act="gelu_pytorch_tanh")
    pixels = np.random.default_rng(0).normal(size=(2, *part.pixels)).astype(np.float32)
    found, parts = [], []
    # Of 3 heads and 16 rows: all at once, five queries at a time, and one.
    for limit in (3 * 16 * 16, 250, 1):
        monkeypatch.setattr(layers, "SCORES", limit)
        path = tmp_path / f"{limit}.onnx"
        write(part, part.pixels, random_part(part), path, stage())
        found.append(storage.run(path, "pixels", pixels))
        nodes = onnx.load(path, load_external_data=False).graph.node
        parts.append(sum(n.op_type == "Softmax" for n in nodes) // part.num_hidden_layers)
        whole = {n.op_type for n in storage.skeleton(joined(path)).graph.node}
        assert "MultiHeadAttention" in whole and not whole & {"Softmax", "Slice", "Concat"}
        found.append(storage.run(joined(path), "pixels", pixels))
    assert parts == [1, 4, 16]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5 * found[0].std())


def test_every_tensor_has_to_be_in_the_graph(tmp_path: Path) -> None:
    part = PARTS["mlp"]
    more = {**random_part(part), "6.bias": random_part(part)["0.bias"]}
    with pytest.raises(AssertionError, match=r"not in the graph: \['6.bias'\]"):
        write(part, shapes(part)[0], more, tmp_path / "part.onnx", stage())


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_act 'relu' is not in gelu, gelu_pytorch_tanh, qu"):
        ClipTower(**SIZES, hidden_act="relu")


@pytest.mark.parametrize(("stored", "side"), [(4, 4), (4, 8), (16, 32), (5, 3)])
def test_positions_are_fitted_as_torch_does(stored: int, side: int) -> None:
    import torch.nn.functional as F
    from torch import from_numpy

    rows = np.random.default_rng(0).normal(size=(1 + stored**2, 6)).astype(np.float32)
    grid = from_numpy(rows[1:].reshape(stored, stored, -1)).permute(2, 0, 1)[None]
    fitted = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    expected: NDArray[Any] = fitted[0].permute(1, 2, 0).flatten(0, 1).numpy()
    found = eva._fitted(rows, side)
    assert np.array_equal(found[0], rows[0])
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)

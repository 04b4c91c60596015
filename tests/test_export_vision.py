"""The encoder and projector as ONNX against transformers, at every precision."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.export import components, precisions
from edgevlm.export.onnx import attention, dynamic8, flow, four_bits, quantize, storage
from edgevlm.export.options import WriteOptions
from edgevlm.export.parity import images
from edgevlm.export.parity.metrics import distance
from edgevlm.export.pipeline import read
from tests.checkpoints.paligemma import write_paligemma

Array = NDArray[Any]


def write(folder: Path, out: Path, precision: str) -> tuple[Path, Path]:
    """vision.onnx and projector.onnx of a checkpoint."""
    job, options = read(folder), WriteOptions.checked("f32", precision)
    (out / "work").mkdir(parents=True)
    vision = components._write_vision(job, options, out, out / "work")
    _, projector = components._write_projector(job, options, out, out / "work")
    return vision[precision][0], projector[0]


def original(folder: Path, pixels: Array) -> tuple[Array, Array]:
    """Features and image embeddings as transformers' own loader and model make them."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        values = torch.from_numpy(pixels)
        features = model.model.vision_tower(values).last_hidden_state
        return features.numpy(), model.model.get_image_features(values).numpy()


def pixels_for(folder: Path) -> Array:
    return images.calibration(read(folder).model.image)


@dataclass(frozen=True)
class Tower:
    """A tiny tower in float32 as a file, pictures, and what the file makes of them."""

    path: Path
    pixels: Array
    features: Array


def written(folder: Path, out: Path) -> Tower:
    vision, _ = write(folder, out, "fp32")
    pixels = pixels_for(folder)
    return Tower(vision, pixels, storage.run(vision, "pixels", pixels))


@pytest.fixture(scope="module")
def tower(paligemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Tower:
    return written(paligemma_checkpoint, tmp_path_factory.mktemp("tower") / "out")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    folder = tmp_path_factory.mktemp("odd")
    return written(write_paligemma(folder / "checkpoint", **ODD), folder / "out")


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    """A tower with outliers, one of them out of half precision's reach."""

    def enlarge(tensors: dict[str, Array]) -> None:
        (name,) = (n for n in tensors if n.endswith("layers.1.mlp.fc1.bias"))
        tensors[name][0] = 20_000

    folder = tmp_path_factory.mktemp("loud")
    made = write_paligemma(folder / "checkpoint", outliers=True, edit=enlarge)
    return written(made, folder / "out")


def convert(tower: Tower, target: Path, precision: str, cosine: float | None = None) -> list[str]:
    """Converts within the precision's own bound or a stricter one; the nodes left in float32."""
    wanted = precisions.vision_precision(precision)
    wanted = replace(wanted, cosine=wanted.cosine if cosine is None else cosine)
    kept = quantize.convert(tower.path, target, wanted, tower.pixels)
    found = storage.run(target, "pixels", tower.pixels)
    assert distance(found, tower.features) <= wanted.cosine
    return kept


# Widths as odd as SigLIP's 1152 = 16 heads of 72 and 4304.
ODD = {"version": 2, "vision_width": 72, "vision_heads": 1, "vision_mlp": 269, "size": 28}


@pytest.mark.parametrize(
    ("options", "precision"),
    [({}, "fp32"), ({}, "int8"), (ODD, "fp32"), ({"outliers": True}, "int8")],
)
def test_features_and_embeddings(tmp_path: Path, options: dict[str, Any], precision: str) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", **options)
    vision, projector = write(folder, tmp_path / "out", precision)
    pixels = pixels_for(folder)
    features, embeddings = original(folder, pixels)
    ours = storage.run(vision, "pixels", pixels)
    assert ours.shape == features.shape
    assert distance(ours, features) <= precisions.vision_precision(precision).cosine
    # The projector itself stays in float32 and carries 1 / sqrt(n_embd), as transformers does.
    exact = storage.run(projector, "features", features)
    assert np.abs(exact - embeddings).max() <= 1e-4 * embeddings.std()


@pytest.mark.parametrize("precision", ["fp16", "int8", "qdq8", "int4"])
@pytest.mark.parametrize("kind", ["tower", "odd", "loud"])
def test_every_precision_is_within_its_bound(
    kind: str, precision: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    convert(request.getfixturevalue(kind), tmp_path / "vision.onnx", precision)


@pytest.mark.parametrize("kind", ["tower", "odd", "loud"])
@pytest.mark.parametrize("kept", [0, 2])
def test_dynamic_quantization_is_onnxruntimes_to_the_bit(
    kind: str,
    kept: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Which it leaves in parts, and 8-bit steps tell the last bit.
    monkeypatch.setattr(attention, "join", lambda model: None)

    made: Tower = request.getfixturevalue(kind)
    maps = quantize.linear_maps(made.path)
    float32 = sorted(maps)[:kept]
    with quantize._quiet():
        quantize_dynamic(
            made.path,
            tmp_path / "theirs.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=float32,
            extra_options={"MatMulConstBOnly": True},
        )
    dynamic8.write(
        made.path, tmp_path / "ours.onnx", {k: v for k, v in maps.items() if k not in float32}
    )
    a, b = (storage.run(tmp_path / n, "pixels", made.pixels) for n in ("theirs.onnx", "ours.onnx"))
    assert np.array_equal(a, b)
    assert (tmp_path / "ours.onnx").stat().st_size <= (tmp_path / "theirs.onnx").stat().st_size


def test_batch_is_dynamic_and_names_are_the_bundles(
    paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    import onnxruntime

    vision, projector = write(paligemma_checkpoint, tmp_path / "out", "fp32")
    for path, given, got in ((vision, "pixels", "features"), (projector, "features", "embeddings")):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (inputs,), (outputs,) = session.get_inputs(), session.get_outputs()
        assert (inputs.name, outputs.name) == (given, got)
        assert isinstance(inputs.shape[0], str) and inputs.type == outputs.type == "tensor(float)"
        for n in (1, 5):
            batch = np.zeros((n, *inputs.shape[1:]), np.float32)
            assert session.run(None, {given: batch})[0].shape[0] == n
        assert onnx.load(path).opset_import[0].version == 18


def test_precisions_shrink_the_file(loud: Tower, tmp_path: Path) -> None:
    sizes = [loud.path.stat().st_size]
    for precision in ("fp16", "int8", "int4"):
        convert(loud, tmp_path / precision, precision, 1.0)
        sizes.append((tmp_path / precision).stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    # The positions, which tiny towers have many of, stay in float32.
    assert sizes[3] < sizes[2] < 0.7 * sizes[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "qdq8", "int4"])
def test_large_weights_lie_in_a_file_of_their_own(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    plain, split = tmp_path / "plain.onnx", tmp_path / "vision.onnx"
    convert(tower, plain, precision)
    monkeypatch.setattr(storage, "EXTERNAL_BYTES", 1000)
    convert(tower, split, precision)
    names = [p.name for p in storage.files(split)]
    assert names == ["vision.onnx", "vision.onnx.data"]
    assert split.stat().st_size < plain.stat().st_size / 2
    assert len({p.stat().st_mode for p in storage.files(split)}) == 1
    inside = [t for t in storage.skeleton(split).graph.initializer if t.data_location == 0]
    assert all(np.prod(t.dims) * 4 < 1024 for t in inside)
    outside = len(storage.skeleton(split).graph.initializer) - len(inside)
    assert inside and outside
    a, b = (storage.run(p, "pixels", tower.pixels) for p in (plain, split))
    assert np.array_equal(a, b)


def test_a_float32_graph_with_its_weights_beside_it_is_converted_alike(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "EXTERNAL_BYTES", 1000)
    storage.save(storage.load(tower.path), tmp_path / "split.onnx")
    split = replace(tower, path=tmp_path / "split.onnx")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert len(before) == 2
    for precision in ("fp16", "int8", "qdq8", "int4"):
        for source, name in ((tower, "a.onnx"), (split, "b.onnx")):
            convert(source, tmp_path / name, precision)
        a, b = (storage.run(tmp_path / n, "pixels", tower.pixels) for n in ("a.onnx", "b.onnx"))
        assert np.array_equal(a, b)
        for name in ("a.onnx", "b.onnx"):
            storage.remove(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_nothing_is_printed(
    tower: Tower, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = list(logging.getLogger().handlers)
    for precision in ("fp16", "int8", "qdq8", "int4"):
        convert(tower, tmp_path / precision, precision)
    logging.getLogger().warning("what a user's program says goes where it went before")
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().handlers == handlers


def test_every_linear_map_of_the_tower_is_found(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    vision, _ = write(paligemma_checkpoint, tmp_path / "out", "fp32")
    maps = quantize.linear_maps(vision)
    # Two layers of four projections and two feed-forward maps; queries, keys and values share
    # their input.
    assert len(maps) == 12 and len({given for given, _ in maps.values()}) == 8
    assert all(name.startswith("encoder.layers.") for name in maps)


def test_the_flow_of_a_tensor(tower: Tower) -> None:
    before = sorted(p.name for p in tower.path.parent.iterdir())
    found = flow.measure(tower.path, ["features", "pixels"], tower.pixels)
    for name, values in (("pixels", tower.pixels), ("features", tower.features)):
        rows = values.reshape(len(values), -1).astype(np.float64)
        np.testing.assert_allclose(found[name].low, rows.min(1), rtol=1e-5)
        np.testing.assert_allclose(found[name].high, rows.max(1), rtol=1e-5)
        np.testing.assert_allclose(found[name].power, (rows**2).mean(1), rtol=1e-4)
        assert found[name].peak == pytest.approx(np.abs(rows).max(), rel=1e-5)
    assert sorted(p.name for p in tower.path.parent.iterdir()) == before


def test_noise_of_rounding_is_what_rounding_does() -> None:
    values = np.random.default_rng(0).normal(size=(2, 10_000)) * [[1.0], [4.0]]
    made = flow.Flow(values.min(1), values.max(1), (values**2).mean(1))
    worst = {}
    for shared in (False, True):
        shares = []
        for row in values:
            low, high = (values.min(), values.max()) if shared else (row.min(), row.max())
            step = (high - low) / 255
            shares.append(np.square(np.round(row / step) * step - row).mean() / (row**2).mean())
        worst[shared] = max(shares)
        assert made.noise(shared=shared) == pytest.approx(worst[shared], rel=0.05)
    assert worst[True] > 10 * worst[False]


# Bounds that no tower with outliers meets unless some of it stays in float32.
@pytest.mark.parametrize(("precision", "cosine"), [("int8", 1e-5), ("qdq8", 1e-5), ("int4", 3e-3)])
def test_what_is_noisy_stays_in_float32_and_is_named(
    loud: Tower, tmp_path: Path, precision: str, cosine: float
) -> None:
    target = tmp_path / "vision.onnx"
    kept = convert(loud, target, precision, cosine)
    maps = quantize.linear_maps(loud.path)
    assert 0 < len(kept) < len(maps) and set(kept) < maps.keys()
    model = onnx.load(target)
    assert kept == sorted(quantize.linear_maps(target))
    (named,) = (p.value for p in model.metadata_props if p.key == quantize.FLOAT_KEY)
    assert named.split(" ") == kept


def test_what_half_precision_cannot_hold_stays_in_float32(loud: Tower, tmp_path: Path) -> None:
    kept = convert(loud, tmp_path / "vision.onnx", "fp16")
    # The bias, and what GELU makes of it.
    assert any("layers.1.mlp.fc1/Add" in name for name in kept)
    assert any("layers.1.mlp.act/" in name for name in kept)
    assert not any("layers.0.self_attn" in name for name in kept)


def test_each_attempt_keeps_more_in_float32() -> None:
    noise = {"a": 1e-5, "b": 4e-4, "c": 2e-3, "d": 1e-5}
    found = list(precisions.Recipe((1e-3, 9e-4, 1e-4), (0.5, 0.75, 1.0)).attempts(noise))
    assert found == [["c"], ["b", "c"], ["a", "b", "c"], ["a", "b", "c", "d"]]


def test_a_static_graph_is_what_npus_read(tower: Tower, tmp_path: Path) -> None:
    assert convert(tower, tmp_path / "vision.onnx", "qdq8") == []
    graph = onnx.load(tmp_path / "vision.onnx").graph
    made = {name: n for n in graph.node for name in n.output}
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    maps = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in made
            and made[n.input[1]].op_type == "DequantizeLinear"]  # fmt: skip
    assert len(maps) == 12
    for node in maps:
        given, weight = (made[name] for name in node.input)
        assert given.op_type == "DequantizeLinear" and weights[given.input[2]].dtype == np.uint8
        values, scale, zero = (weights[name] for name in weight.input)
        assert values.dtype == np.int8 and not zero.any()
        assert scale.shape == (values.shape[1],)  # one for each output channel
    domains = {n.domain for n in graph.node}
    assert domains <= {"", "ai.onnx"}


def test_four_bits_come_in_blocks(loud: Tower, tmp_path: Path) -> None:
    assert convert(loud, tmp_path / "vision.onnx", "int4") == []
    graph = onnx.load(tmp_path / "vision.onnx").graph
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(nodes) == 12
    sizes = {onnx.helper.get_node_attr_value(n, "block_size") for n in nodes}
    assert sizes == {four_bits.BLOCK}


@pytest.mark.parametrize("rows", [64, 72, 32])
def test_four_bits_are_onnxruntimes(rows: int) -> None:
    module = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weight = np.random.default_rng(0).normal(size=(rows, 9)).astype(np.float32)
    weight[:, 3], weight[:, 4], weight[:32, 5] = 0, np.abs(weight[:, 4]), -1
    config = module.DefaultWeightOnlyQuantConfig(block_size=four_bits.BLOCK, is_symmetric=False)
    theirs = module.DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    ours: list[Array] = [*four_bits.rounded(weight)]
    for made, expected in zip(ours, theirs, strict=True):
        assert np.array_equal(made, expected.reshape(made.shape))


def test_half_precision_has_float32_ends_and_widens_back(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", dtype="float16")
    half, _ = write(folder, tmp_path / "half", "fp16")
    float32, _ = write(folder, tmp_path / "float32", "fp32")
    model = onnx.load(half)
    kinds = {v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    assert kinds == {onnx.TensorProto.FLOAT}
    weights = [i for i in model.graph.initializer if len(i.dims) > 1]
    assert {i.data_type for i in weights} == {onnx.TensorProto.FLOAT16}
    quantize.widen(model)
    storage.save(model, tmp_path / "wide.onnx")
    pixels = pixels_for(folder)
    # The weights were halves: nothing is lost, whatever the order of the nodes.
    a, b = (storage.run(p, "pixels", pixels) for p in (tmp_path / "wide.onnx", float32))
    assert distance(a, b) <= 1e-9


def test_a_folder_of_calibration_pictures(paligemma_checkpoint: Path, tmp_path: Path) -> None:
    spec = read(paligemma_checkpoint).model.image
    drawn = images.calibration(spec)
    folder = tmp_path / "pictures"
    with pytest.raises(ImageError, match="is not a folder of calibration pictures"):
        images.calibration(spec, folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    with pytest.raises(ImageError, match="holds no picture"):
        images.calibration(spec, folder)
    for i in range(3):
        Image.new("RGB", (40, 30), (90 * i, 10, 10)).save(folder / f"{i}.png")
    more = images.calibration(spec, folder)
    assert len(more) == len(drawn) + 3 and np.array_equal(more[: len(drawn)], drawn)
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="broken.png"):
        images.calibration(spec, folder)

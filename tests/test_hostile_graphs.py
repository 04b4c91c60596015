"""Graphs that no export writes are refused before onnxruntime reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import edgevlm
from edgevlm.errors import BundleCorrupt
from edgevlm.models import built_in
from edgevlm.onnx_file import check_graph
from edgevlm.runtimes import checks
from tests.test_hostile import bundle, refused
from workshop.fuzz.samples import replaced

__all__ = ["bundle"]


def test_a_graph_is_looked_at_again_where_its_weights_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    path, looked = tmp_path / "x.onnx", list[Path]()
    path.write_bytes(b"graph")
    (tmp_path / "x.data").write_bytes(b"weights")
    monkeypatch.setattr(checks, "check_graph", lambda path, beside: looked.append(path))
    for _ in range(2):
        checks.graph(path, {"x.onnx", "x.data", "gone"})
    assert len(looked) == 1
    (tmp_path / "x.data").write_bytes(b"weight")
    checks.graph(path, {"x.onnx", "x.data", "gone"})
    checks.graph(path, {"x.onnx", "x.data"})
    checks.graph(path, {"x.onnx"})
    assert len(looked) == 3


Graph = Callable[[Any], None]


def elsewhere(**said: str) -> Graph:
    def change(model: Any) -> None:
        weights = model.graph.initializer[0]
        weights.ClearField("raw_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        for key, value in said.items():
            weights.external_data.add(key=key, value=value)

    return change


def _operator(model: Any) -> None:
    model.graph.node[0].domain = "custom"


def _fused(model: Any) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.microsoft", "Attention"


def _loop(model: Any) -> None:
    model.graph.node[0].attribute.add(name="body", type=5, g=onnx.GraphProto())


def _function(model: Any) -> None:
    model.functions.append(onnx.FunctionProto(name="Add", domain="x"))


def _large(model: Any) -> None:
    model.graph.initializer[0].dims.append(2**40)


def _negative(model: Any) -> None:
    model.graph.initializer[0].dims.append(-1)


def _texts(model: Any) -> None:
    model.graph.initializer[0].data_type = onnx.TensorProto.STRING


def _sparse(model: Any) -> None:
    model.graph.sparse_initializer.add()


def _no_output(model: Any) -> None:
    del model.graph.output[:]


GRAPHS: dict[str, tuple[Graph, str]] = {
    **{
        f"weights in {place}": (elsewhere(location=place), "not a file of this bundle")
        for place in ("/etc/passwd", "../outside.bin", "x/../../y", "link", "", "..", "decoder\\x")
    },
    "no place": (elsewhere(offset="0"), "not a file of this bundle"),
    "memory": (elsewhere(location="*/_ORT_MEM_ADDR_/*"), "not a file of this bundle"),
    "an offset": (elsewhere(location="decoder.gguf", offset="99999999"), "not within"),
    "a negative offset": (elsewhere(location="decoder.gguf", offset="-4"), "odd words"),
    "another length": (elsewhere(location="decoder.gguf", length="5"), "not within"),
    "a custom operator": (_operator, "the operator"),
    "an operator that no export writes": (_fused, "the operator 'Attention' of 'com.microsoft'"),
    "a graph in a node": (_loop, "a graph or a sparse tensor in a node"),
    "functions": (_function, "functions"),
    "a tensor larger than memory": (_large, "larger than any memory"),
    "a negative size": (_negative, "larger than any memory"),
    "texts": (_texts, "of the type 8"),
    "sparse tensors": (_sparse, "sparse"),
    "no output": (_no_output, "0 outputs"),
}


@pytest.mark.fault(
    "Bundles", "a graph that names files outside of the bundle or foreign operators", "refused"
)
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_no_export_writes(bundle: Path, name: str) -> None:
    (bundle / "link").symlink_to(bundle.parent / "outside.bin")
    (bundle.parent / "outside.bin").write_bytes(bytes(1 << 20))
    model, (change, says) = onnx.load(built_in() / "projector.onnx"), GRAPHS[name]
    change(model)
    replaced(bundle, "projector.onnx", model.SerializeToString())
    refused(lambda: edgevlm.load(bundle, cache=False), BundleCorrupt, says)


def test_weights_in_a_file_of_the_bundle(tmp_path: Path) -> None:
    model = onnx.load(built_in() / "projector.onnx")
    path = tmp_path / "x.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="x.data", size_threshold=0)
    check_graph(path, {"x.onnx", "x.data"})
    refused(lambda: check_graph(path, {"x.onnx"}), BundleCorrupt, "not a file of this bundle")


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x3a\xff\xff\xff\x7f", b"\x3a\x00", b"\x0b"])
def test_what_is_no_graph(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(data)
    refused(lambda: check_graph(path, ()), BundleCorrupt, "not a graph that can be loaded")

"""Bundles put together from published GGUF files: a decoder's and llama.cpp's projector file."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

import edgevlm
from edgevlm.benchmarks.peers.mmproj import write_mmproj
from edgevlm.bundle import Bundle, open_bundle
from edgevlm.errors import SourceError
from edgevlm.export import ReadOptions, export_bundle, pipeline
from edgevlm.export.checkpoint.published import Choice, Published, choose
from edgevlm.export.gguf.mmproj import connector_name, projector_of, tower_name
from edgevlm.export.onnx import storage
from tests.checkpoints.llava import write_llava
from tests.checkpoints.smolvlm import write_smolvlm
from tests.hub import COMMIT, ROOT, serve
from tests.test_export_light import COMMAND, light

pytestmark = pytest.mark.usefixtures("children_inside")

DECODER, MMPROJ = "tiny-Q8_0.gguf", "mmproj-tiny-f16.gguf"
Change = Callable[[str, Any, Type], tuple[str, Any, Type] | None]


def unchanged(name: str, values: Any, kind: Type) -> tuple[str, Any, Type]:
    """A change of a tensor that is none."""
    return name, values, kind


def rewritten(
    source: Path,
    target: Path,
    keys: Mapping[str, Any] | None = None,
    change: Change = unchanged,
) -> Path:
    """A GGUF file with other values of keys, and other tensors or without some."""
    reader = gguf.GGUFReader(source)
    said = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    arch = {**{n: f.contents() for n, f in said.items()}, **(keys or {})}["general.architecture"]
    writer = gguf.GGUFWriter(target, arch)
    for name, found in said.items():
        if name != "general.architecture":
            kind = found.types[-1] if len(found.types) > 1 else None
            writer.add_key_value(
                name, (keys or {}).get(name, found.contents()), found.types[0], kind
            )
    for tensor in reader.tensors:
        changed = change(tensor.name, np.asarray(tensor.data), tensor.tensor_type)
        if changed:
            writer.add_tensor(changed[0], changed[1], raw_dtype=changed[2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Values that half precision holds, so that nothing is lost on the way.
    return write_smolvlm(tmp_path_factory.mktemp("smolvlm") / "original", dtype="float16")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    return export_bundle(checkpoint, out, quant="q8_0", vision_precision="fp32", verify=False)


@pytest.fixture(scope="module")
def files(checkpoint: Path, exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files alone, with keys as llama.cpp's converter writes them."""
    folder = tmp_path_factory.mktemp("files")
    job = pipeline.read(checkpoint)
    whole = folder.with_suffix(".gguf")
    write_mmproj(job.model, job.parts, whole)
    rewritten(whole, folder / MMPROJ, {"clip.vision.attention.layer_norm_epsilon": 1e-5})
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.pre": "smollm"}
    rewritten(exported.path("decoder"), folder / DECODER, keys)
    return folder


@pytest.fixture
def published(checkpoint: Path, files: Path, tmp_path: Path) -> Path:
    """A folder with the two files and the original's settings."""
    folder = tmp_path / "tiny-GGUF"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(files, folder, dirs_exist_ok=True)
    return folder


def put_together(folder: Path, out: Path, **options: Any) -> Bundle:
    return export_bundle(folder, out, **{"vision_precision": "fp32", **options})


def answered(bundle: Bundle) -> str:
    with edgevlm.load(bundle.folder) as vlm:
        return vlm.ask("What is it?", ROOT / "examples/shapes.png", max_tokens=12).text


def features(bundle: Bundle) -> Any:
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    rows = storage.run(bundle.path("vision"), "pixels", pixels)
    return storage.run(bundle.path("projector"), "features", rows)


def test_it_answers_as_the_exported_one(published: Path, exported: Bundle, tmp_path: Path) -> None:
    made = put_together(published, tmp_path / "out")
    manifest = made.manifest
    assert manifest.components["decoder"].precision == "q8_0"
    assert not manifest.parity and DECODER in manifest.notes[0] and MMPROJ in manifest.notes[0]
    assert "not compared with the original" in manifest.notes[0]
    assert {record.file for record in manifest.source} >= {DECODER, MMPROJ, "config.json"}
    ours, theirs = (gguf.GGUFReader(b.path("decoder")) for b in (made, exported))
    for name in ("tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.tokens"):
        assert ours.fields[name].contents() == theirs.fields[name].contents()
    # Half precision in the file, as in the checkpoint.
    assert (features(made) == features(exported)).all()
    assert answered(made) == answered(exported)


def test_neither_torch_nor_transformers_is_needed(published: Path, tmp_path: Path) -> None:
    done = light(COMMAND, "export", published, tmp_path / "out", "--quant", "q8_0")
    assert done.returncode == 0, done.stderr
    assert f"Note: put together from published GGUF files ({DECODER}, {MMPROJ})" in done.stderr


def test_an_mmproj_in_eight_bits_and_with_older_names(
    published: Path, exported: Bundle, tmp_path: Path
) -> None:
    def older(name: str, values: Any, kind: Type) -> tuple[str, Any, Type]:
        """Eight bits where rows allow it, and the feed-forward net's maps the other way round."""
        swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
        name = ".".join(swap.get(part, part) for part in name.split("."))
        if kind == Type.F16 and values.ndim == 2:
            values, kind = gguf.quants.quantize(values.astype(np.float32), Type.Q8_0), Type.Q8_0
        return name, values, kind

    rewritten(published / MMPROJ, tmp_path / "mmproj-tiny-Q8_0.gguf", change=older)
    (published / MMPROJ).unlink()
    shutil.copy(tmp_path / "mmproj-tiny-Q8_0.gguf", published)
    ours, theirs = features(put_together(published, tmp_path / "out")), features(exported)
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert 1e-4 < difference < 0.02


def test_llavas_file_is_read(tmp_path: Path) -> None:
    folder = write_llava(tmp_path / "original", layout="hf", dtype="float16")
    exported = export_bundle(folder, tmp_path / "whole", quant="f16", verify=False)
    job = pipeline.read(folder)
    write_mmproj(job.model, job.parts, folder / "mmproj-f16.gguf")
    shutil.copy(exported.path("decoder"), folder / "tiny-f16.gguf")
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    made = export_bundle(folder, tmp_path / "out")
    for role in ("vision", "projector"):
        assert made.path(role).read_bytes() == exported.path(role).read_bytes()


def test_names_are_those_of_llama_cpps_converter(checkpoint: Path) -> None:
    model = pipeline.read(checkpoint).model
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, model.vision.num_hidden_layers)
    projector = projector_of(model)
    assert projector
    ours = {f"model.vision_model.{n}": tower_name(n) for n in model.vision.tensors()}
    for name in model.projector.tensors():
        ours[f"model.connector.modality_projection.{name}"] = connector_name(name, projector)
    for theirs, name in ours.items():
        assert known.get_name(theirs, (".weight", ".bias")) == name


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("paligemma", "mmproj files are not read for a siglip tower with a linear connector"),
        ("llava", "does not say all of its vision tower"),
    ],
)
def test_models_whose_files_are_not_known(
    family: str, says: str, paligemma_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if family == "llava":
        write_llava(folder)
        (folder / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    else:
        shutil.copytree(paligemma_checkpoint, folder)
    for weights in (*folder.glob("*.safetensors*"), *folder.glob("*.bin*")):
        weights.unlink()
    for name in ("mmproj.gguf", "model.gguf"):
        (folder / name).touch()
    with pytest.raises(SourceError, match=says):
        pipeline.read(folder)


def damaged(published: Path, file: str, change: Change, **keys: Any) -> None:
    kept = published / file
    other = kept.rename(published.parent / file)
    rewritten(other, kept, keys, change)


def lacking(name: str) -> Change:
    return lambda found, *rest: None if found == name else (found, *rest)


def narrower(name: str) -> Change:
    return lambda found, values, kind: (found, values[1:] if found == name else values, kind)


@pytest.mark.parametrize(
    ("file", "change", "keys", "says"),
    [
        (MMPROJ, lacking("mm.model.fc.weight"), {}, "lacks mm.model.fc.weight"),
        (MMPROJ, narrower("v.blk.1.attn_q.bias"), {}, r"v.blk.1.attn_q.bias has shape \[63\]"),
        (MMPROJ, lambda n, *r: (n.replace("ln1.bias", "ln3.bias"), *r), {}, "lacks v.blk.0.ln1"),
        (MMPROJ, unchanged, {"clip.projector_type": "ldp"}, "projector_type is 'ldp'"),
        (MMPROJ, unchanged, {"clip.vision.image_size": 64}, "image_size is 64"),
        (DECODER, lacking("output.weight"), {}, "lacks output.weight"),
        (DECODER, narrower("blk.0.ffn_up.weight"), {}, r"blk.0.ffn_up.weight has shape \[511"),
        (DECODER, lambda n, *r: (n.replace("output.w", "odd.w"), *r), {}, "odd.weight is not a"),
        (DECODER, unchanged, {"general.architecture": "qwen2"}, "is a qwen2 decoder"),
        (DECODER, unchanged, {"llama.rope.freq_base": 1e4}, "rope.freq_base is 10000"),
        (DECODER, unchanged, {"llama.attention.head_count": 8}, "head_count is 8"),
        (DECODER, unchanged, {"general.file_type": 99}, "file_type 99"),
    ],
)  # fmt: skip
def test_another_models_file_is_refused(
    published: Path, tmp_path: Path, file: str, change: Change, keys: dict[str, Any], says: str
) -> None:
    damaged(published, file, change, **keys)
    with pytest.raises(SourceError, match=says) as refused:
        put_together(published, tmp_path / "out")
    assert str(refused.value).startswith(f"{published / file}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "text", "says"),
    [(300, "strange", "token 300 is 'strange'"), (None, "one more", "tokens, the tokenizer")],
)
def test_a_foreign_vocabulary_is_refused(
    published: Path, tmp_path: Path, row: int | None, text: str, says: str
) -> None:
    fields = gguf.GGUFReader(published / DECODER).fields
    tokens = list(fields["tokenizer.ggml.tokens"].contents())
    tokens[slice(None) if row is None else row] = [*tokens, text] if row is None else text
    damaged(published, DECODER, unchanged, **{"tokenizer.ggml.tokens": tokens})
    with pytest.raises(SourceError, match=says):
        put_together(published, tmp_path / "out")


def test_rows_that_no_token_has_may_be_called_anything(published: Path, tmp_path: Path) -> None:
    tokens = list(gguf.GGUFReader(published / DECODER).fields["tokenizer.ggml.tokens"].contents())
    tokens[-1] = "[PAD]"
    damaged(published, DECODER, unchanged, **{"tokenizer.ggml.tokens": tokens})
    assert pipeline.read(published).ready


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quant": "q4_k_m"}, "has no decoder in q4_k_m; choose from q8_0"),
        ({"verify": True}, "--verify needs the original's weights"),
        ({"imatrix": True}, "--imatrix needs the original's weights"),
        ({"adapter": "lora"}, "cannot be joined with GGUF files"),
    ],
)
def test_options_that_need_the_original(
    published: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    (tmp_path / "lora").mkdir()
    if "adapter" in options:
        options = {"adapter": tmp_path / "lora"}
    with pytest.raises(SourceError, match=says):
        put_together(published, tmp_path / "out", **options)


def test_settings_that_are_nowhere(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "alone"
    shutil.copytree(files, folder)
    with pytest.raises(SourceError, match=r"no card that names one base_model"):
        pipeline.read(folder, ReadOptions())


SMOL = (
    "SmolVLM-Q8_0.gguf",
    "SmolVLM-f16.gguf",
    "mmproj-SmolVLM-Q8_0.gguf",
    "mmproj-SmolVLM-f16.gguf",
)
MANY = (
    "m-Q2_K.gguf",
    "m-Q3_K_L.gguf",
    "m-Q4_0.gguf",
    "m-Q4_K_M.gguf",
    "m.BF16.gguf",
    "mmproj-F32.gguf",
)


@pytest.mark.parametrize(
    ("names", "choice", "decoder", "mmproj"),
    [
        (SMOL, Choice(), "SmolVLM-Q8_0.gguf", "mmproj-SmolVLM-f16.gguf"),
        (SMOL, Choice("f16", True), "SmolVLM-f16.gguf", "mmproj-SmolVLM-f16.gguf"),
        (MANY, Choice(), "m-Q4_K_M.gguf", "mmproj-F32.gguf"),
        (MANY, Choice("q4_0"), "m-Q4_0.gguf", "mmproj-F32.gguf"),
        (MANY, Choice("q5_k_m"), "m-Q4_0.gguf", "mmproj-F32.gguf"),
        (MANY, Choice("q2_k", True), "m-Q2_K.gguf", "mmproj-F32.gguf"),
        (("model.gguf", "mmproj.gguf"), Choice("q8_0", True), "model.gguf", "mmproj.gguf"),
    ],
)  # fmt: skip
def test_the_choice_among_files(
    names: tuple[str, ...], choice: Choice, decoder: str, mmproj: str
) -> None:
    assert choose(names, choice, "here") == Published(decoder, mmproj)


@pytest.mark.parametrize(
    ("names", "choice", "says"),
    [
        (("m-Q4_0.gguf",), Choice(), "no mmproj file"),
        (("mmproj-F16.gguf", "m-Q8_0-00001-of-00002.gguf"), Choice(), "no decoder in one GGUF"),
        (SMOL, Choice("q4_0", True), "no decoder in q4_0; choose from f16, q8_0"),
        (("a-Q4_0.gguf", "b-Q4_0.gguf", "mmproj.gguf"), Choice(), "several decoders"),
    ],
)
def test_a_choice_that_there_is_not(names: tuple[str, ...], choice: Choice, says: str) -> None:
    with pytest.raises(SourceError, match=says):
        choose(names, choice, "here")


PULL = ("pull", "org/tiny-GGUF", "--name", "tiny")


def pulled(hub: Any, home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = hub.edgevlm(home, *PULL, *options)
    return done


def test_pulled_with_its_settings(published: Path, tmp_path: Path) -> None:
    shutil.copy(published / DECODER, published / "tiny-f16.gguf")
    with serve(tiny_GGUF=published) as hub:
        done = pulled(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"Note: put together from published GGUF files ({DECODER}, {MMPROJ})" in done.stderr
        assert not [path for path in hub.asked if path.endswith("/tiny-f16.gguf")]
        assert "downloaded already" in pulled(hub, tmp_path, "--target", "laptop").stderr
        refused = pulled(hub, tmp_path, "--verify", "--quant", "q8_0", "--name", "other")
        assert refused.returncode == 1 and "nothing to compare them" in refused.stderr
    bundle = open_bundle(tmp_path / "edgevlm/models/tiny")
    assert bundle.manifest.origin == f"org/tiny-GGUF@{COMMIT}"


def test_pulled_with_the_settings_of_the_original(
    checkpoint: Path, files: Path, exported: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(files, folder)
    with serve(tiny_GGUF=folder, original=checkpoint) as hub:
        refused = pulled(hub, tmp_path)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert "no card that names one base_model" in refused.stderr
        (folder / "README.md").write_text(
            "---\nlicense: mit\nbase_model: org/missing\n---\n", "utf-8"
        )
        refused = pulled(hub, tmp_path)
        assert refused.returncode == 1 and "org/missing: is neither" in refused.stderr
        (folder / "README.md").write_text(
            "---\nlicense: mit\nbase_model:\n- org/original\n---\n", "utf-8"
        )
        done = pulled(hub, tmp_path, "--vision-precision", "fp32")
        assert done.returncode == 0, done.stderr
        assert f"the settings of org/original@{COMMIT}" in " ".join(done.stderr.split())
        assert not [path for path in hub.asked if path.endswith(".safetensors")]
        assert pulled(hub, tmp_path).returncode == 0
    bundle = open_bundle(tmp_path / "edgevlm/models/tiny")
    manifest = json.loads((bundle.folder / "edgevlm.json").read_text(encoding="utf-8"))
    assert (manifest["license"], manifest["origin"]) == ("mit", f"org/tiny-GGUF@{COMMIT}")
    assert answered(bundle) == answered(exported)

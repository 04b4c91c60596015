"""Adapters beside a base or instead of one: merged, or refused with the cure; never passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgevlm
from edgevlm.bundle import Bundle
from edgevlm.errors import ParityError, SourceError
from edgevlm.export import export_bundle
from edgevlm.export.checkpoint import hub, lora
from edgevlm.export.checkpoint.source import read_tensors
from edgevlm.export.components import Job
from edgevlm.export.options import ReadOptions
from edgevlm.export.pipeline import read
from tests.checkpoints.adapters import (
    PREFIX,
    shapes_of,
    write_adapter,
    write_llava_lora,
    write_projector,
    write_state,
)
from tests.checkpoints.llava import write_llava
from tests.checkpoints.paligemma import write_paligemma
from tests.checkpoints.tinygptv import write_tinygptv
from tests.checkpoints.vocabulary import write_json
from tests.test_llava import PICTURE
from tests.tinygptv_sources import SMALL

pytestmark = pytest.mark.usefixtures("children_inside")

TEXT = "language_model.model.layers.0."
TOWER = "vision_tower.vision_model.encoder.layers.0."
Q, UP = f"{TEXT}self_attn.q_proj", f"{TEXT}mlp.up_proj"
MODULES = [Q, f"{TEXT}self_attn.v_proj", f"{TEXT}mlp.down_proj"]
EVERYWHERE = [
    *MODULES,
    f"{TOWER}self_attn.q_proj",
    f"{TOWER}mlp.fc1",
    "vision_tower.vision_model.embeddings.patch_embedding",
    "multi_modal_projector.linear",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_paligemma(tmp_path_factory.mktemp("base") / "base", layers=2)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava") / "llava", layout="hf", layers=1)


def prepared(source: Path, adapter: Path | None = None) -> Job:
    return read(source, ReadOptions(adapter=adapter))


def exported(source: Path, out: Path, **options: Any) -> Bundle:
    return export_bundle(source, out, quant="f32", vision_precision="fp32", **options)


def values(path: Path) -> dict[str, NDArray[np.float32]]:
    return {t.name: t.float32() for t in read_tensors(path)}


def merged(base: Path, adapter: Path, module: str, scale: float) -> NDArray[np.float32]:
    """W + scale * B @ A, plainly."""
    own = values(adapter / "adapter_model.safetensors")
    a, b = (own[f"{PREFIX}{module}.lora_{x}.weight"] for x in "AB")
    whole = values(base / "model.safetensors")[f"{module}.weight"]
    product = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    total: NDArray[np.float32] = whole + np.float32(scale) * product.reshape(whole.shape)
    return total


def test_an_adapter_in_the_checkpoints_own_folder(base: Path, tmp_path: Path) -> None:
    """As transformers' from_pretrained of such a folder adds it where peft is installed."""
    source = Path(shutil.copytree(base, tmp_path / "tuned"))
    write_adapter(source, shapes_of(base), [Q], r=8, lora_alpha=16, target_modules=["q_proj"])
    bundle = exported(source, tmp_path / "out")
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert bundle.manifest.notes == ("adapter tuned (LoRA of rank 8, alpha 16): 1 tensor merged",)
    files = [record.file for record in bundle.manifest.source]
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= set(files)
    assert len(files) == len(set(files))
    plain = exported(base, tmp_path / "plain", verify=False)
    with edgevlm.load(bundle.folder) as tuned, edgevlm.load(plain.folder) as untuned:
        a, b = (v.score("caption en", ["a cat"], PICTURE) for v in (tuned, untuned))
        assert not np.allclose(a, b, atol=1e-3)


CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 2.0),
    "alpha": ({"lora_alpha": 3}, 0.75),
    "rslora": ({"use_rslora": True}, 4.0),
    "alpha_pattern": ({"alpha_pattern": {"q_proj": 20, "up_proj": 1}}, 5.0),
    "alpha_pattern-path": ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, 0.5),
    "rank_pattern": ({"rank_pattern": {"q_proj": 2}, "ranks": {Q: 2}}, 4.0),
    "regex": ({"target_modules": r".*language_model.*\.(q|v|down)_proj"}, 2.0),
    "all-linear": ({"target_modules": "all-linear"}, 2.0),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, 2.0),  # peft turns it off for linear maps
    "layers": (
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": 0},
        2.0,
    ),
    "bfloat16": ({"dtype": "bfloat16", "revision": None, "peft_version": "0.19.0"}, 2.0),
    "adapter-name": ({}, 2.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_is_the_sum_that_peft_makes(name: str, base: Path, tmp_path: Path) -> None:
    options, scale = CONFIGS[name]
    adapter = write_adapter(tmp_path / "adapter", shapes_of(base), MODULES, **options)
    expected = [merged(base, adapter, m, scale) for m in (Q, MODULES[2])]
    if name == "adapter-name":
        own = values(adapter / "adapter_model.safetensors")
        named = {n.replace(".weight", ".default.weight"): v for n, v in own.items()}
        bare = {n.removeprefix(PREFIX): v for n, v in named.items()}
        write_state(adapter / "adapter_model.safetensors", bare, "float32")
    found = prepared(base, adapter).parts["decoder"]
    matrix = found["layers.0.self_attn.q_proj.weight"].float32()
    np.testing.assert_allclose(matrix, expected[0], rtol=1e-5, atol=1e-6)
    if "pattern" not in name:
        matrix = found["layers.0.mlp.down_proj.weight"].float32()
        np.testing.assert_allclose(matrix, expected[1], rtol=1e-5, atol=1e-6)


def renamed(name: str) -> str:
    """A module of PaliGemma or LLaVA as transformers has called it since 4.52."""
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}"


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("names", ["old", "new"])
def test_it_is_verified_in_every_part(base: Path, names: str, weights: str, tmp_path: Path) -> None:
    shapes, modules = shapes_of(base), EVERYWHERE
    if names == "new":
        shapes = {renamed(name): shape for name, shape in shapes.items()}
        modules = [renamed(name) for name in modules]
    adapter = write_adapter(
        tmp_path / "vqa", shapes, modules, weights=weights, use_rslora=True, lora_alpha=3
    )
    bundle = exported(base, tmp_path / "out", adapter=adapter)
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert "7 tensors merged" in bundle.manifest.notes[0]
    assert f"adapter/adapter_model.{weights}" in {r.file for r in bundle.manifest.source}


def test_what_was_trained_whole_replaces_the_bases(base: Path, tmp_path: Path) -> None:
    names = ["multi_modal_projector.linear.weight", "multi_modal_projector.linear.bias"]
    biases = [f"{TOWER}self_attn.q_proj.bias", f"{TOWER}layer_norm1.bias"]
    shapes = shapes_of(base)
    adapter = write_adapter(
        tmp_path / "adapter",
        shapes,
        [*MODULES, f"{TOWER}self_attn.q_proj"],
        whole=[*names, *biases],
        modules_to_save=["multi_modal_projector"],
        bias="all",
    )
    own = values(adapter / "adapter_model.safetensors")
    # As peft calls the bias of a module that it has wrapped.
    wrapped = {n.replace("q_proj.bias", "q_proj.base_layer.bias"): v for n, v in own.items()}
    write_state(adapter / "adapter_model.safetensors", wrapped, "float32")
    bundle = exported(base, tmp_path / "out", adapter=adapter)
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert "4 tensors merged, 4 tensors taken whole" in bundle.manifest.notes[0]
    found = prepared(base, adapter).parts["projector"]["linear.weight"]
    np.testing.assert_array_equal(found.float32(), own[PREFIX + names[0]])


def test_an_adapter_of_llava_in_transformers_layout(llava: Path, tmp_path: Path) -> None:
    shapes = shapes_of(llava)
    modules = [Q, UP, "multi_modal_projector.linear_2", "language_model.lm_head", f"{TOWER}mlp.fc2"]
    adapter = write_adapter(tmp_path / "adapter", shapes, modules)
    own = values(adapter / "adapter_model.safetensors")
    rng, table = np.random.default_rng(1), "language_model.model.embed_tokens"
    rows, width = shapes[f"{table}.weight"]
    own[f"{PREFIX}{table}.lora_embedding_A"] = rng.normal(size=(4, rows)).astype("f4")
    own[f"{PREFIX}{table}.lora_embedding_B"] = rng.normal(size=(width, 4)).astype("f4")
    write_state(adapter / "adapter_model.safetensors", own, "float32")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"].append("embed_tokens")
    write_json(adapter / "adapter_config.json", config)
    bundle = exported(llava, tmp_path / "out", adapter=adapter)
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert "6 tensors merged" in bundle.manifest.notes[0]


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "ldpnet"])
@pytest.mark.parametrize("named", [True, False])
def test_llavas_own_lora(projector: str, named: bool, tmp_path: Path) -> None:
    """A decoder of LLaMA's, an adapter with the model's config, and a projector trained whole."""
    base, tuned = write_llava_lora(tmp_path, projector=projector, layers=1)
    how = {"adapter": tuned} if named else {}
    bundle = exported(base if named else tuned, tmp_path / "out", **how)
    assert all(stage.ok for stage in bundle.manifest.parity)
    assert bundle.manifest.family == "llava" and bundle.manifest.image.fit == "pad"
    whole = len([n for n in shapes_of(tmp_path / "whole") if ".mm_projector." in n])
    assert f"7 tensors merged, {whole} tensors taken whole" in bundle.manifest.notes[0]
    files = {record.file for record in bundle.manifest.source}
    assert {"adapter/non_lora_trainables.bin", "adapter/config.json"} <= files


def test_llavas_projector_that_was_trained_alone(tmp_path: Path) -> None:
    base, tuned = write_llava_lora(tmp_path, projector="mlp2x_gelu", layers=1, lora=False)
    bundle = exported(base, tmp_path / "out", adapter=tuned)
    assert all(stage.ok for stage in bundle.manifest.parity)
    with pytest.raises(SourceError) as raised:
        prepared(tuned)
    assert str(raised.value) == (
        f"{tuned / 'mm_projector.bin'}: is only what was trained; name its base, which was {base} "
        "and this folder (edgevlm export BASE OUT --adapter FOLDER)"
    )
    # Both in one folder are a model.
    shutil.copy(tuned / "mm_projector.bin", base)
    shutil.copy(tuned / "config.json", base)
    assert "4 tensors taken whole" in prepared(base).tensors.notes[0]


def test_a_projector_beside_weights_that_have_one_is_only_mentioned(tmp_path: Path) -> None:
    source = write_llava(tmp_path / "source", layers=1)
    write_projector(source, {"model.mm_projector.0.weight": np.ones((1, 1), np.float32)})
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"):
        (source / name).write_bytes(b"x")
    write_state(source / "consolidated.safetensors", {"x": np.ones(1, np.float32)}, "float32")
    (source / "pytorch_model.bin").write_bytes(b"x")
    notes = prepared(source).model.notes
    assert "not read: consolidated.safetensors, mm_projector.bin, pytorch_model.bin" in notes


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "style.lora", "my_adapter.pt"]
)
def test_adapters_of_other_kinds_are_not_passed_over(name: str, base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    write_state(
        source / "x.safetensors", {"lora_unet.lora_down": np.ones(1, np.float32)}, "float32"
    )
    (source / "x.safetensors").rename(source / name)
    with pytest.raises(SourceError, match=f"{name}: is an adapter in a layout that is not peft's"):
        prepared(source)


def test_an_adapter_without_its_config(base: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(base, tmp_path / "source"))
    write_adapter(source, shapes_of(base), MODULES)
    (source / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match=r"is an adapter without its adapter_config\.json"):
        prepared(source)
    (source / "adapter_model.safetensors").unlink()
    write_json(source / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(SourceError, match=r"but no adapter_model\.safetensors or adapter_model\.b"):
        prepared(source)


def test_the_base_is_found_where_the_adapter_says(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(
        tmp_path / "vqa", shapes_of(base), MODULES, base_model_name_or_path=str(base)
    )
    job = prepared(adapter)
    assert job.name == "vqa" and job.checkpoint.folder == base and job.adapter
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    asked = []

    def locate(name: str, *_: object) -> tuple[Path, str]:
        asked.append(name)
        return (adapter, "vqa") if Path(name).is_dir() else (base, "base")

    monkeypatch.setattr(hub, "locate", locate)
    named = {"base_model_name_or_path": "google/paligemma", "revision": "main"}
    write_json(adapter / "adapter_config.json", config | named)
    assert prepared(adapter).checkpoint.folder == base
    assert asked[-1] == "google/paligemma@main"


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (None, "is an adapter and names no base_model_name_or_path; name its base and it"),
        ("./nowhere", "is an adapter of ./nowhere, which is not here (./nowhere: no such"),
    ],
)
def test_an_adapter_whose_base_is_not_here(
    named: str | None, says: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(
        tmp_path / "vqa", shapes_of(base), MODULES, base_model_name_or_path=named
    )
    with pytest.raises(SourceError) as raised:
        prepared(adapter)
    assert says in str(raised.value) and "edgevlm export BASE OUT --adapter" in str(raised.value)


def test_whole_weights_beside_an_adapter_of_another_base(base: Path, tmp_path: Path) -> None:
    """They may hold it already."""
    source = Path(shutil.copytree(base, tmp_path / "source"))
    write_adapter(source, shapes_of(base), MODULES, base_model_name_or_path="google/paligemma")
    with pytest.raises(SourceError) as raised:
        prepared(source)
    assert "holds a whole model and an adapter of google/paligemma" in str(raised.value)
    assert f"--adapter {source}) if the model is its base" in str(raised.value)
    assert "3 tensors merged" in prepared(source, source).tensors.notes[0]
    other = write_adapter(tmp_path / "other", shapes_of(base), MODULES)
    with pytest.raises(SourceError, match="only one can be merged"):
        prepared(source, other)


def test_a_tokenizer_or_processor_of_the_adapters_own(base: Path, tmp_path: Path) -> None:
    """Trainers save both into every folder; they are the base's, or nobody would know whose."""
    adapter = write_adapter(tmp_path / "vqa", shapes_of(base), MODULES)
    for name in ("tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(base / name, adapter)
    assert prepared(base, adapter).adapter
    found = json.loads((adapter / "preprocessor_config.json").read_text(encoding="utf-8"))
    (adapter / "preprocessor_config.json").unlink()
    write_json(adapter / "processor_config.json", {"image_processor": found})
    assert prepared(base, adapter).adapter
    write_json(adapter / "processor_config.json", {"image_processor": found | {"resample": 2}})
    with pytest.raises(SourceError, match="vqa: has a picture processor that is not its base's"):
        prepared(base, adapter)
    (adapter / "processor_config.json").unlink()
    config = json.loads((adapter / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["added_tokens_decoder"]["2148"] = config["added_tokens_decoder"]["0"] | {
        "content": "<x>"
    }
    write_json(adapter / "tokenizer_config.json", config)
    with pytest.raises(SourceError, match="vqa: has a tokenizer that is not its base's; merge it"):
        prepared(base, adapter)


def test_an_adapter_in_a_folder_below(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "run" / "default", shapes_of(base), MODULES)
    with pytest.raises(SourceError, match="has adapters in folders below it; name default"):
        prepared(tmp_path / "run")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ia3": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is known, merge it first"),
    "dora": ({"use_dora": True}, "use_dora is True, which is not known; merge it first"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; only True or False"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is True"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication is [[0, 1]]"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"),
    "new": ({"use_something_new": {"x": 1}}, "use_something_new is {'x': 1}"),
    "rank": ({"r": 4, "ranks": {Q: 2}}, "has rank 2, adapter_config.json says 4"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha is 0; it must be a number above 0"),
    "targets": ({"target_modules": ["k_proj"]}, "which target_modules does not name"),
    "excluded": ({"exclude_modules": ["q_proj"]}, "which target_modules does not name"),
    "layers": (
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [1]},
        "which target_modules does not name",
    ),
    "saved": (
        {"modules_to_save": ["lm_head"]},
        "names lm_head, which has no tensor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_lora_is_refused_by_name(name: str, base: Path, tmp_path: Path) -> None:
    config, says = REFUSED[name]
    adapter = write_adapter(tmp_path / "adapter", shapes_of(base), MODULES, **config)
    with pytest.raises(SourceError) as raised:
        prepared(base, adapter)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(own: dict[str, Any]) -> None:
        for name in [n for n in own if old in n]:
            own[name.replace(old, new)] = own.pop(name)

    return change


def tokens(own: dict[str, Any]) -> None:
    name = "language_model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    own[PREFIX + name] = np.ones((1, 256), np.float32)


def cut(own: dict[str, Any]) -> None:
    name = next(n for n in own if n.endswith("q_proj.lora_A.weight"))
    own[name] = own[name][:, :-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename(".q_proj.", ".qq_proj."), "the base has no"),
        (rename("language_model.model", "thinker"), "is of no weight of this model"),
        (rename("layers.0", "layers.7"), "the base has no"),
        (lambda own: own.pop(next(iter(own))), "is there without its lora_A"),
        (cut, "are of another model, the weight is"),
        (
            rename("v_proj.lora_B", "v_proj.lora_magnitude_vector"),
            "no kind of adapter that is know",
        ),
        (rename("v_proj.lora_B.weight", "v_proj.lora_B.bias"), "no kind of adapter that is known"),
        (tokens, "token_adapter.trainable_tokens_delta is of no kind of adapter that is known"),
    ],
)
def test_tensors_that_are_of_no_weight_are_refused_by_name(
    change: Callable[[dict[str, Any]], object], says: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(
        tmp_path / "adapter", shapes_of(base), MODULES, target_modules="all-linear"
    )
    own = values(adapter / "adapter_model.safetensors")
    change(own)
    write_state(adapter / "adapter_model.safetensors", own, "float32")
    with pytest.raises(SourceError) as raised:
        prepared(base, adapter)
    assert says in str(raised.value)
    assert str(adapter / "adapter_model.safetensors") in str(raised.value)


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_one_of_two_uses_of_a_table_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    table, shapes = "language_model.model.embed_tokens", shapes_of(base)
    whole = [f"{table}.weight"] if kind == "whole" else []
    saved: dict[str, Any] = {"modules_to_save": ["embed_tokens"]} if kind == "whole" else {}
    adapter = write_adapter(tmp_path / "adapter", shapes, [Q], whole=whole, **saved)
    if kind == "lora":
        own = values(adapter / "adapter_model.safetensors")
        rows, width = shapes[f"{table}.weight"]
        own[f"{PREFIX}{table}.lora_embedding_A"] = np.ones((4, rows), np.float32)
        own[f"{PREFIX}{table}.lora_embedding_B"] = np.ones((width, 4), np.float32)
        write_state(adapter / "adapter_model.safetensors", own, "float32")
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(adapter / "adapter_config.json", config | {"target_modules": None})
    with pytest.raises(SourceError, match="one of the two uses of a table that is input and outpu"):
        prepared(base, adapter)
    if kind == "whole":
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(adapter / "adapter_config.json", config | {"ensure_weight_tying": True})
        assert "1 tensor taken whole" in prepared(base, adapter).tensors.notes[0]


def test_a_family_that_is_assembled_has_its_adapters_elsewhere(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", shapes_of(base), MODULES)
    source = write_tinygptv(tmp_path / "source", **SMALL)
    with pytest.raises(SourceError, match="has its adapters in a weight file of its own"):
        prepared(source, adapter)


def test_nothing_is_read_before_it_is_needed(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", shapes_of(base), MODULES)
    matrix = prepared(base, adapter).parts["decoder"]["layers.0.self_attn.q_proj.weight"]
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        matrix.raw()


@pytest.mark.parametrize("family", ["paligemma", "llava"])
def test_a_wrong_merge_is_noticed(
    family: str, base: Path, llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison adds the adapter as the model runs, and shares nothing with the merging."""
    source = base if family == "paligemma" else llava
    adapter = write_adapter(tmp_path / "adapter", shapes_of(source), [Q, UP])
    scale = lora._scale
    monkeypatch.setattr(lora, "_scale", lambda *given: 1.1 * scale(*given))
    with pytest.raises(ParityError) as raised:
        exported(source, tmp_path / "out", adapter=adapter)
    assert raised.value.stage == "prefill"


def test_the_command_line_merges_one(base: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgevlm.cli import cli

    adapter = write_adapter(tmp_path / "vqa", shapes_of(base), MODULES)
    words = [str(base), str(tmp_path / "out"), "--dry-run", "--adapter", str(adapter)]
    # By way of the group, whose names of the help option click keeps with the command.
    done = CliRunner().invoke(cli, ["export", *words])
    assert done.exit_code == 0, done.output
    assert "- adapter vqa (LoRA of rank 4, alpha 8): 3 tensors merged" in done.output

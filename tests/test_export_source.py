"""What a checkpoint may look like, and what is said of one that is damaged or unknown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm.errors import ExportError, SourceError, UnknownFamily
from edgevlm.export.checkpoint.source import stated_license
from edgevlm.export.components import Job
from edgevlm.export.options import WriteOptions
from edgevlm.export.pipeline import read
from tests.checkpoints.fastvlm import write_fastvlm
from tests.checkpoints.paligemma import LAYOUTS, Tensors, write_paligemma
from tests.checkpoints.vocabulary import remove_tokenizer, write_json


def job(folder: Path) -> Job:
    return read(folder)


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    write_json(path, data)


def all_values(found: Job) -> dict[str, Any]:
    return {
        f"{part}.{name}": tensor.float32()
        for part, tensors in found.parts.items()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_layout_reads_as_the_same_tensors(
    tmp_path: Path, version: int, layout: str, shards: int
) -> None:
    plain = job(write_paligemma(tmp_path / "plain", version=version))
    other = job(
        write_paligemma(
            tmp_path / "other", version=version, layout=layout, shards=shards, lm_head=True
        )
    )
    expected, found = all_values(plain), all_values(other)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_is_read_as_it_was_stored(tmp_path: Path, dtype: str, error: float) -> None:
    full = all_values(job(write_paligemma(tmp_path / "full")))
    half = all_values(job(write_paligemma(tmp_path / "half", dtype=dtype)))
    for name, values in full.items():
        assert np.abs(half[name] - values).max() <= error * np.abs(values).max()
        assert (half[name] != values).any()


@pytest.mark.parametrize(("size", "tokens"), [(28, 4), (56, 16), (224, 256)])
def test_size_comes_from_the_config(tmp_path: Path, size: int, tokens: int) -> None:
    image = job(write_paligemma(tmp_path, size=size)).model.image
    assert (image.size, image.tokens) == (size, tokens)


def drop(name: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        del tensors[name]

    return edit


def put(name: str, values: Any) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: np.asarray(values, np.float32)})


NORM = "language_model.model.norm.weight"
EMBED = "language_model.model.embed_tokens.weight"


def with_nan(tensors: Tensors) -> None:
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan


def untied(tensors: Tensors) -> None:
    tensors["language_model.lm_head.weight"] = tensors[EMBED] + 1


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (drop(NORM), "lacks the tensor for decoder.norm.weight"),
        (drop("multi_modal_projector.linear.bias"), "lacks the tensor for projector.linear.bias"),
        (drop("vision_tower.vision_model.post_layernorm.bias"), "vision.post_layernorm.bias"),
        (
            put("language_model.model.layers.3.mlp.up_proj.weight", [[1]]),
            "is not a tensor of this model",
        ),
        (put("adapter.weight", [1]), "is unknown to the family 'paligemma'"),
        (put(NORM, [1, 2]), "has shape [2], config.json says [256]"),
        (put("model.language_model.norm.weight", [1]), "are the same"),
        (untied, "differs from language_model.model.embed_tokens.weight"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, edit: Callable[[Tensors], None], says: str
) -> None:
    with pytest.raises(SourceError) as caught:
        job(write_paligemma(tmp_path, edit=edit))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_tables_that_a_config_calls_one(tmp_path: Path) -> None:
    source = write_fastvlm(tmp_path / "source", tied=False, config={"tie_word_embeddings": True})
    with pytest.raises(SourceError, match="write false there to use both"):
        job(source)
    job(write_fastvlm(tmp_path / "cured", tied=False))


@pytest.mark.fault("Export", "weights that are not numbers", "refused by the tensor's name")
def test_nan_is_refused_where_it_is_read(tmp_path: Path) -> None:
    found = job(write_paligemma(tmp_path, edit=with_nan))
    with pytest.raises(SourceError, match=r"up_proj.weight holds NaN or infinity"):
        found.parts["decoder"]["layers.1.mlp.up_proj.weight"].raw()


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\x10")


def garbage_header(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"?" * 32
    path.write_bytes(data)


def remove_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def swap_shards(folder: Path) -> None:
    a, b = (folder / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)


def remove_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def empty_index(folder: Path) -> None:
    write_json(folder / "model.safetensors.index.json", {"metadata": {}})


def forget_in_index(folder: Path) -> None:
    edit_json(folder / "model.safetensors.index.json", lambda d: d["weight_map"].pop(NORM) and None)


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def only_others(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.ckpt").write_bytes(b"x")


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def config_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]", encoding="utf-8")


def config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", change)


def set_key(*path: str, to: Any) -> Callable[[Path], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return config(change)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "model-00002-of-00003.safetensors: is truncated"),
        (cut_header, "is truncated or no safetensors file"),
        (garbage_header, "its header is damaged"),
        (remove_shard, "model-00003-of-00003.safetensors: is missing"),
        (swap_shards, "which model.safetensors.index.json promises"),
        (remove_index, "has weights but no model.safetensors.index.json"),
        (empty_index, "has no 'weight_map'"),
        (forget_in_index, "which model.safetensors.index.json does not know"),
        (only_pickles, "pytorch_model.bin: not a torch.save file"),
        (only_others, "model.ckpt: only model.safetensors and pytorch_model.bin are read"),
        (no_weights, "has no model.safetensors and no"),
        (no_config, "has no config.json"),
        (config_not_json, "config.json: cannot be read as JSON"),
        (config_a_list, "config.json: must hold a JSON object"),
        (remove_tokenizer, "has no tokenizer.model or tokenizer.json"),
        (config(lambda d: d.pop("model_type") and None), "has no 'model_type'"),
        (set_key("quantization_config", to={"quant_method": "bitsandbytes"}), "(bitsandbytes)"),
        (set_key("text_config", to=7), "text_config is 7, not an object"),
        (set_key("text_config", "hidden_size", to="wide"), "config.json"),
        (set_key("text_config", "num_hidden_layers", to=4), "lacks the tensor"),
        (set_key("text_config", "model_type", to="mamba"), "'mamba' is not one of"),
        (set_key("text_config", "hidden_activation", to="relu"), "hidden_activation is 'relu'"),
        (set_key("text_config", "rope_scaling", to={"type": "linear"}), "scales its positions"),
        (set_key("vision_config", "image_size", to=60), "not a multiple of patch_size"),
    ],
)
@pytest.mark.fault(
    "Export",
    "a checkpoint with damaged or missing files",
    "one line that names the file",
)
def test_damaged_folders(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = write_paligemma(tmp_path / "checkpoint", shards=3)
    damage(folder)
    with pytest.raises(SourceError) as caught:
        job(folder)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_family_names_the_known_ones(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path)
    edit_json(folder / "config.json", lambda d: d.update(model_type="gpt5"))
    with pytest.raises(UnknownFamily, match=r"config.json: 'gpt5'.*paligemma"):
        job(folder)


def test_tensors_that_the_model_never_reads_are_left_out(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        width = 64
        head = "vision_tower.vision_model.head."
        tensors[head + "probe"] = np.zeros((1, 1, width), np.float32)
        tensors[head + "mlp.fc1.bias"] = np.zeros(width, np.float32)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = np.zeros((1, 16), np.float32)
        name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.zeros(32, np.float32)

    found = job(write_paligemma(tmp_path / "odd", edit=add)).parts
    plain = job(write_paligemma(tmp_path / "plain")).parts
    assert {p: set(t) for p, t in found.items()} == {p: set(t) for p, t in plain.items()}


@pytest.mark.parametrize(
    ("quant", "vision", "says"), [("q3", "fp32", "'q3'"), ("f32", "fp8", "'fp8'")]
)
def test_unknown_precisions_name_the_known_ones(quant: str, vision: str, says: str) -> None:
    with pytest.raises(ExportError, match=f"{says} is not known; choose from"):
        WriteOptions.checked(quant, vision)


def test_a_file_is_no_source(paligemma_checkpoint: Path) -> None:
    with pytest.raises(SourceError, match="is a file; name the checkpoint's folder"):
        job(paligemma_checkpoint / "config.json")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        job(tmp_path / "nowhere")


def test_weights_are_read_only_when_needed(tmp_path: Path) -> None:
    folder = write_paligemma(tmp_path)
    found = job(folder)
    shutil.rmtree(folder)
    with pytest.raises(SourceError, match="cannot be read"):
        found.parts["decoder"]["norm.weight"].raw()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model", "apache-2.0"),
        ("# Model\nlicense: mit", None),
        ("---\nlanguage: en\n---\nlicense: mit", None),
        (None, None),
    ],
)
def test_the_model_card_states_the_licence(
    tmp_path: Path, card: str | None, licence: str | None
) -> None:
    if card:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert stated_license(tmp_path) == licence

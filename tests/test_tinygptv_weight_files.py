"""What TinyGPT-V is put together from: which file is what, what is refused, what can be stated."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgevlm.errors import SourceError
from edgevlm.parts.phi2 import Phi2
from edgevlm.parts.qformer import QFormer
from tests.checkpoints.tinygptv import write_tinygptv
from tests.tinygptv_sources import SMALL, prepared

pytestmark = pytest.mark.usefixtures("children_inside")


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites what a file of torch or JSON holds; `change` edits it, or returns another."""
    if path.suffix == ".json":
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(change(data) or data), encoding="utf-8")
        return
    saved = torch.load(path, weights_only=True)
    torch.save(change(saved) or saved, path)


def without(*words: str) -> Callable[[dict[str, Any]], Any]:
    """A change that takes all tensors away whose names have one of these words."""

    def change(saved: dict[str, Any]) -> None:
        state = saved.get("model", saved)
        for name in [n for n in state if any(word in n for word in words)]:
            del state[name]

    return change


def set_to(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data.update(values)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    """A change of the names of a file's tensors."""

    def change(saved: dict[str, Any]) -> None:
        state = saved.get("model", saved)
        for name in list(state):
            state[name.replace(old, new)] = state.pop(name)

    return change


PHI, EVA, BLIP2, STAGE = (
    "phi-2/config.json",
    "eva_vit_g.pth",
    "blip2_pretrained_flant5xxl.pth",
    "TinyGPT-V_for_Stage3.pth",
)
WEIGHTS = "phi-2/pytorch_model.bin"


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        # What the issues of the original are about: another Phi-2 than its names say.
        (WEIGHTS, renamed("query_key_value", "Wqkv"), ["Wqkv", "unknown"]),
        (WEIGHTS, renamed("model.layers", "transformer.h"), ["one layout", "another"]),
        (WEIGHTS, without("layers.1.self_attn.query"), ["lora_A", "no file has its matrix"]),
        (WEIGHTS, without("query_key_value.bias"), ["lacks", "layers.0.self_attn.q_proj.bias"]),
        (PHI, set_to(partial_rotary_factor=0.5), ["0.5", "--set partial_rotary_factor=0.4"]),
        (PHI, set_to(rope_scaling={"type": "linear", "factor": 2}), ["'linear'"]),
        (PHI, set_to(hidden_act="relu"), ["hidden_act", "relu"]),
        (PHI, set_to(num_attention_heads=4), ["0.4 turns 25 of 64"]),
        (PHI, set_to(num_hidden_layers=1), ["2 layers, the decoder has 1"]),
        (PHI, set_to(vocab_size=100), ["embed_tokens", "shape"]),
        (STAGE, without("q_layernorm"), ["Stage3.pth has no q_layernorm"]),
        (STAGE, without("post_layernorm"), ["Stage3.pth has no post_layernorm"]),
        (STAGE, without("layers.1.post_layernorm"), ["lacks", "layers.1.post_layernorm.weight"]),
        (STAGE, without("llama_proj2"), ["projector.maps.1"]),
        (STAGE, without("llama_proj"), ["Stage<N>.pth", "llama_proj.weight", "--part stage"]),
        (STAGE, without("self_attn.dense.lora_B"), ["without its lora_B"]),
        (STAGE, without("layers.0.self_attn.dense.lora"), ["1 layers, the decoder has 2"]),
        (STAGE, renamed("llama_proj2", "llama_proj3"), ["llama_proj3", "unknown"]),
        (STAGE, lambda s: s["config"]["model"].update(arch="minigpt_v2"), ["not stage 3"]),
        (STAGE, lambda s: s["config"]["model"].update(arch="blip2"), ["'blip2'"]),
        (BLIP2, without("ln_vision"), ["vision.post_layernorm"]),
        (BLIP2, without("layer.1.intermediate_query"), ["layer.1.intermediate_query"]),
        (BLIP2, without("query_tokens"), ["blip2_pretrained_flant5xxl.pth", "query_tokens"]),
        (EVA, without("blocks.0.attn.v_bias"), ["q_bias", "not a tensor of this"]),
        (EVA, without("patch_embed"), ["eva_vit_g.pth", "--part eva"]),
        (EVA, lambda s: s.update(pos_embed=s["pos_embed"][:, :-1]), ["15 positions"]),
        ("phi-2/tokenizer_config.json", set_to(tokenizer_class="XTokenizer"), ["XTokenizer"]),
    ],
)
def test_what_would_answer_nonsense_is_refused(
    file: str, change: Callable[[dict[str, Any]], object], words: list[str], tmp_path: Path
) -> None:
    source = write_tinygptv(tmp_path / "source", weights="bin", **SMALL)
    edited(source / file, change)
    with pytest.raises(SourceError) as raised:
        prepared(source)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words), raised.value
    assert not (tmp_path / "out").exists()


def test_pickles_are_never_run(tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source", **SMALL)
    edited(source / STAGE, lambda saved: {**saved, "config": Path("run")})
    with pytest.raises(SourceError, match=r"Stage3.pth: wants to run pathlib.*was refused"):
        prepared(source)


def test_files_are_known_by_what_they_hold(tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source", **SMALL)
    (source / "pieces").mkdir()
    for old, new in ((EVA, "pieces/a.pth"), (BLIP2, "pieces/b.bin"), (STAGE, "checkpoint_49.pth")):
        (source / old).rename(source / new)
    job = prepared(source)
    assert [r.file for r in job.tensors.weight_files] == [
        "phi-2",
        "a.pth",
        "b.bin",
        "checkpoint_49.pth",
    ]
    write_tinygptv(tmp_path / "other", stage=4, **SMALL)
    (tmp_path / "other/TinyGPT-V_for_Stage4.pth").rename(source / "TinyGPT-V_for_Stage4.pth")
    with pytest.raises(SourceError, match=r"Stage4.pth, checkpoint_49.pth\); .*--part stage=FILE"):
        prepared(source)
    stage4 = source / "TinyGPT-V_for_Stage4.pth"
    assert prepared(source, parts={"stage": stage4}).model.image.size == 112
    with pytest.raises(
        SourceError, match=r"a.pth: is not blip2_pretrained_flant5xxl.pth, it lacks"
    ):
        prepared(source, parts={"stage": stage4, "blip2": source / "pieces/a.pth"})
    (source / "phi-2").rename(tmp_path / "phi-2")
    with pytest.raises(SourceError, match="a weight file of a tinygptv, but not its main"):
        prepared(source)
    given = {"stage": stage4, "eva": source / "pieces/a.pth", "blip2": source / "pieces/b.bin"}
    assert prepared(tmp_path / "phi-2", parts=given).model.image.size == 112
    (tmp_path / "phi-2").rename(source / "phi-2")
    with pytest.raises(SourceError, match="unknown part 'tower' of a tinygptv; its parts are eva"):
        prepared(source, parts={"tower": stage4})


def test_what_files_leave_open_can_be_stated(tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source", said=False, name="checkpoint_4.pth", **SMALL)
    with pytest.raises(SourceError, match=r"checkpoint_4.pth does not say .*--set stage=1 to 4"):
        prepared(source)
    model = prepared(source, settings={"stage": "4"}).model
    assert model.image.size == 448 and model.prompt.template[0].startswith("<s>[INST] ")
    edited(source / PHI, set_to(partial_rotary_factor=0.5))
    stated = {"stage": "1", "partial_rotary_factor": "0.5", "lora_alpha": "8", "vision_heads": "4"}
    model = prepared(source, settings=stated).model
    assert isinstance(model.text, Phi2)
    assert (model.text.rotary_dim, model.text.lora_alpha) == (16, 8)
    assert model.vision.num_attention_heads == 4
    for name, value, words in (
        ("stage", "5", "stage '5' is not one of"),
        ("partial_rotary_factor", "x", "'x' is not a number"),
        ("vision_heads", "3", "--set vision_heads=N"),
        ("speed", "9", "'speed' cannot be set for a tinygptv; it knows stage, "),
    ):
        with pytest.raises(SourceError, match=re.escape(words)):
            prepared(source, settings={**stated, name: value})


def test_only_39_blocks_of_the_tower_are_run(tmp_path: Path) -> None:
    source = write_tinygptv(
        tmp_path / "source", vision_layers=39, vision_width=88, vision_mlp=16, q_layers=1
    )
    job = prepared(source)
    assert job.model.vision.num_hidden_layers == 39
    assert any("39 of 40 blocks" in note for note in job.model.notes)
    (eva,) = (r for r in job.tensors.weight_files if r.name == "eva")
    assert "blocks.*.mlp.fc1.weight" in eva.unused and "blocks.*.mlp.fc1.weight x39" in eva.used


def test_a_later_file_wins(tmp_path: Path) -> None:
    """As in the original, whose load_state_dict takes every name that its model has."""
    source = write_tinygptv(tmp_path / "source", **SMALL)
    norm = {"ln_vision.weight": torch.full((176,), 3.0), "ln_vision.bias": torch.zeros(176)}
    edited(source / STAGE, lambda saved: saved["model"].update(norm))
    first = {"visual_encoder.cls_token": torch.full((1, 1, 176), 2.0)}
    edited(source / BLIP2, lambda saved: saved["model"].update(first))
    vision = prepared(source).parts["vision"]
    assert (vision["post_layernorm.weight"].float32() == 3).all()
    assert (vision["embeddings.class_embedding"].float32() == 2).all()


def qformer(source: Path) -> QFormer:
    found = prepared(source).model.projector
    assert isinstance(found, QFormer)
    return found


def test_heads_of_the_qformer_are_berts_where_its_config_is_there(tmp_path: Path) -> None:
    source = write_tinygptv(tmp_path / "source", **SMALL)
    assert qformer(source).num_attention_heads == 2
    (source / "bert-base-uncased").mkdir()
    bert = {"model_type": "bert", "num_attention_heads": 4}
    (source / "bert-base-uncased/config.json").write_text(json.dumps(bert), encoding="utf-8")
    assert qformer(source).num_attention_heads == 4

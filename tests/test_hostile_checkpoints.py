"""JSON files of checkpoints with numbers and texts that no model has, as `workshop.fuzz families`
found them: each is refused in one line that names the file, before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import SourceError
from edgevlm.export import dual, export_bundle
from edgevlm.export.pipeline import read
from tests.checkpoints.dual import write_clip
from tests.test_families import CHECKPOINTS

TEXT, VISION = "text_config", "vision_config"
PROCESSOR, CONFIG = "processor_config.json", "config.json"
# Checkpoint, file, keys of the value, another value, the refusal.
CASES: dict[str, tuple[str, str, tuple[str, ...], Any, str]] = {
    "patch of none": ("llava-next-hf", PROCESSOR, ("patch_size",), 0, "patch_size is 0"),
    "patch in words": ("llava-next-hf", PROCESSOR, ("patch_size",), "4", "patch_size is '4'"),
    "rows in words": (
        *("llava-next-hf", PROCESSOR, ("num_additional_image_tokens",), "x"),
        "num_additional_image_tokens is 'x'; only a whole number",
    ),
    "heads that do not share": (
        *("llava-1.5-hf", CONFIG, (VISION, "num_attention_heads"), 7),
        "num_attention_heads is 7; its hidden_size is 64",
    ),
    "a mean that is no colour": (
        *("phi-3.5-vision", "preprocessor_config.json", ("image_mean", "0"), 1e308),
        "'image.mean' has a number beyond 16777216",
    ),
    "no heads": ("llava-1.5-hf", CONFIG, (VISION, "num_attention_heads"), 0, "heads is 0"),
    "an epsilon beyond 32 bits": (
        *("llava-1.5-hf", CONFIG, (TEXT, "rms_norm_eps"), 1e300),
        "the decoder's rms_norm_eps is 1e+300; it does not fit into 32 bits",
    ),
    "division by zero": (
        *("paligemma-2", CONFIG, (TEXT, "query_pre_attn_scalar"), 0),
        "the decoder's query_pre_attn_scalar is 0; it has to be above 0",
    ),
    "a negative base": ("gemma3", CONFIG, (TEXT, "rope_theta"), -1e4, "rope_theta is -10000"),
    "a factor that no float holds": (
        *("phi-3.5-vision", CONFIG, ("rope_scaling", "long_factor", "0"), 10**400),
        "rope_scaling.long_factor is not a list of",
    ),
    "a side of two billion": (
        *("smolvlm", "preprocessor_config.json", ("size", "longest_edge"), 2**31),
        "'image.tiles.longest_edge' is 2147483648, not 0 to 65536",
    ),
    "a picture of sixteen petabytes": (
        *("qwen2-vl", "preprocessor_config.json", ("max_pixels",), 2**62),
        "'image.native.most' is 4611686018427387904, not 1 to 268435456",
    ),
    "half of a character": (
        *("phi-3.5-vision", "tokenizer_config.json", ("added_tokens_decoder", "903", "content")),
        *("\ud800", "tokenizer_config.json: cannot be read as JSON"),
    ),
}


def edit(path: Path, keys: tuple[str, ...], value: Any) -> None:
    data = found = json.loads(path.read_text(encoding="utf-8"))
    *way, last = (int(key) if key == "0" else key for key in keys)
    for key in way:
        found = found[key]
    found[last] = value
    path.write_text(json.dumps(data), encoding="utf-8")


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(SourceError) as caught:
        action()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 2000
    return text


@pytest.mark.parametrize("case", CASES)
def test_what_no_model_has(case: str, tmp_path: Path) -> None:
    name, file, keys, value, says = CASES[case]
    source = CHECKPOINTS[name][1](tmp_path / "source")
    read(source)
    edit(source / file, keys, value)
    assert says in refusal(lambda: read(source))


@pytest.mark.parametrize(
    ("given", "shown"), [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("x" * 9000, "xxx...xxx")]
)
def test_texts_that_a_message_repeats(given: str, shown: str, tmp_path: Path) -> None:
    source = CHECKPOINTS["fastvlm"][1](tmp_path / "source")
    edit(source / "tokenizer_config.json", ("tokenizer_class",), given)
    text = refusal(lambda: read(source))
    assert shown in text and text.isprintable() and text.endswith("add tokenizer.json")


def test_heads_of_models_that_embed(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "source")
    dual.read(source, "clip")
    edit(source / CONFIG, (TEXT, "num_attention_heads"), 10)
    assert "the text_tower's num_attention_heads is 10" in refusal(
        lambda: dual.read(source, "clip")
    )


@pytest.mark.parametrize("kind", [["clip"], {"": 1}, 2**64])
def test_a_kind_that_is_no_name(kind: Any, tmp_path: Path) -> None:
    source = write_clip(tmp_path / "source")
    edit(source / CONFIG, ("model_type",), kind)
    assert "model_type is" in refusal(lambda: export_bundle(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()

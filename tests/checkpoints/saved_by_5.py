"""A tiny checkpoint's folder as transformers 5 saves it (5.24), rewritten from 4's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.checkpoints.vocabulary import write_json

# Files of 4 that 5 does not write.
_GONE = (
    "preprocessor_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_EDGES = {"short": "min", "long": "max"}


def as_saved_by_5(folder: Path, **image_processor: Any) -> Path:
    """Rewrites the folder of a PaliGemma, of a Gemma 3 in the layout "5", of a Qwen2-VL with its
    positions as 5 has them, of a SmolVLM, an InternVL or a model of LLaVA's kind that has a
    tokenizer.json; returns it.

    `image_processor` are settings of its picture processor other than the folder's.
    """
    config = _config(_read(folder / "config.json")) | {"transformers_version": "5.24.0"}
    write_json(folder / "config.json", config)
    write_json(folder / "processor_config.json", _processor(folder, config, image_processor))
    write_json(folder / "tokenizer_config.json", _tokenizer(folder, config))
    for name in _GONE:
        (folder / name).unlink(missing_ok=True)
    old, new = folder / "chat_template.json", folder / "chat_template.jinja"
    if not new.is_file():
        text = _read(old)["chat_template"] if old.is_file() else "{{ messages }}\n"
        new.write_text(text, encoding="utf-8")
    old.unlink(missing_ok=True)
    return folder


def _config(found: dict[str, Any]) -> dict[str, Any]:
    config = {k: _config(v) if isinstance(v, dict) else v for k, v in found.items()}
    if "torch_dtype" in config:
        config["dtype"] = config.pop("torch_dtype")
    if config.get("model_type") in ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2"):
        theta = config.pop("rope_theta", 10000.0)
        rope = {"rope_theta": theta, "rope_type": "default"}
        if config["model_type"] == "phi3":
            rope["partial_rotary_factor"] = config.pop("partial_rotary_factor", 1.0)
        config.pop("rope_scaling", None)
        config["rope_parameters"] = rope
    return config


def _processor(folder: Path, config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    pictures = _read(folder / "preprocessor_config.json")
    for key in ("processor_class", "feature_extractor_type"):
        pictures.pop(key, None)
    for key in ("size", "crop_size"):
        if isinstance(pictures.get(key), int):
            side = pictures[key]
            square = {"height": side, "width": side}
            pictures[key] = {"shortest_edge": side} if key == "size" else square
    if pictures["image_processor_type"] == "Qwen2VLImageProcessor":
        edges = {f"{key}est_edge": pictures.pop(f"{end}_pixels") for key, end in _EDGES.items()}
        pictures["size"] = edges
    pictures |= {"do_rescale": True, "rescale_factor": 1 / 255} | changes
    if config["model_type"] == "paligemma":
        return {"image_processor": pictures, "processor_class": "PaliGemmaProcessor"}
    if config["model_type"] not in ("llava", "llava_next", "llava_onevision"):
        there = folder / "processor_config.json"
        found = _read(there) if there.is_file() else {}
        if config["model_type"].startswith("qwen"):
            kind = {"video_processor_type": "Qwen2VLVideoProcessor"}
            found["video_processor"] = pictures | kind
        return {**found, "image_processor": pictures}
    return {
        "image_processor": pictures,
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }


def _tokenizer(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    found = _read(folder / "tokenizer_config.json")
    for key in ("added_tokens_decoder", "additional_special_tokens", "add_bos_token"):
        found.pop(key, None)
    for key, value in found.items():
        if key.endswith("_token") and isinstance(value, dict):
            found[key] = value["content"]
    if isinstance(found.get("extra_special_tokens"), dict):
        found["model_specific_special_tokens"] = named = found["extra_special_tokens"]
        found["extra_special_tokens"] = list(named.values())
    elif config["model_type"] == "paligemma":
        found |= {"extra_special_tokens": ["<image>"], "mask_token": "<mask>"}
    elif not found["tokenizer_class"].startswith(("Qwen2", "GPT2")):
        found["tokenizer_class"] = "TokenizersBackend"
    return found | {"backend": "tokenizers", "is_local": True, "local_files_only": False}


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found

"""Saves pico as a published PaliGemma checkpoint folder, and loads it back."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.checkpoints.paligemma import preprocessor
from workshop.pico.model import Pico, PicoConfig
from workshop.pico.tokenizer import BOS, EOS, IMAGE_ID, PAD, tokenizer_config

# The model card; the exporter reads the licence from it.
_CARD = """---
license: apache-2.0
---

# pico

The weights of edgevlm's built-in model, a PaliGemma in miniature for drawn scenes; workshop/pico
of its repository made them.
"""


def save_checkpoint(model: Pico, tokenizer_path: Path, folder: Path) -> None:
    """Writes the folder in full beside its place, then puts it there: a reader never sees half of
    it. Weights are stored as float16.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    temporary.chmod(0o755)
    weights = {
        name: value.detach().half().contiguous().clone()
        for name, value in model.state_dict().items()
    }
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "model.safetensors").chmod(0o644)
    _write(temporary / "config.json", model_config(model.config))
    sizes = (model.config.side, model.config.n_image_tokens)
    _write(temporary / "preprocessor_config.json", preprocessor(*sizes))
    _write(
        temporary / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    (temporary / "tokenizer_config.json").write_text(tokenizer_config() + "\n", encoding="utf-8")
    shutil.copyfile(tokenizer_path, temporary / "tokenizer.model")
    (temporary / "README.md").write_text(_CARD, encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path) -> Pico:
    """The model of a folder written by ``save_checkpoint``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, vision = config["text_config"], config["vision_config"]
    model = Pico(
        PicoConfig(
            side=vision["image_size"],
            patch=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            vision_ff=vision["intermediate_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            head_dim=text["head_dim"],
            ff=text["intermediate_size"],
            vocab=text["vocab_size"],
        )
    )
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval()


def model_config(config: PicoConfig) -> dict[str, object]:
    """``config.json`` with every field that readers of PaliGemma checkpoints look at."""
    sizes = asdict(config)
    text = {
        "model_type": "gemma",
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["ff"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": 1,
        "head_dim": sizes["head_dim"],
        "num_image_tokens": config.n_image_tokens,
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": 512,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": sizes["vision_width"],
        "intermediate_size": sizes["vision_ff"],
        "num_hidden_layers": sizes["vision_layers"],
        "num_attention_heads": sizes["vision_heads"],
        "num_image_tokens": config.n_image_tokens,
        "image_size": sizes["side"],
        "patch_size": sizes["patch"],
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "projection_dim": sizes["width"],
        "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    }
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "hidden_size": sizes["width"],
        "ignore_index": -100,
        "image_token_index": IMAGE_ID,
        "projection_dim": sizes["width"],
        "_vocab_size": sizes["vocab"],
        "torch_dtype": "float32",
        "text_config": text,
        "vision_config": vision,
    }


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

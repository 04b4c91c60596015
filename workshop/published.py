"""Checkpoints of published models' layout, names, shapes and number types, with random weights.

What they answer is noise; how large, how fast and how hungry they are is the real model's. Values
are written a few megabytes at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.benchmarks.synthetic.configs.llava import CLIP, MOBILEPALO, TINY_LLAVA
from edgevlm.benchmarks.synthetic.configs.llava_onevision import LLAVA_ONEVISION_PICTURES
from edgevlm.benchmarks.synthetic.configs.paligemma import PALIGEMMA, PIECES
from edgevlm.benchmarks.synthetic.make import describe
from edgevlm.benchmarks.synthetic.models import MODELS
from edgevlm.family import Config, Source, by_name
from edgevlm.parts import Part, Shapes
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import preprocessor as clip_preprocessor
from tests.checkpoints.llava_onevision import write_onevision
from tests.checkpoints.paligemma import encode, header, preprocessor
from tests.checkpoints.smolvlm import write_smolvlm
from tests.checkpoints.vocabulary import words, write_json

SHARD_BYTES = 4_000_000_000
_PICKLED_BYTES = 1_000_000_000
_BLOCK = 1 << 22
# Vectors that others are multiplied by.
_SCALE = re.compile(r"norm.*\.weight$|\.lambda_[12]$")
# Writes a checkpoint's files but its weights: folder, config.json, sizes.
_Files = Callable[[Path, Config, dict[str, Any]], None]


def write(name: str, folder: Path) -> list[str]:
    """Writes the checkpoint of that name unless it is there; returns what `edgevlm export` needs
    beside it.
    """
    if not any(folder.glob("*.index.json")):
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[name](folder)
    return ["--vision-tower", str(_tower(folder))] if _tower(folder).exists() else []


def _tower(folder: Path) -> Path:
    return folder.with_name(folder.name + "-tower")


def write_paligemma(folder: Path) -> None:
    """PaliGemma-3B-224: bfloat16 safetensors."""
    write_json(folder / "config.json", PALIGEMMA)
    write_json(folder / "preprocessor_config.json", preprocessor(224, 256))
    write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "GemmaTokenizer"})
    tail = [*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))]
    specials = ("<pad>", "<eos>", "<bos>", "<unk>")
    (folder / "tokenizer.model").write_bytes(_tokenizer(PIECES, specials, tail, prefix=False))
    model = by_name("paligemma", "published").describe(Source({"config.json": PALIGEMMA}))
    parts: dict[str, Part] = {
        "vision_tower.vision_model.": model.vision,
        "multi_modal_projector.": model.projector,
        "language_model.model.": model.text,
    }
    tensors = {p + n: s for p, config in parts.items() for n, s in config.tensors().items()}
    _write_safetensors(folder, tensors, from_one=("language_model.",))


def write_mobilepalo(folder: Path) -> None:
    """MobilePALO-1.7B: bfloat16 .bin shards, its CLIP tower in a folder of its own."""
    write_json(folder / "config.json", MOBILEPALO)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    specials = ("<unk>", "<s>", "</s>")
    (folder / "tokenizer.model").write_bytes(_tokenizer(32000, specials, [], prefix=True))
    tower = _tower(folder)
    tower.mkdir(exist_ok=True)
    write_json(tower / "config.json", CLIP)
    write_json(tower / "preprocessor_config.json", clip_preprocessor(336))
    files = {"config.json": MOBILEPALO, "tower/config.json": CLIP}
    model = by_name("llava", "published").describe(Source(files))
    whole = replace(model.vision, num_hidden_layers=CLIP["num_hidden_layers"])
    _write_safetensors(tower, {f"vision_model.{n}": s for n, s in whole.tensors().items()})
    tensors = {f"model.mm_projector.model.{n}": s for n, s in model.projector.tensors().items()}
    for name, shape in model.text.tensors().items():
        tensors[name if name == "lm_head.weight" else f"model.{name}"] = shape
    _write_pickles(folder, tensors)


def write_tiny_llava(folder: Path) -> None:
    """LLaVA's shape with TinyLlama-1.1B in transformers' layout: bfloat16 safetensors."""
    write_json(folder / "config.json", TINY_LLAVA)
    write_json(folder / "preprocessor_config.json", clip_preprocessor(336))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    specials = ("<unk>", "<s>", "</s>")
    (folder / "tokenizer.model").write_bytes(_tokenizer(32000, specials, [], prefix=True))
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<image>", 32001: "<pad>"}
    added = {str(i): {"content": text, "special": True} for i, text in names.items()}
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, "legacy": True}
    write_json(folder / "tokenizer_config.json", config | {"pad_token": "<pad>"})
    model = by_name("llava", "published").describe(Source({"config.json": TINY_LLAVA}))
    tower = replace(model.vision, num_hidden_layers=CLIP["num_hidden_layers"])
    tensors = {f"vision_tower.vision_model.{n}": s for n, s in tower.tensors().items()}
    for name, shape in model.projector.tensors().items():
        at, kind = name.split(".")
        tensors[f"multi_modal_projector.linear_{1 + int(at) // 2}.{kind}"] = shape
    for name, shape in model.text.tensors().items():
        part = "language_model." if name == "lm_head.weight" else "language_model.model."
        tensors[part + name] = shape
    _write_safetensors(folder, tensors)


def write_tinygptv(folder: Path) -> None:
    """TinyGPT-V of stage 4: Phi-2 in eight half-precision safetensors, three .pth files."""
    from tests.checkpoints import tinygptv as pieces

    pieces.write_tinygptv(folder, stage=4, below=False, **pieces.SIZES)


def _write_tiles(folder: Path, name: str, files: _Files, parts: tuple[str, str, str]) -> None:
    """Writes a synthetic shape in transformers' layout, bfloat16 safetensors: its files but the
    weights, and its tensors behind what the names of its parts begin with.
    """
    config = MODELS[name].files["config.json"]
    files(folder, config, _sizes(config) | {"dtype": "bfloat16", "weights": False})
    _, model = describe(MODELS[name], name)
    tensors = {}
    configs: tuple[Part, ...] = (model.vision, model.projector, model.text)
    for prefix, part in zip(parts, configs, strict=True):
        for key, shape in part.tensors().items():
            tensors[_ELSEWHERE.get(key, prefix + key)] = shape
    _write_safetensors(folder, tensors)


def _sizes(config: Config) -> dict[str, Any]:
    """Sizes as the writers of tiny checkpoints call them."""
    vision, text = config["vision_config"], config.get("text_config") or config["llm_config"]
    return {
        "size": vision["image_size"],
        "vision_width": vision["hidden_size"],
        "vision_layers": vision["num_hidden_layers"],
        "vision_heads": vision["num_attention_heads"],
        "vision_mlp": vision["intermediate_size"],
        "width": text["hidden_size"],
        "layers": text["num_hidden_layers"],
        "heads": text["num_attention_heads"],
        "kv_heads": text["num_key_value_heads"],
        "mlp": text["intermediate_size"],
        "n_vocab": text["vocab_size"],
        "text_config": {"max_position_embeddings": text["max_position_embeddings"]},
    }


def _smolvlm_files(folder: Path, config: Config, sizes: dict[str, Any]) -> None:
    write_smolvlm(folder, patch=config["vision_config"]["patch_size"], **sizes)


def _internvl_files(folder: Path, config: Config, sizes: dict[str, Any]) -> None:
    write_internvl(folder, layout="hf", patch=config["vision_config"]["patch_size"], **sizes)


def _onevision_files(folder: Path, config: Config, sizes: dict[str, Any]) -> None:
    vision, tiles = config["vision_config"], {"vision_aspect_ratio": config["vision_aspect_ratio"]}
    grid = vision["image_size"] // vision["patch_size"]
    write_onevision(
        folder,
        layout="hf",
        chat="onevision",
        config={**tiles, "image_grid_pinpoints": config["image_grid_pinpoints"]},
        vision_config={key: vision[key] for key in ("image_size", "patch_size")},
        processor=LLAVA_ONEVISION_PICTURES,
        nested={**tiles, "num_image_tokens": grid**2},
        **sizes,
    )


_SMOLVLM = ("model.vision_model.", "model.connector.modality_projection.", "model.text_model.")
_INTERNVL = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")
_ONEVISION = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.")
# Canonical names that these layouts have elsewhere than in their part, or otherwise.
_ELSEWHERE = {
    "lm_head.weight": "lm_head.weight",
    "image_newline": "image_newline",
    **{
        f"{i}.{kind}": f"multi_modal_projector.linear_{1 + i // 2}.{kind}"
        for i in (0, 2)
        for kind in ("weight", "bias")
    },
}
WRITERS: dict[str, Callable[[Path], None]] = {
    "paligemma-3b-224": write_paligemma,
    "mobilepalo-1.7b": write_mobilepalo,
    "tiny-llava-v1": write_tiny_llava,
    "tinygptv": write_tinygptv,
    **{
        name: partial(_write_tiles, name=name, files=files, parts=parts)
        for name, files, parts in (
            ("smolvlm-256m", _smolvlm_files, _SMOLVLM),
            ("smolvlm-500m", _smolvlm_files, _SMOLVLM),
            ("internvl3-1b", _internvl_files, _INTERNVL),
            ("llava-onevision-0.5b", _onevision_files, _ONEVISION),
        )
    },
}


def _bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * 2


def _shards(tensors: Shapes, most: int) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    for name, shape in tensors.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(shape) > most:
            shards.append({})
        shards[-1][name] = shape
    return shards


def _write_index(path: Path, files: dict[str, Shapes]) -> None:
    total = sum(_bytes(s) for shard in files.values() for s in shard.values())
    weight_map = {name: file for file, shard in files.items() for name in shard}
    write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(folder: Path, tensors: Shapes, from_one: tuple[str, ...] = ()) -> None:
    """Writes shards and their index; norms behind a prefix in `from_one` scale by one more than
    their weight, as Gemma's.
    """
    shards = _shards(tensors, SHARD_BYTES)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
        with (folder / name).open("wb") as f:
            f.write(header(shard, "bfloat16"))
            for block in _blocks(shard, np.random.default_rng(i), from_one):
                f.write(encode(block, "bfloat16"))
    _write_index(folder / "model.safetensors.index.json", dict(zip(names, shards, strict=True)))


def _write_pickles(folder: Path, tensors: Shapes) -> None:
    import torch

    shards = _shards(tensors, _PICKLED_BYTES)
    names = [f"pytorch_model-{i + 1:05}-of-{len(shards):05}.bin" for i in range(len(shards))]
    for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
        rng, state = np.random.default_rng(i), {}
        for key, shape in shard.items():
            values = np.concatenate(list(_blocks({key: shape}, rng)))
            state[key] = torch.from_numpy(values).view(shape).to(torch.bfloat16)
        torch.save(state, folder / name)
    _write_index(folder / "pytorch_model.bin.index.json", dict(zip(names, shards, strict=True)))


def _blocks(
    tensors: Shapes, rng: np.random.Generator, from_one: tuple[str, ...] = ()
) -> Iterator[np.ndarray]:
    """Random values of the size that keeps activations of a deep net near one."""
    for name, shape in tensors.items():
        one = len(shape) == 1 and not name.startswith(from_one) and _SCALE.search(name)
        mean, std = float(bool(one)), 0.02
        if len(shape) > 1:
            std = int(np.prod(shape[1:])) ** -0.5
        left = int(np.prod(shape))
        while left:
            count = min(left, _BLOCK)
            yield rng.standard_normal(count, np.float32) * np.float32(std) + np.float32(mean)
            left -= count


def _tokenizer(n: int, specials: tuple[str, ...], tail: list[str], *, prefix: bool) -> bytes:
    """A SentencePiece model of that many pieces; the real ones are not ours to ship."""
    from sentencepiece import sentencepiece_model_pb2

    pb2: Any = sentencepiece_model_pb2
    model = pb2.ModelProto()
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = n
    for name in ("pad", "eos", "bos", "unk"):
        text = {"eos": "</s>", "bos": "<s>"}.get(name) if prefix else None
        text = text or f"<{name}>"
        setattr(model.trainer_spec, f"{name}_id", specials.index(text) if text in specials else -1)
        setattr(model.trainer_spec, f"{name}_piece", text)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    pieces = [(text, 0.0, 2 if text == "<unk>" else 3) for text in specials]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    letters = ["\u2581", "\n", *map(chr, range(33, 127))]
    plain = itertools.islice(words(), n - len(pieces) - len(letters) - len(tail))
    pieces += [(t, -float(i), 1) for i, t in enumerate([*plain, *letters])]
    pieces += [(t, 0.0, 4) for t in tail]
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    return bytes(model.SerializeToString())

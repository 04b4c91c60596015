"""Tiny CLIP and SigLIP checkpoints in the layouts in which such models are published."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from tests.checkpoints.vocabulary import CORPUS, sentencepiece_model, write_json, write_tokenizer

Tensors = dict[str, torch.Tensor]
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = 700
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary in small: bytes, bytes that end a word, merges, start and end."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=_WORDS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    made.train_from_iterator(CORPUS.splitlines(), trainer)
    merges = [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{x}</w>" for x in letters), *map("".join, merges), _START, _END]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges


def write_clip_tokenizer(folder: Path, kind: Literal["json", "pair", "both"]) -> int:
    """Writes CLIP's tokenizer as a tokenizer.json, vocab.json with merges.txt, or both; returns the
    end token's id.
    """
    import transformers

    untyped: Any = transformers
    vocab, merges = clip_vocabulary()
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if kind != "pair":
        names = [str(folder / name) for name in ("vocab.json", "merges.txt")]
        untyped.CLIPTokenizerFast(*names).save_pretrained(folder)
    if kind == "json":
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
    write_json(
        folder / "tokenizer_config.json",
        {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True},
    )
    return vocab[_END]


def clip_config(**more: Any) -> dict[str, Any]:
    """A tiny CLIP's config.json, as transformers wrote it at first; sides differ in their sizes."""
    vocab, _ = clip_vocabulary()
    text = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": len(vocab), "eos_token_id": 2,
            "max_position_embeddings": 77}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3,
              "num_attention_heads": 3, "image_size": 32, "patch_size": 8}  # fmt: skip
    config: dict[str, Any] = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": text | more.pop("text", {}),
        "vision_config": vision | more.pop("vision", {}),
        "logit_scale_init_value": 2.6592,
    }
    return config | more


def clip_model(config: dict[str, Any], seed: int = 0) -> Any:
    """transformers' CLIPModel of a config, random weights of a size that shows."""
    import transformers

    untyped: Any = transformers
    return _random(untyped.CLIPModel(untyped.CLIPConfig(**config)), seed)


def _random(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in ("logit_scale", "logit_bias"):
                continue
            wide = 0.15 if tensor.dim() > 1 else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * wide)
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "layrnorm.weight")):
                tensor.add_(1)
        model.logit_scale.fill_(3.3)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-2.5)
    return model.eval()


def _save(
    model: Any, folder: Path, kind: str, dtype: torch.dtype, edit: Callable[[Tensors], None] | None
) -> None:
    tensors: Tensors = {n: t.detach().to(dtype).contiguous() for n, t in model.state_dict().items()}
    if edit:
        edit(tensors)
    write_weights(folder, tensors, kind)


def write_weights(folder: Path, tensors: Tensors, kind: str, stem: str = "model") -> None:
    """Writes tensors as "safetensors", "bin" or "sharded" safetensors."""
    from safetensors.torch import save_file

    if kind == "bin":
        name = "pytorch_model.bin" if stem == "model" else f"{stem}.bin"
        torch.save(tensors, folder / name)
        return
    if kind == "safetensors":
        save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map: dict[str, str] = {}
    for i, half in enumerate(halves, 1):
        file = f"{stem}-{i:05}-of-00002.safetensors"
        save_file({n: tensors[n] for n in half}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map}
    )


def write_clip(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    weights: str = "safetensors",
    tokenizer: Literal["json", "pair", "both"] = "both",
    dtype: torch.dtype = torch.float32,
    processor: dict[str, Any] | None = None,
    edit: Callable[[Tensors], None] | None = None,
) -> Path:
    """Writes a CLIP as transformers publishes it; without a `processor` one of the first files."""
    folder.mkdir(parents=True)
    config = config or clip_config()
    write_clip_tokenizer(folder, tokenizer)
    write_json(folder / "config.json", config)
    side = config.get("vision_config", {}).get("image_size", 224)
    old = {
        "crop_size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": side,
    }
    if processor != {}:
        write_json(folder / "preprocessor_config.json", processor or old)
    _save(clip_model(config), folder, weights, dtype, edit)
    return folder


@functools.cache
def siglip_spiece() -> bytes:
    """A small spiece.model with the conventions of SigLIP's c4_en: lower case, unigram."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.lower().splitlines()),
        model_writer=out,
        model_type="unigram",
        vocab_size=420,
        hard_vocab_limit=False,
        character_coverage=0.999,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return out.getvalue()


def _pieces(model: bytes) -> int:
    import sentencepiece

    untyped: Any = sentencepiece
    return int(untyped.SentencePieceProcessor(model_proto=model).GetPieceSize())


def write_siglip(
    folder: Path,
    *,
    second: bool = False,
    tokenizer: Literal["model", "json", "both"] = "both",
    weights: str = "safetensors",
    dtype: torch.dtype = torch.float32,
    tokens: int = 16,
    text: dict[str, Any] | None = None,
) -> Path:
    """Writes a SigLIP or, with `second`, a SigLIP 2 of a fixed size."""
    import transformers

    untyped: Any = transformers
    folder.mkdir(parents=True)
    model = sentencepiece_model() if second else siglip_spiece()
    sides = {"hidden_size": 48, "intermediate_size": 90, "num_attention_heads": 3}
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {
            **sides,
            "num_hidden_layers": 2,
            "vocab_size": _pieces(model) + 8,
            "max_position_embeddings": tokens,
            "model_type": "siglip_text_model",
            **(text or {}),
        },
        "vision_config": {
            **sides,
            "num_hidden_layers": 2,
            "image_size": 30,
            "patch_size": 7,
            "model_type": "siglip_vision_model",
        },
    }
    write_json(folder / "config.json", config)
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "SiglipProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 30, "width": 30},
        },
    )
    if second:
        write_tokenizer(folder, tokenizer)
        side = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        side |= {
            "add_bos_token": False,
            "add_eos_token": True,
            "processor_class": "SiglipProcessor",
        }
        write_json(folder / "tokenizer_config.json", side)
    else:
        (folder / "spiece.model").write_bytes(model)
        side = {
            "eos_token": "</s>",
            "model_max_length": tokens,
            "pad_token": "</s>",
            "tokenizer_class": "SiglipTokenizer",
            "unk_token": "<unk>",
        }
        write_json(folder / "tokenizer_config.json", side)
    made = _random(untyped.SiglipModel(untyped.SiglipConfig(**config)), 1)
    _save(made, folder, weights, dtype, None)
    return folder


def open_clip_tensors(model: Any) -> Tensors:
    """A CLIPModel's tensors under open_clip's names, projections the other way round."""
    found: Tensors = {}
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    found["text_projection"] = state["text_projection.weight"].T.contiguous()
    found["logit_scale"] = state["logit_scale"]
    vision, text = "vision_model", "text_model"
    for ours, theirs in (
        ("visual.class_embedding", f"{vision}.embeddings.class_embedding"),
        ("visual.conv1.weight", f"{vision}.embeddings.patch_embedding.weight"),
        ("visual.positional_embedding", f"{vision}.embeddings.position_embedding.weight"),
        ("token_embedding.weight", f"{text}.embeddings.token_embedding.weight"),
        ("positional_embedding", f"{text}.embeddings.position_embedding.weight"),
        *((f"visual.ln_pre.{k}", f"{vision}.pre_layrnorm.{k}") for k in ("weight", "bias")),
        *((f"visual.ln_post.{k}", f"{vision}.post_layernorm.{k}") for k in ("weight", "bias")),
        *((f"ln_final.{k}", f"{text}.final_layer_norm.{k}") for k in ("weight", "bias")),
    ):
        found[ours] = state[theirs]
    for prefix, side, n_layers in (
        ("visual.", vision, model.config.vision_config.num_hidden_layers),
        ("", text, model.config.text_config.num_hidden_layers),
    ):
        for i in range(n_layers):
            new, old = f"{prefix}transformer.resblocks.{i}", f"{side}.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                for a, b in (
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    found[f"{new}.{a}.{kind}"] = state[f"{old}.{b}.{kind}"]
                thirds = [state[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{new}.attn.in_proj_{kind}"] = torch.cat(thirds)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write_open_clip(
    folder: Path, *, weights: str = "safetensors", prefix: str = "", quick: bool = False
) -> Path:
    """Writes a CLIP in open_clip's layout; `prefix` stands before the text tower's names, as in
    models whose config says custom_text.
    """
    folder.mkdir(parents=True)
    write_clip_tokenizer(folder, "json")
    act = "quick_gelu" if quick else "gelu"
    config = clip_config(
        text={"hidden_act": act, "intermediate_size": 128},
        vision={"hidden_act": act, "intermediate_size": 192, "num_attention_heads": 3},
    )
    model = clip_model(config)
    tensors = open_clip_tensors(model)
    text = {n for n in tensors if not n.startswith("visual.") and n != "logit_scale"}
    tensors = {f"{prefix}{n}" if n in text else n: t for n, t in tensors.items()}
    stem = "open_clip_model" if weights == "safetensors" else "open_clip_pytorch_model"
    write_weights(folder, tensors, weights, stem)
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {
                "embed_dim": 24,
                **({"quick_gelu": True} if quick else {}),
                "vision_cfg": {
                    "image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8
                },
                "text_cfg": {
                    "context_length": 77,
                    "vocab_size": len(clip_vocabulary()[0]),
                    "width": 32,
                    "heads": 2,
                    "layers": 2,
                },
            },
            "preprocess_cfg": {
                "mean": [0.48145466, 0.4578275, 0.40821073],
                "std": [0.26862954, 0.26130258, 0.27577711],
            },
        },
    )  # fmt: skip
    return folder


def open_clip_siglip_tensors(model: Any) -> Tensors:
    """A SiglipModel's tensors under open_clip's names, its vision tower's under timm's."""
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    found: Tensors = {n: state[n].reshape(()) for n in ("logit_scale", "logit_bias")}
    vision, text, trunk = "vision_model", "text_model", "visual.trunk"
    positions = state[f"{vision}.embeddings.position_embedding.weight"]
    found[f"{trunk}.pos_embed"] = positions[None]
    found[f"{trunk}.attn_pool.latent"] = state[f"{vision}.head.probe"]
    found["text.token_embedding.weight"] = state[f"{text}.embeddings.token_embedding.weight"]
    found["text.positional_embedding"] = state[f"{text}.embeddings.position_embedding.weight"]
    pool = f"{vision}.head"
    for kind in ("weight", "bias"):
        q, k, v = state[f"{pool}.attention.in_proj_{kind}"].chunk(3)
        found[f"{trunk}.attn_pool.q.{kind}"] = q
        found[f"{trunk}.attn_pool.kv.{kind}"] = torch.cat([k, v])
        for ours, theirs in (
            (f"{trunk}.patch_embed.proj", f"{vision}.embeddings.patch_embedding"),
            (f"{trunk}.norm", f"{vision}.post_layernorm"),
            (f"{trunk}.attn_pool.proj", f"{pool}.attention.out_proj"),
            (f"{trunk}.attn_pool.norm", f"{pool}.layernorm"),
            (f"{trunk}.attn_pool.mlp.fc1", f"{pool}.mlp.fc1"),
            (f"{trunk}.attn_pool.mlp.fc2", f"{pool}.mlp.fc2"),
            ("text.ln_final", f"{text}.final_layer_norm"),
            ("text.text_projection", f"{text}.head"),
        ):
            found[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
        for i in range(model.config.vision_config.num_hidden_layers):
            new, old = f"{trunk}.blocks.{i}", f"{vision}.encoder.layers.{i}"
            thirds = [state[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{new}.attn.qkv.{kind}"] = torch.cat(thirds)
            found[f"{new}.attn.proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
            for a, b in (("norm1", "layer_norm1"), ("norm2", "layer_norm2"), *_SAME):
                found[f"{new}.{a}.{kind}"] = state[f"{old}.{b}.{kind}"]
        for i in range(model.config.text_config.num_hidden_layers):
            new, old = f"text.transformer.resblocks.{i}", f"{text}.encoder.layers.{i}"
            thirds = [state[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(thirds)
            for a, b in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("attn.out_proj", "self_attn.out_proj"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                found[f"{new}.{a}.{kind}"] = state[f"{old}.{b}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


_SAME = (("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))


def write_open_clip_siglip(folder: Path) -> Any:
    """Writes a SigLIP in open_clip's layout; returns transformers' model of the same weights."""
    import transformers

    untyped: Any = transformers
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(siglip_spiece())
    tokenizer = untyped.T5TokenizerFast(str(folder / "spiece.model"), extra_ids=0)
    tokenizer.save_pretrained(folder)
    (folder / "spiece.model").unlink()
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "pad_token": "</s>", "eos_token": "</s>"},
    )
    sides = {"hidden_size": 48, "num_hidden_layers": 2, "hidden_act": "gelu"}
    size = _pieces(siglip_spiece())
    config = untyped.SiglipConfig(
        text_config={
            **sides,
            "intermediate_size": 192,
            "num_attention_heads": 3,
            "vocab_size": size,
            "max_position_embeddings": 16,
        },
        vision_config={
            **sides,
            "intermediate_size": 90,
            "num_attention_heads": 12,  # timm's name of the tower says so
            "image_size": 32,
            "patch_size": 8,
        },
    )
    model = _random(untyped.SiglipModel(config), 2)
    write_weights(folder, open_clip_siglip_tensors(model), "safetensors", "open_clip_model")
    half = [0.5, 0.5, 0.5]
    write_json(
        folder / "open_clip_config.json",
        {
            "model_cfg": {
                "embed_dim": 48,
                "init_logit_bias": -10,
                "custom_text": True,
                "vision_cfg": {
                    "image_size": 32,
                    "timm_model_name": "vit_base_patch16_siglip_224",
                    "timm_model_pretrained": False,
                    "timm_pool": "map",
                    "timm_proj": "none",
                },
                "text_cfg": {
                    "context_length": 16,
                    "vocab_size": size,
                    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
                    "tokenizer_kwargs": {"clean": "canonicalize"},
                    "width": 48,
                    "heads": 3,
                    "layers": 2,
                    "no_causal_mask": True,
                    "proj_bias": True,
                    "pool_type": "last",
                    "norm_kwargs": {"eps": 1e-6},
                },
            },
            "preprocess_cfg": {
                "mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"
            },
        },
    )  # fmt: skip
    return model
